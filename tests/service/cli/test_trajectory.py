"""`tminus trajectory check` on files of the engine's own: good, cut off, altered, of others."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import safetensors.numpy

from tests.service.cli.test_reproduce import Run, folder, load_quickly, one_line, run  # noqa: F401
from tests.service.conftest import MakeCheckpoint
from tests.service.fakes import INFO, make_spec
from tests.service.images.test_trajectory import packed
from tminus.model.checkpoint import save_checkpoint
from tminus.model.machine import torch_threads
from tminus.service.cli import images, trajectory
from tminus.service.cli.images import LocalJob, LocalModel
from tminus.service.cli.trajectory import difference
from tminus.service.engine import loading
from tminus.service.images.encoder import recipe
from tminus.service.images.trajectory import METADATA_KEY, pack_trajectory, read_trajectory
from tminus.service.worker.recording import Path as Recorded

pytestmark = pytest.mark.slow

SPECS: dict[str, dict[str, Any]] = {
    "ddpm": {"n": 2, "steps": 5, "seed": 2**64 - 1, "index": 7, "class_label": ["dog", None]},
    "guided ddim": {"n": 1, "steps": 4, "sampler": "ddim", "eta": 0.5, "class_label": 1, "guidance": 3, "seed": 3},
    "dpmpp_2m_sde": {"n": 1, "steps": 4, "sampler": "dpmpp_2m_sde", "seed": 4, "clip": False},
}


def as_served(folder: Path, **parameters: Any) -> LocalJob:  # noqa: F811
    """A job on an engine that was measured, as a server's is, though it is little work."""
    with pytest.MonkeyPatch.context() as patch, torch_threads(None):
        patch.setattr(loading, "LITTLE_S", 0.0)
        return LocalJob.of(LocalModel(folder / "tiny", "cpu", "eager", "auto"), parameters)


def made(folder: Path, **parameters: Any) -> bytes:  # noqa: F811
    """What a server that has this checkpoint answers."""
    job = as_served(folder, **{"n": 1, "seed": 5, "steps": 4} | parameters)
    path, info = Recorded(job.spec), job.loaded.engine.info
    pixels = job.run(path.record)
    return pack_trajectory(path.trajectory(), pixels, job.spec, info, recipe(job.spec, info))


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:  # noqa: F811
    """A file of each spec, made once."""
    with pytest.MonkeyPatch.context() as patch:
        load_quickly(patch, folder)
        return {name: made(folder, **parameters) for name, parameters in SPECS.items()}


@pytest.fixture
def check(run: Run, tmp_path: Path) -> Callable[..., click.testing.Result]:  # noqa: F811
    def invoke(data: bytes, *options: str | Path, **kwargs: Any) -> click.testing.Result:
        (tmp_path / "walk.safetensors").write_bytes(data)
        return run("trajectory", "check", tmp_path / "walk.safetensors", *options, **kwargs)

    return invoke


Check = Callable[..., click.testing.Result]


def altered(data: bytes, change: Callable[[dict[str, Any]], object] | None = None, **document: object) -> bytes:
    """The same file with other arrays or other metadata."""
    file = read_trajectory(data)
    arrays = {name: each.copy() for name, each in file.arrays.items()}
    if change is not None:
        change(arrays)
    return safetensors.numpy.save(arrays, {METADATA_KEY: json.dumps({**file.document, **document})})


@pytest.mark.parametrize("name", SPECS)
def test_a_good_file_is_identical(check: Check, files: dict[str, bytes], name: str) -> None:
    result = check(files[name])
    assert result.exit_code == 0, result.output
    n, steps = SPECS[name]["n"], SPECS[name]["steps"]
    assert f"identical: x_t of {n} images at {steps} steps, log p of the {steps - 1} that add noise" in result.stdout


def nudge(name: str, *at: int) -> Callable[[dict[str, Any]], object]:
    """Move a value by its last bits."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name][at] = np.nextafter(arrays[name][at], np.float32(9), dtype=arrays[name].dtype)

    return change


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], object]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nudge("x_t", 0, 1, 0, 2, 3), "x_t differs first in its first noise, image 1: 1 of 64 values"),
        (nudge("x_t", 3, 1, 0, 2, 3), "x_t differs first at step 3 of 5 (t = 20), image 1: 1 of 64 values"),
        (nudge("x_t", 5, 0, 0, 0, 0), "x_t differs first at step 5 of 5 (t = 0), image 0: 1 of 64 values"),
        (nudge("x_0", 1, 0, 0, 4, 4), "x_0 differs first at step 2 of 5 (t = 30), image 0: 1 of 64 values"),
        (put("x_t", (2, 0, 0, 1, 1), np.nan), "x_t differs first at step 2 of 5 (t = 30), image 0: 1 of 64 values"),
        (put("mean", (3, 1, 0, 0, 0), 0.5), "mean differs first at step 4 of 5, image 1: 1 of 64 values"),
        (put("log_p", (0, 1), -80.0), "log_p differs first at step 1 of 5, image 1: 1 of 1 values"),
        (put("s", (1, 0, 0, 0, 0), 0.5), "s differs first at [1, 0, 0, 0, 0]"),
        (put("lines", (1, 5), 0.5), "lines differs first at [1, 5]"),
        (put("images", (1, 3, 3, 0), 7), "images differs first at [1, 3, 3, 0]"),
        (put("class_labels", (1,), 0), "class_labels differs first at [1]"),
        (lambda arrays: arrays.pop("mean"), "it has no mean"),
        (lambda arrays: arrays.update(more=np.zeros(1)), "it has more too"),
        (lambda arrays: arrays.update(log_p=arrays["log_p"].astype(np.float32)), "log_p is float32 (4, 2), and again"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_an_altered_value_is_named_by_array_step_and_image(
    files: dict[str, bytes], change: Callable[[dict[str, Any]], object], says: str
) -> None:
    again = read_trajectory(files["ddpm"]).arrays
    assert difference(read_trajectory(altered(files["ddpm"])).arrays, again) is None
    found = difference(read_trajectory(altered(files["ddpm"], change)).arrays, again)
    assert found is not None
    assert found.startswith(says)


def test_a_log_p_near_0_may_be_rounded_another_way(files: dict[str, bytes]) -> None:
    arrays = dict(read_trajectory(files["ddpm"]).arrays)
    near, nearer, far = (arrays | {"log_p": np.full_like(arrays["log_p"], by)} for by in (1e-12, 3e-12, 1e-5))
    assert difference(near, nearer) is None
    assert difference(far, nearer) is not None


def test_an_altered_file_is_told_with_exit_code_1(check: Check, files: dict[str, bytes]) -> None:
    nudged = altered(files["ddpm"], nudge("x_t", 3, 1, 0, 2, 3))
    one_line(check(nudged), "x_t differs first at step 3 of 5 (t = 20), image 1: 1 of 64", "the file was changed")
    spec = read_trajectory(files["ddpm"]).document["spec"]
    one_line(check(altered(files["ddpm"], spec=spec | {"seed": 6})), "x_t differs first in its first noise, image 0")


def test_a_recipe_that_does_not_go_with_the_values_is_told_before_anything_is_made_again(
    check: Check, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalJob, "run", lambda *_: pytest.fail("it was made again"))
    spec = read_trajectory(files["ddpm"]).document["spec"]
    one_line(check(altered(files["ddpm"], spec=spec | {"steps": 40})), "x_t must be of shape (41, 2, 1, 8, 8), got (6,")
    one_line(check(altered(files["ddpm"], spec=spec | {"steps": 10**9})), "steps must be")
    no_noise = spec | {"sampler": "ddim", "eta": 0.0}
    one_line(check(altered(files["ddpm"], spec=no_noise)), "no step of its recipe adds noise (ddim)")


def test_other_weights_are_told_before_anything_is_made_again(
    check: Check,
    files: dict[str, bytes],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_checkpoint(seed=5)
    save_checkpoint(tmp_path / "other", other.net.state_dict(), other.net.config, other.noise, other.labels, {})
    monkeypatch.setattr(LocalJob, "run", lambda *_: pytest.fail("it was made again"))
    one_line(check(files["ddpm"], checkpoint=tmp_path / "other"), "made by other weights", other.weights_hash[:12])


def test_another_build_is_a_reason_for_a_difference_and_none_where_all_is_identical(
    check: Check, files: dict[str, bytes]
) -> None:
    elsewhere = {"fingerprint": "0" * 16, "made_by": {"executor": "openvino"}}
    result = check(altered(files["ddpm"], **elsewhere))
    assert result.exit_code == 0, result.output
    nudged = altered(files["ddpm"], nudge("x_t", 3, 1, 0, 2, 3), **elsewhere)
    line = one_line(check(nudged), "x_t differs first at step 3")
    assert "made by another build (0000000000000000, openvino in ?; here " in line
    assert "eager in float32)" in line


def test_it_is_run_as_servers_do_and_then_as_the_file_says_unless_another_way_is_given(
    files: dict[str, bytes],
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str, bool | None]] = []
    load_quickly(monkeypatch, folder)
    job = as_served(folder, n=2)

    def made_ready(model: LocalModel, *_: object) -> LocalJob:
        asked.append((model.executor, model.precision, model.exact))
        return job

    monkeypatch.setattr(LocalJob, "of", made_ready)
    monkeypatch.setattr(LocalJob, "run", lambda *_: sys.exit(7))
    made_by = {"executor": "openvino", "precision": "bfloat16", "exact": True}
    own, other, auto = {}, {"fingerprint": "0" * 16}, ("auto", "auto")  # type: ignore[var-annotated]
    for document, options, expected in (
        (own | {"made_by": made_by}, [], [(*auto, True)]),
        (other | {"made_by": made_by}, [], [(*auto, True), ("openvino", "bfloat16", True)]),
        (other | {"made_by": made_by}, ["--executor", "eager"], [("eager", "auto", True), ("eager", "bfloat16", True)]),
        (other | {"made_by": made_by}, ["--executor", "eager", "--precision", "float32"], [("eager", "float32", True)]),
        (other | {"made_by": {"executor": "rm -rf", "precision": 5, "exact": "yes"}}, [], [(*auto, None)]),
        (other | {"made_by": 5}, [], [(*auto, None)]),
    ):
        file = tmp_path / "walk.safetensors"
        file.write_bytes(altered(files["ddpm"], **document))
        click.testing.CliRunner().invoke(trajectory.trajectory, ["check", str(file), *options])
        assert asked == expected
        asked.clear()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-100], "no trajectory, or cut off or damaged"),
        (lambda data: data[:20], "no trajectory, or cut off or damaged"),
        (lambda data: b"", "no trajectory, or cut off or damaged"),
        (lambda data: altered(data, format=2), "of format 2, and this version of tminus reads 1"),
        (lambda data: altered(data, spec=5), "no recipe"),
        (lambda data: altered(data, spec=recipe(make_spec(), INFO)["spec"] | {"n": 10**9}), "no recipe"),  # type: ignore[operator]
        (lambda data: altered(data, spec=recipe(make_spec(), INFO)["spec"] | {"x": 1}), "no recipe"),  # type: ignore[operator]
    ],
    ids=["cut", "a head", "empty", "newer", "spec", "many", "unknown field"],
)
def test_what_cannot_be_checked_ends_in_one_clear_line_before_a_model_is_loaded(
    check: Check,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes], bytes],
    says: str,
) -> None:
    monkeypatch.setattr(images, "load", lambda *_: pytest.fail("a model was loaded for it"))
    one_line(check(change(files["ddpm"])), "walk.safetensors", says)


def test_a_file_that_is_not_there_or_too_large_ends_in_one_clear_line(
    run: Run,  # noqa: F811
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_line(run("trajectory", "check", "nowhere.safetensors"), "nowhere.safetensors")
    monkeypatch.setattr(trajectory, "MAX_FILE_BYTES", 100)
    one_line(check(packed(replace(make_spec(), steps=4))), "larger than 100 bytes")


def test_a_walk_from_a_picture_needs_that_picture(
    run: Run,  # noqa: F811
    check: Check,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    result = run("sample", "--steps", "3", "--seed", "1", "--out", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
    picture = images.read_pictures(tmp_path / "cat.png", None)["image"]
    data = made(folder, steps=10, strength=0.5, image=picture)
    assert read_trajectory(data).arrays["x_t"].shape[0] == 6
    one_line(check(data), "it is an edit of another picture")
    result = check(data, "--image", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
