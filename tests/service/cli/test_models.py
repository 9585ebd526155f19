"""`tminus models`, and --model of the commands that ask a server."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from click.testing import Result

from tests.service.cli import running
from tests.service.cli.running import line_of
from tests.service.client.conftest import ADMIN_KEY, Served, several  # noqa: F401
from tests.service.conftest import pixels
from tests.service.fakes import INFO, make_spec
from tminus.service.images.encoder import encode_png, recipe


def run(*arguments: str | Path, key: str | None = ADMIN_KEY) -> Result:
    return running.run(*arguments, TMINUS_KEY=key)


def refusal(*arguments: str | Path, key: str | None = ADMIN_KEY) -> str:
    """The one clear line that it ends in."""
    result = run(*arguments, key=key)
    assert len(result.stderr.splitlines()) == 1
    assert ADMIN_KEY not in result.output
    return line_of(result)


def rows(url: str) -> list[list[str]]:
    """The cells of the table, each row of one model."""
    result = run("models", "--url", url, key=None)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    starts = [head.index(word) for word in head.split()]
    assert head.split() == ["NAME", "STATE", "IMAGES", "CLASSES", "DEVICE", "FINGERPRINT"]
    cuts = [slice(*each) for each in zip(starts, [*starts[1:], None], strict=True)]
    return [[line[cut].strip() for cut in cuts] for line in lines]


# --- models ---


def test_the_models_of_a_server_are_a_table(several: Served) -> None:  # noqa: F811
    assert rows(several.url) == [
        ["fake", "loaded, default", "6x4, grey", "3", "a fake", "0123456789abcdef"],
        ["colour", "loaded", "6x4, colour", "3", "a fake", "fedcba9876543210"],
        ["broken", "unloaded", "", "", "", ""],
        ["spare", "unloaded", "", "", "", ""],
    ]


def test_models_as_json_are_what_the_server_lists_and_one_that_changed_is_told_alone(several: Served) -> None:  # noqa: F811
    def listed() -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = httpx.get(f"{several.url}/models").json()["models"]
        return models

    def printed(*arguments: str) -> list[dict[str, Any]]:
        result = run("models", *arguments, "--url", several.url, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        models: list[dict[str, Any]] = json.loads(result.stdout)["models"]
        return models

    assert printed() == listed()
    assert printed("load", "spare") == [model for model in listed() if model["name"] == "spare"]
    (spare,) = printed("unload", "spare")
    assert spare["name"] == "spare"
    assert spare["state"] in ("unloading", "unloaded")


def test_a_model_is_loaded_reloaded_and_unloaded(several: Served) -> None:  # noqa: F811
    for change in ("load", "reload"):
        result = run("models", change, "spare", "--url", several.url)
        assert (result.exit_code, result.output) == (0, f"spare: {change}ed\n")
        assert ["spare", "loaded"] in [row[:2] for row in rows(several.url)]
    assert run("models", "unload", "spare", "--url", several.url).output == "spare: unloaded\n"
    assert ["spare", "loaded"] not in [row[:2] for row in rows(several.url)]


def test_what_is_wrong_with_a_change_is_one_clear_line(several: Served) -> None:  # noqa: F811
    where = ("--url", several.url)
    for key in (None, ""):
        line = refusal("models", "load", "spare", *where, key=key)
        assert "401 this needs a key of the role admin" in line
        assert line.endswith("; commands send the key in the variable TMINUS_KEY, which is not set")
    line = refusal("models", "load", "spare", *where, key="another key, wrong")
    assert "401" in line
    assert line.endswith("; commands send the key in the variable TMINUS_KEY")
    assert "printable ASCII" in refusal("models", "load", "spare", *where, key=f"{ADMIN_KEY}\n")
    assert "model must be 1..64" in refusal("models", "load", "a/b", *where)
    assert "409 colour is loaded already" in refusal("models", "load", "colour", *where)
    assert "422 broken cannot be loaded" in refusal("models", "load", "broken", *where)


# --- --model ---


def test_images_are_sampled_from_the_model_that_is_named(several: Served, tmp_path: Path) -> None:  # noqa: F811
    where = ("--url", several.url, "--model", "colour", "--steps", "4")
    assert run("sample", *where, "--out", tmp_path / "a.png").exit_code == 0
    assert pixels((tmp_path / "a.png").read_bytes()).shape == (4, 6, 3)
    watched = run("sample", *where, "--watch", tmp_path / "way.webp", "--out", tmp_path / "b.png")
    assert watched.exit_code == 0, watched.output
    assert pixels((tmp_path / "b.png").read_bytes()).shape == (4, 6, 3)
    assert run("sample", "--url", several.url, "--steps", "4", "--out", tmp_path / "c.png").exit_code == 0
    assert pixels((tmp_path / "c.png").read_bytes()).shape == (4, 6)
    assert run("reproduce", tmp_path / "a.png", *where[:4]).exit_code == 0
    assert run("reproduce", tmp_path / "a.png", *where[:2]).exit_code == 0, "it has the weights of the recipe"
    default = next(each["name"] for each in httpx.get(f"{several.url}/models").json()["models"] if each["default"])
    assert "another size" in refusal("reproduce", tmp_path / "a.png", *where[:2], "--model", default)


def test_a_model_that_cannot_be_asked_is_one_clear_line(several: Served, tmp_path: Path) -> None:  # noqa: F811
    image = tmp_path / "kept.png"
    image.write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8), recipe(make_spec(), INFO)))
    for command in (("sample", "--out", tmp_path / "a.png"), ("reproduce", image)):
        where = ("--url", several.url, "--model")
        assert "404 no model 'nobody'" in refusal(*command, *where, "nobody")
