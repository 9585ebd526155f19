"""The page of a model with alpha, and of one whose images no picture holds, in a real browser."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.browser import QUICK, OpenPage, Page
from tests.e2e.conftest import SHARED, RunningServer, serving
from tests.tiny import randomize
from tminus.model.checkpoint import load_checkpoint, save_checkpoint
from tminus.model.unet import UNet2D

CHECKERED = "repeating-conic-gradient"


@pytest.fixture(scope="module")
def server(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of `small` with alpha, its default, of `planes` with five channels, and of `opaque`."""
    like, made = load_checkpoint(small), tmp_path_factory.mktemp("pixels")
    for name, channels in (("small", 4), ("planes", 5)):
        config = replace(like.net.config, sample_size=16, in_channels=channels, out_channels=channels)
        net = UNet2D(config)
        randomize(net)
        save_checkpoint(made / name, net.state_dict(), config, like.noise, like.labels, {}, like.recommended)
    others = ("--checkpoint", f"planes={made / 'planes'}", "--checkpoint", f"opaque={small}")
    with serving(made / "small", *SHARED, *others, "--executor", "eager") as running:
        yield running


def behind(page: Page, selector: str) -> str:
    """What lies behind an element."""
    found: str = page.at(selector).first.evaluate("(element) => getComputedStyle(element).backgroundImage")
    return found


def colours_behind(page: Page, selector: str) -> list[tuple[int, ...]]:
    """The two colours that are seen where a picture is, if all of it is transparent."""
    page.at(selector).first.evaluate("(element) => { (element.querySelector('img') ?? element).style.opacity = 0 }")
    with Image.open(io.BytesIO(page.at(selector).first.screenshot())) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    (first, many), (second, fewer) = Counter(map(tuple, pixels.tolist())).most_common(2)
    assert many < 1.3 * fewer, "as many squares of each"
    assert many + fewer > 0.9 * len(pixels), "and nothing else, but for where they meet"
    return sorted([first, second])


def test_pictures_with_alpha_lie_on_a_checkerboard_of_each_colour_scheme(open_page: OpenPage) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page = open_page(viewport={"width": 390, "height": 900}, color_scheme=scheme)
        page.make(**QUICK)
        page.press("Compare")
        page.press("Make the grid")
        expect(page.at(".lane .x_t[src]").first).to_be_attached()
        expect(page.at("#cells img[src]").first).to_be_attached()
        expect(page.at("#noise-image[src]")).to_be_attached()
        places = ("#x_t .crop", "#strip img[src]", "#gallery img", ".lane .x_t", ".lane .x_0", "#cells img", "#canvas")
        for selector in (*places, "#noise-image"):
            assert behind(page, selector).startswith(CHECKERED), selector
        page.check_that_all_can_use_it()
        with Image.open(io.BytesIO(page.picture("#gallery img"))) as image:
            assert image.mode == "RGBA"
        seen.append(colours_behind(page, "#x_t .crop"))
    assert max(seen[0][0]) > max(seen[1][1]), "light squares, and dark ones"


def test_pictures_without_alpha_lie_on_nothing_of_the_kind(open_page: OpenPage, server: RunningServer) -> None:
    page = open_page(f"{server.url}/models/opaque/")
    expect(page.at("#model")).not_to_contain_text("channels")
    page.make(**QUICK)
    assert behind(page, "#x_t .crop") == behind(page, "#gallery img") == "none"


def test_an_edit_of_an_image_with_alpha_keeps_the_alpha(open_page: OpenPage, server: RunningServer) -> None:
    spec = {"class_label": 8, **QUICK}
    made = server.post(json=spec).content
    page = open_page()
    page.tab.set_input_files("#noise-file", {"name": "a.png", "mimeType": "image/png", "buffer": made})
    page.says("#noise-name", "a.png")
    alpha = page.at("#canvas").evaluate(
        "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, 16, 16).data].filter((_, at) => at % 4 === 3)"
    )
    with Image.open(io.BytesIO(made)) as image:
        assert alpha == np.asarray(image)[..., 3].ravel().tolist()


def test_a_model_whose_images_no_picture_holds_shows_some_and_takes_none(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page(f"{server.url}/models/planes/")
    page.says("#model", "3 of 5 channels shown")
    page.make(**QUICK)
    with Image.open(io.BytesIO(page.picture("#gallery img"))) as image:
        assert image.mode == "RGB"
    for selector in ("#noise", "#edit-this"):
        expect(page.at(selector)).to_be_hidden()
    assert not [url for url in page.requests if "/noise?" in url], "nor asks what would be refused"
    floats = httpx.get(
        f"{server.url}/models/planes/sample", params=QUICK, headers={"Accept": "application/x-npy"}, timeout=60
    )
    assert np.load(io.BytesIO(floats.content)).shape == (1, 5, 16, 16)
