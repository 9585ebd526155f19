"""`tminus reproduce`: offline here, and from a server that a fake client stands in for; the real ones are in e2e."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click.testing
import httpx
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.service.conftest import CONDITIONAL, MakeCheckpoint
from tests.service.fakes import INFO, LIMITS, make_spec
from tminus.model.checkpoint import Labels, save_checkpoint
from tminus.service.api.request.schemas import SampleRequest, parameters_of
from tminus.service.cli import images, reproduce
from tminus.service.cli.main import main
from tminus.service.cli.reproduce import difference, read_recipe
from tminus.service.client import Client
from tminus.service.engine import autotune, loading
from tminus.service.engine.autotune import Choice
from tminus.service.images.encoder import encode_png, recipe

pytestmark = pytest.mark.slow

Run = Callable[..., click.testing.Result]


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, and beside it what is measured of it, once for all tests."""
    folder, checkpoint = tmp_path_factory.mktemp("reproduce"), make_checkpoint()
    noise, labels = checkpoint.noise, checkpoint.labels
    save_checkpoint(folder / "tiny", checkpoint.net.state_dict(), checkpoint.net.config, noise, labels, {})
    return folder


def load_quickly(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """An executor is chosen once, and neither ticks are measured nor bits tested: other tests do that."""

    def measured(_engine: object, way: dict[str, Any], largest: int, _kept: object) -> loading.Measured:
        return loading.Measured(way, largest, largest, ((1, 0.001), (largest, 0.001)))

    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(autotune, "TRIAL_S", 0.005)
    patch.setattr(loading, "_measure", measured)
    patch.setattr(loading, "same_alone_and_together", lambda *_, **__: True)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command on the tiny checkpoint."""
    load_quickly(monkeypatch, folder)
    threads = torch.get_num_threads()

    def invoke(
        *arguments: str | Path, checkpoint: Path = folder / "tiny", executor: str = "eager"
    ) -> click.testing.Result:
        where = ("--checkpoint", str(checkpoint), "--device", "cpu", "--executor", executor)
        return click.testing.CliRunner().invoke(
            main, [*map(str, arguments), *(where if "--url" not in arguments else ())]
        )

    yield invoke
    torch.set_num_threads(threads)


@pytest.fixture
def drawn(run: Run, tmp_path: Path) -> Path:
    """An image that `tminus sample` made."""
    out = tmp_path / "drawn.png"
    what = ("-n", 1, "--steps", 6, "--sampler", "dpmpp_2m", "--seed", 2**64 - 1, "--class-label", "dog")
    how = (
        *("--guidance", 2.5, "--guidance-interval", 5, 40, "--guidance-rescale", 0.7),
        *("--timestep-spacing", "trailing", "--index", 7, "--no-clip"),
    )
    result = run("sample", *map(str, (*what, *how)), "--out", out)
    assert result.exit_code == 0, result.output
    return out


def one_line(result: click.testing.Result, *says: str) -> str:
    """The failure in one clear line."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), "no traceback"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tminus: ")
    assert len(lines[0]) < 800
    assert lines[0].isprintable()
    assert "BytesIO" not in lines[0]
    for text in says:
        assert text in lines[0]
    return lines[0]


def altered(png: bytes, change: Callable[[Any], None]) -> bytes:
    """Another image under the same text."""
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        pixels = np.array(image)
        text = image.text["tminus"]  # type: ignore[attr-defined]
    change(pixels)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("tminus", text)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def with_text(text: str | None, key: str = "tminus", *, compressed: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(key, text, zip=compressed)
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


# --- offline ---


def test_the_same_bytes_are_told_with_exit_code_0(run: Run, drawn: Path) -> None:
    result = run("reproduce", drawn)
    assert result.exit_code == 0, result.output
    assert f"{drawn}: the same {drawn.stat().st_size} bytes" in result.stdout


def test_what_was_made_before_executors_were_measured_can_be_made_again_afterwards(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, after = tmp_path / "before.png", tmp_path / "after.png"
    made = run("sample", "-n", "4", "--steps", "8", "--seed", "3", "--out", before, executor="auto")
    assert made.exit_code == 0, made.output
    assert not (tmp_path / "cache").exists(), "for so little work nothing is measured"
    monkeypatch.setattr(autotune, "_fastest", lambda *_: Choice("openvino", "float32", True, (1, 2)))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "LITTLE_S", 0.0)
        run("sample", "-n", "4", "--steps", "8", "--seed", "3", "--out", after, executor="auto")
    assert read_recipe(before.read_bytes()).fingerprint != read_recipe(after.read_bytes()).fingerprint
    for png in (before, after):
        assert run("reproduce", png, executor="auto").exit_code == 0


def test_a_sheet_can_be_made_again(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    made = run("sample", "-n", "5", "--steps", "4", "--class-label", "cat", "--seed", "3", "--out", out)
    assert made.exit_code == 0, made.output
    result = run("reproduce", out)
    assert result.exit_code == 0, result.output


def test_an_image_between_two_seeds_can_be_made_again(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "between.png"
    made = run("sample", "--steps", "4", "--seed", "3", "--to-seed", 2**64 - 1, "--mix", "0.3", "--out", out)
    assert made.exit_code == 0, made.output
    with Image.open(out) as image:
        assert json.loads(image.text["tminus"])["spec"]["to_seed"] == 2**64 - 1
    assert run("reproduce", out).exit_code == 0


def test_each_of_several_images_can_be_made_again_by_itself(run: Run, tmp_path: Path) -> None:
    made = run("sample", "-n", "9", "--steps", "4", "--seed", "3", "--index", "5", "--out", tmp_path / "images")
    assert made.exit_code == 0, made.output
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 9
    for file in (files[0], files[7]):
        result = run("reproduce", file)
        assert result.exit_code == 0, result.output


def test_a_seed_that_was_drawn_is_in_the_image(run: Run, tmp_path: Path) -> None:
    assert run("sample", "--steps", "2", "--out", tmp_path / "a.png").exit_code == 0
    assert run("reproduce", tmp_path / "a.png").exit_code == 0


def test_an_altered_pixel_is_told_with_exit_code_1(run: Run, drawn: Path, tmp_path: Path) -> None:
    def change(pixels: Any) -> None:
        pixels[3, 4] ^= 16

    drawn.write_bytes(altered(drawn.read_bytes(), change))
    again = tmp_path / "again.png"
    result = run("reproduce", drawn, "--out", again)
    line = one_line(result, str(drawn), "1 of 64 values differ, by 16 of 255 at most")
    assert "made by" not in line, "weights and build are the same"
    assert run("reproduce", again).exit_code == 0, "what it made is kept"


def test_the_same_pixels_in_other_bytes_are_not_the_same_bytes(run: Run, drawn: Path) -> None:
    drawn.write_bytes(drawn.read_bytes() + b"tail")
    one_line(run("reproduce", drawn), "0 of 64 values differ")


def test_another_size_is_told(run: Run, drawn: Path) -> None:
    info = PngImagePlugin.PngInfo()
    with Image.open(drawn) as image:
        image.load()
        info.add_itxt("tminus", image.text["tminus"])  # type: ignore[attr-defined]
    Image.new("RGB", (5, 4)).save(drawn, pnginfo=info)
    one_line(run("reproduce", drawn), "another size")


def test_other_weights_are_named_as_the_reason(
    run: Run, drawn: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = make_checkpoint(seed=5)
    save_checkpoint(tmp_path / "other", other.net.state_dict(), other.net.config, other.noise, other.labels, {})
    one_line(run("reproduce", drawn, checkpoint=tmp_path / "other"), "made by other weights", other.weights_hash[:12])


def test_a_model_that_cannot_do_the_recipe_says_so(
    run: Run, drawn: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = make_checkpoint(classes=False)
    folder = tmp_path / "no classes"
    save_checkpoint(folder, other.net.state_dict(), other.net.config, other.noise, Labels(), {})
    assert CONDITIONAL.num_class_embeds is not None
    one_line(run("reproduce", drawn, checkpoint=folder), "class_label must be absent")


# --- what is no recipe ---


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing below may come so far as to load one."""

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded for it")

    monkeypatch.setattr(images, "load", load)


def hostile(**fields: object) -> str:
    return json.dumps(recipe(make_spec(), INFO) | {"spec": asdict(make_spec()) | fields})


def webp() -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "WEBP")
    return out.getvalue()


WHOLE = encode_png(np.zeros((8, 8, 1), np.uint8), recipe(make_spec(), INFO))

NOISE = encode_png(np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8), recipe(make_spec(), INFO))

NO_RECIPES: dict[str, tuple[bytes, str]] = {
    "no text": (with_text(None), "no 'tminus' text"),
    "another text": (with_text("{}", "parameters"), "no 'tminus' text"),
    "empty file": (b"", "not a PNG"),
    "text file": (b"just text", "not a PNG"),
    "gif": (b"GIF89a" + bytes(20), "not a PNG"),
    "signature only": (WHOLE[:8], "not a PNG"),
    "cut in the text": (WHOLE[:60], "not a PNG"),
    "cut in the pixels": (NOISE[:-60], "not a PNG"),
    "a byte of the pixels flipped": (NOISE[:-60] + bytes([NOISE[-60] ^ 255]) + NOISE[-59:], "not a PNG"),
    "empty text": (with_text(""), "no recipe"),
    "not json": (with_text("spec"), "no recipe"),
    "a list": (with_text("[]"), "no recipe"),
    "null": (with_text("null"), "no recipe"),
    "a number": (with_text("5"), "no recipe"),
    "no spec": (with_text("{}"), "no recipe"),
    "spec null": (with_text('{"spec": null}'), "no recipe"),
    "spec text": (with_text('{"spec": "n=5"}'), "no recipe"),
    "spec empty": (with_text('{"spec": {}}'), "no recipe"),
    "no weights": (with_text(json.dumps({"spec": asdict(make_spec())})), "no recipe"),
    "unknown field": (with_text(hostile(__class__="os.system")), "no recipe"),
    "more unknown fields": (with_text(hostile(prompt="a cat", steps2=5)), "no recipe"),
    "labels of another kind": (with_text(hostile(class_labels=5)), "no recipe"),
    "interval of another kind": (with_text(hostile(guidance_interval=5)), "no recipe"),
    "n of 10^9": (with_text(hostile(n=10**9)), "no recipe"),
    "n negative": (with_text(hostile(n=-5)), "no recipe"),
    "n zero": (with_text(hostile(n=0)), "no recipe"),
    "n text": (with_text(hostile(n="many")), "no recipe"),
    "n null": (with_text(hostile(n=None)), "no recipe"),
    "n true": (with_text(hostile(n=True)), "no recipe"),
    "n a list": (with_text(hostile(n=[1])), "no recipe"),
    "n a fraction": (with_text(hostile(n=1.5)), "no recipe"),
    "NaN": (with_text(hostile(guidance=float("nan"))), "NaN is no number"),
    "infinity": (with_text(hostile(guidance_interval=[1, float("-inf")])), "-Infinity is no number"),
    "a number beyond floats": (with_text(hostile(guidance=1).replace('"guidance": 1', '"guidance": 1e999')), "1e999"),
    "an escape in an error": (with_text(hostile(**{"\x1b[2J": 1})), r"\x1b[2J"),
    "a webp": (webp(), "not a PNG but a WEBP; only PNGs say how they were made"),
    "a huge one": (WHOLE[:16] + (2**15).to_bytes(4) * 2 + WHOLE[24:], "32768x32768 pixels, over 67108864"),
    "deep": (with_text('{"spec": ' + "[" * 5000 + "]" * 5000 + "}"), "no recipe"),
    "many digits": (with_text('{"spec": {"n": ' + "9" * 5000 + "}}"), "no recipe"),
    "long": (with_text("x" * 900_000), "no recipe"),
    "a compressed bomb": (with_text(" " * 50_000_000, compressed=True), "not a PNG"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", NO_RECIPES)
def test_a_file_without_a_recipe_ends_in_one_clear_line(run: Run, tmp_path: Path, name: str) -> None:
    png, says = NO_RECIPES[name]
    file = tmp_path / "hostile.png"
    file.write_bytes(png)
    one_line(run("reproduce", file), str(file), says)


@pytest.mark.usefixtures("no_model")
def test_a_file_that_is_not_there_or_too_large_ends_in_one_clear_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_line(run("reproduce", tmp_path / "nowhere.png"), "nowhere.png")
    monkeypatch.setattr(reproduce, "MAX_FILE_BYTES", 100)
    (tmp_path / "large.png").write_bytes(WHOLE)
    one_line(run("reproduce", tmp_path / "large.png"), "larger than 100 bytes")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 10**9}, "steps must be an integer in 1..50"),
        ({"steps": "x"}, "steps must be"),
        ({"seed": -1}, "seed must be"),
        ({"sampler": "rk45"}, "sampler must be"),
        ({"class_labels": [77]}, "class_label must be"),
        ({"class_labels": [0] * 5000}, "class_label must be"),
        ({"guidance": 1e9}, "guidance must be"),
        ({"guidance": 2.0, "guidance_interval": [9, 1]}, "guidance_interval must be"),
        ({"timestep_spacing": "x" * 100_000}, "timestep_spacing must be"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_recipe_out_of_bounds_is_refused_as_a_request_would_be(
    run: Run, tmp_path: Path, fields: dict[str, object], says: str
) -> None:
    file = tmp_path / "hostile.png"
    file.write_bytes(with_text(hostile(**fields)))
    one_line(run("reproduce", file), says)


# --- a server ---


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """An image of the fake model's."""
    file = tmp_path / "kept.png"
    file.write_bytes(NOISE)
    return file


OURS = {"X-Seed": "1", "X-Fingerprint": "0123456789abcdef", "Content-Type": "image/png"}


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Let a function answer in place of the server."""
    monkeypatch.setattr(
        images, "client_of", lambda url, model=None: Client(url, model=model, transport=httpx.MockTransport(answer))
    )


@pytest.mark.usefixtures("no_model")
def test_the_server_is_asked_for_what_the_recipe_says(run: Run, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=kept.read_bytes(), headers=OURS)

    stand_in(monkeypatch, answer)
    result = run("reproduce", kept, "--url", "http://server:1/")
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert request.url == "http://server:1/sample"
    assert request.headers["accept"] == "image/png"
    assert json.loads(request.content) == read_recipe(kept.read_bytes()).parameters


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("response", "says"),
    [
        (httpx.Response(502, text="<html>"), "502"),
        (httpx.Response(200, text="hello"), "not from a tminus server"),
        (
            httpx.Response(429, headers={"Content-Type": "application/problem+json"}, json={"detail": "too much"}),
            "429 too much",
        ),
        (httpx.Response(200, content=NOISE[:-60], headers=OURS), "not a PNG"),
        (httpx.Response(200, content=b"no image", headers=OURS), "no image/png"),
        (httpx.Response(200, content=with_text(None), headers=OURS), "no 'tminus' text"),
    ],
)
def test_a_server_that_gives_something_else_ends_in_one_clear_line(
    run: Run, kept: Path, monkeypatch: pytest.MonkeyPatch, response: httpx.Response, says: str
) -> None:
    stand_in(monkeypatch, lambda request: response)
    one_line(run("reproduce", kept, "--url", "http://server:1"), says)


@pytest.mark.parametrize("command", ["sample", "reproduce"])
@pytest.mark.parametrize("name", ["checkpoint", "device", "executor", "precision"])
def test_what_to_load_here_is_refused_where_a_server_is_asked(run: Run, kept: Path, command: str, name: str) -> None:
    what = [kept] if command == "reproduce" else []
    result = run(command, *what, "--url", "http://127.0.0.1:1", f"--{name}", "cpu")
    one_line(result, f"--{name} is for a model that is loaded here, and --url names a server")


@pytest.mark.usefixtures("no_model")
def test_a_recipe_that_json_cannot_hold_is_sent_to_no_server(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "hostile.png"
    for fields in ({"guidance": float("nan")}, {"guidance": float("inf")}, {"sampler": "\ud800"}):
        file.write_bytes(with_text(hostile(**fields)))
        one_line(run("reproduce", file, "--url", "http://127.0.0.1:1"))


@pytest.mark.usefixtures("no_model")
def test_an_escape_in_the_text_of_a_png_does_not_reach_the_terminal(
    run: Run, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, lambda request: httpx.Response(200, content=NOISE, headers=OURS))
    kept.write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8), recipe(make_spec(), INFO) | {"fingerprint": "\x1b[2J"}))
    one_line(run("reproduce", kept, "--url", "http://server:1"), r"another build (\x1b[2J, here")


def test_the_new_png_gets_no_other_name(run: Run, kept: Path) -> None:
    one_line(run("reproduce", kept, "--out", "again.jpg"), "what is written is PNG")


# --- the parts ---


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(),
        make_spec(n=3, class_labels=(0, None, 2), sampler="ddim", eta=0.3, index=2**32 - 3, seed=2**64 - 1),
        make_spec(guidance=2.5, guidance_interval=(0, 999), class_labels=(1,), timestep_spacing="trailing", clip=False),
        make_spec(sampler="dpmpp_2m"),
    ],
    ids=["plain", "ddim", "guided", "dpmpp_2m"],
)
def test_the_recipe_read_from_a_png_makes_its_spec_again(spec: Any) -> None:
    found = read_recipe(encode_png(np.zeros((4, 6, 1), np.uint8), recipe(spec, INFO)))
    labels = [None if label is None else f"number:{label}" for label in spec.class_labels]
    assert found.parameters == parameters_of(spec) | {"class_label": labels}
    assert SampleRequest.parse(found.parameters, INFO, LIMITS).to_spec(INFO, LIMITS) == spec
    assert (found.weights, found.fingerprint) == (INFO.weights_hash, INFO.fingerprint)


def test_all_reasons_are_told() -> None:
    black = np.zeros((4, 6, 1), np.uint8)
    one = encode_png(black, recipe(make_spec(), INFO))
    other = json.loads(json.dumps(recipe(make_spec(), INFO))) | {"weights": "other", "fingerprint": "elsewhere"}
    text = difference(one, encode_png(black + 3, other), read_recipe(one))
    assert "24 of 24 values differ, by 3 of 255" in text
    assert "other weights" in text
    assert "another build (0123456789abcdef, here elsewhere)" in text


# --- edits ---


@pytest.fixture
def edited(run: Run, tmp_path: Path) -> Path:
    """Three fillings of a picture, in a sheet, and beside it what they were made from."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(tmp_path / "cat.png")
    Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8)[None] * 36, 8, 0)).save(tmp_path / "mask.png")
    how = ("-n", "3", "--steps", "6", "--seed", "3", "--strength", "0.7", "--class-label", "cat")
    pictures = ("--image", tmp_path / "cat.png", "--mask", tmp_path / "mask.png")
    result = run("sample", *how, *pictures, "--out", tmp_path / "edited.png")
    assert result.exit_code == 0, result.output
    return tmp_path / "edited.png"


def test_an_edit_is_made_again_from_its_pictures(run: Run, edited: Path) -> None:
    image, mask = edited.with_name("cat.png"), edited.with_name("mask.png")
    result = run("reproduce", edited, "--image", image, "--mask", mask)
    assert result.exit_code == 0, result.output


def test_an_edit_without_its_pictures_or_with_others_is_one_clear_line(run: Run, edited: Path, drawn: Path) -> None:
    image, mask = edited.with_name("cat.png"), edited.with_name("mask.png")
    recipe = read_recipe(edited.read_bytes())
    one_line(run("reproduce", edited), "--image", recipe.parameters["image_sha256"])
    one_line(run("reproduce", edited, "--image", image), "--mask")
    line = one_line(run("reproduce", edited, "--image", mask, "--mask", mask), "image_sha256")
    assert recipe.parameters["image_sha256"] in line
    one_line(run("reproduce", edited, "--image", image, "--mask", image), "mask_sha256")
    one_line(run("reproduce", edited, "--image", "nowhere.png", "--mask", mask), "nowhere.png")
    one_line(run("reproduce", drawn, "--image", image), "without an image")


def test_a_bad_edit_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    out = ("--out", tmp_path / "out.png")
    one_line(run("sample", "--strength", "0.5", *out), "image must be given where strength is")
    one_line(run("sample", "--image", tmp_path / "text", "--strength", "0.5", *out), "image must be a PNG")
    one_line(run("sample", "--image", tmp_path / "no", "--strength", "0.5", *out), "--image")
