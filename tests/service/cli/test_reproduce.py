"""`tminus reproduce`: offline here, and from a server that a fake client stands in for; the real ones are in e2e."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import Result
from PIL import Image, PngImagePlugin

from tests.service.cli import running
from tests.service.cli.running import line_of
from tests.service.conftest import MakeCheckpoint
from tests.service.fakes import INFO, make_spec
from tminus.model.checkpoint import Checkpoint, save_checkpoint
from tminus.model.machine import torch_threads
from tminus.service.cli import images
from tminus.service.cli.images import LocalJob, opaque_png
from tminus.service.cli.reproduce import first_difference, read_recipe
from tminus.service.client import Client
from tminus.service.engine import autotune, loading, openvino_executor
from tminus.service.engine.protocol import LoadOptions
from tminus.service.images.encoder import encode_png, recipe
from tminus.service.images.trajectory import METADATA_KEY, pack_trajectory, read_trajectory
from tminus.service.spec import TrajectoryType
from tminus.service.work import select_passes
from tminus.service.worker.recording import TrajectoryRecorder

pytestmark = pytest.mark.slow

Run = Callable[..., Result]
SPECS: dict[str, dict[str, Any]] = {
    "ddpm": {"n": 2, "steps": 5, "seed": 2**64 - 1, "index": 7, "class_label": ["dog", None]},
    "guided ddim": {"n": 1, "steps": 4, "sampler": "ddim", "eta": 0.5, "class_label": 1, "guidance": 3, "seed": 3},
    "dpmpp_2m_sde": {"n": 1, "steps": 4, "sampler": "dpmpp_2m_sde", "seed": 4, "clip": False},
}


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny checkpoint, and beside it the executor that is chosen for all files and commands.

    PyTorch is given one memory layout. Two layouts give different bits, and which one is faster depends on the load.
    """
    folder = saved(make_checkpoint(), tmp_path_factory.mktemp("reproduce") / "tiny").parent
    find = autotune.find_candidates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "find_candidates", lambda *wish: [each for each in find(*wish) if each.channels_last])
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(autotune, "TRIAL_S", 0.001)
        patch.setattr(loading, "CORES", 1)  # bits may depend on the number of threads
        yield folder


def saved(made: Checkpoint, folder: Path) -> Path:
    save_checkpoint(folder, made.net.state_dict(), made.net.config, made.noise, made.labels, {})
    return folder


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """Runs a command on the tiny checkpoint. executor: None leaves it to the command."""
    threads = torch.get_num_threads()

    def invoke(*arguments: str | Path, checkpoint: Path = folder / "tiny", executor: str | None = "eager") -> Result:
        where = ["--checkpoint", str(checkpoint), "--device", "cpu"]
        where += ["--executor", executor] if executor is not None else []
        return running.run(*arguments, *(where if "--url" not in arguments else ()))

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
    result = run("sample", *what, *how, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def one_line(result: Result, *says: str) -> str:
    """The failure in one clear line."""
    line = line_of(result)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert len(line) < 800
    assert "BytesIO" not in line
    for text in says:
        assert text in line
    return line


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


def test_a_sheet_is_enlarged_and_made_again_all_the_same(run: Run, tmp_path: Path) -> None:
    what = ("sample", "-n", 6, "--steps", 5, "--seed", 3)
    for name, how in {"plain": ("--scale", 1), "default": (), "five": ("--scale", 5)}.items():
        assert run(*what, *how, "--out", tmp_path / f"{name}.png").exit_code == 0
        result = run("reproduce", tmp_path / f"{name}.png", "--out", tmp_path / "again.png")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()
    plain, default, five = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "default", "five"))
    assert "scale" not in json.loads(plain.text["tminus"])  # type: ignore[attr-defined]
    assert json.loads(five.text["tminus"])["scale"] == 5  # type: ignore[attr-defined]
    width, height = plain.size
    assert five.size == (5 * width, 5 * height)
    assert max(default.size) > 512
    for enlarged in (default, five):
        np.testing.assert_array_equal(enlarged.resize(plain.size, Image.Resampling.NEAREST), plain)
        np.testing.assert_array_equal(plain.resize(enlarged.size, Image.Resampling.NEAREST), enlarged)
    (tmp_path / "five.png").write_bytes(altered((tmp_path / "five.png").read_bytes(), lambda x: x.__setitem__(0, 0)))
    one_line(run("reproduce", tmp_path / "five.png"), "values differ")


def test_one_image_and_files_of_several_are_enlarged_only_if_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    what = ("sample", "--steps", 5, "--seed", 3)
    for given, file in ((("--out", tmp_path / "a.png"), "a.png"), (("-n", 2, "--out", tmp_path / "b"), "b/00000.png")):
        assert run(*what, *given).exit_code == 0
        with Image.open(tmp_path / file) as plain:
            size = plain.size
        assert run(*what, *given, "--scale", 3).exit_code == 0
        with Image.open(tmp_path / file) as enlarged:
            assert enlarged.size == (3 * size[0], 3 * size[1])
        assert run("reproduce", tmp_path / file).exit_code == 0


@pytest.mark.parametrize(("channels", "mode"), [(4, "RGBA"), (5, "RGB")])
def test_images_of_other_channels_are_made_again(
    run: Run, make_checkpoint: MakeCheckpoint, tmp_path: Path, channels: int, mode: str
) -> None:
    made = make_checkpoint(classes=False, in_channels=channels, out_channels=channels)
    checkpoint, file = saved(made, tmp_path / "model"), tmp_path / "a.png"
    what = ("-n", 3, "--steps", 5, "--seed", 3, "--scale", 2, "--out", file)
    assert run("sample", *what, checkpoint=checkpoint).exit_code == 0
    with Image.open(file) as image:
        assert image.mode == mode
    assert run("reproduce", file, checkpoint=checkpoint).exit_code == 0
    if mode == "RGBA":  # as /v1/images gives it with background=opaque
        assert run("sample", *what, "--scale", 1, checkpoint=checkpoint).exit_code == 0
        file.write_bytes(opaque_png(file.read_bytes()))
        with Image.open(file) as image:
            assert image.mode == "RGB"
        assert "the same" in run("reproduce", file, checkpoint=checkpoint).output
        deep = run("sample", *what, "--bit-depth", 16, checkpoint=checkpoint)
        one_line(deep, "bit_depth must be 8 or 32 for 4 channels")


def test_an_image_of_sixteen_bits_is_made_again(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    assert run("sample", "-n", 2, "--steps", 5, "--seed", 3, "--bit-depth", 16, "--out", file).exit_code == 0
    with Image.open(file) as image:
        assert np.asarray(image).dtype == np.uint16
        assert json.loads(image.text["tminus"])["value_range"] == [-1, 1]  # type: ignore[attr-defined]
    assert run("reproduce", file).exit_code == 0
    file.write_bytes(altered(file.read_bytes(), lambda pixels: pixels.__setitem__((0, 0), pixels[0, 0] ^ 1)))
    one_line(run("reproduce", file), "values differ, by 1 of 65535 at most")


def test_an_image_may_not_be_enlarged_beyond_what_can_be_read_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    what, out = ("sample", "-n", 3, "--steps", 2, "--out"), tmp_path / "a.png"
    one_line(run(*what, out, "--scale", 64), "--scale 64: the PNG would have ", "and may have 10000")
    assert not out.exists()
    assert run(*what, out, "--scale", 1).exit_code == 0
    with Image.open(out) as made:
        document = json.loads(made.text["tminus"])  # type: ignore[attr-defined]
    out.write_bytes(with_text(json.dumps(document | {"scale": 64})))
    line = one_line(run("reproduce", out), f"{out}: scale 64: the PNG would have ")
    assert "--scale" not in line, "reproduce has no such option"


def test_an_image_is_made_again_and_what_differs_is_told(
    run: Run, drawn: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    result = run("reproduce", drawn)
    assert result.exit_code == 0, result.output
    assert f"{drawn}: the same {drawn.stat().st_size} bytes" in result.stdout

    other = make_checkpoint(seed=5)
    elsewhere, plain = saved(other, tmp_path / "other"), saved(make_checkpoint(classes=False), tmp_path / "no classes")
    one_line(run("reproduce", drawn, checkpoint=elsewhere), "made by other weights", other.weights_hash[:12])
    one_line(run("reproduce", drawn, checkpoint=plain), "class_label must be absent")

    def change(pixels: Any) -> None:
        pixels[3, 4] ^= 16

    drawn.write_bytes(altered(drawn.read_bytes(), change))
    again = tmp_path / "again.png"
    line = one_line(run("reproduce", drawn, "--out", again), str(drawn), "1 of 64 values differ, by 16 of 255 at most")
    assert "made by" not in line, "weights and build are the same"
    assert run("reproduce", again).exit_code == 0, "what it made is kept"


# --- what is no recipe ---


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
    "a byte of the pixels flipped": (NOISE[:-60] + bytes([NOISE[-60] ^ 255]) + NOISE[-59:], "not a PNG"),
    "a list": (with_text("[]"), "no recipe"),
    "unknown field": (with_text(hostile(__class__="os.system")), "no recipe"),
    "n of 10^9": (with_text(hostile(n=10**9)), "no recipe"),
    "n a fraction": (with_text(hostile(n=1.5)), "no recipe"),
    "NaN": (with_text(hostile(guidance=float("nan"))), "NaN is no number"),
    "a number beyond floats": (with_text(hostile(guidance=1).replace('"guidance": 1', '"guidance": 1e999')), "1e999"),
    "an escape in an error": (with_text(hostile(**{"\x1b[2J": 1})), r"\x1b[2J"),
    "a webp": (webp(), "not a PNG but a WEBP; only PNGs say how they were made"),
    "a huge one": (WHOLE[:16] + (2**15).to_bytes(4) * 2 + WHOLE[24:], "32768x32768 pixels, over 67108864"),
    "deep": (with_text('{"spec": ' + "[" * 5000 + "]" * 5000 + "}"), "no recipe"),
    "many digits": (with_text('{"spec": {"n": ' + "9" * 5000 + "}}"), "no recipe"),
    "a compressed bomb": (with_text(" " * 50_000_000, compressed=True), "not a PNG"),
    **{
        f"a scale of {scale}": (
            with_text(json.dumps(recipe(make_spec(), INFO) | {"scale": scale})),
            "scale must be 1..64",
        )
        for scale in (0, 65, -1, 1.5, "2", True, None)
    },
}


@pytest.mark.parametrize("name", NO_RECIPES)
def test_a_file_without_a_recipe_is_refused_before_a_model_is_loaded(run: Run, tmp_path: Path, name: str) -> None:
    png, says = NO_RECIPES[name]
    file = tmp_path / "hostile.png"
    file.write_bytes(png)
    one_line(run("reproduce", file, checkpoint=tmp_path), str(file), says)


def test_a_recipe_out_of_bounds_is_refused_as_a_request_would_be(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "hostile.png"
    file.write_bytes(with_text(hostile(steps=10**9)))
    one_line(run("reproduce", file), "steps must be an integer in 1..50")
    file.write_bytes(with_text(hostile(timestep_spacing="x" * 100_000)))
    one_line(run("reproduce", file), "timestep_spacing must be")


# --- a server ---


def test_the_server_is_asked_for_what_the_recipe_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What servers answer that they should not is in test_sample.py."""
    requests: list[httpx.Request] = []
    models: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/models":
            return httpx.Response(200, json={"models": models})
        requests.append(request)
        headers = {"X-Seed": "1", "X-Fingerprint": "0123456789abcdef", "Content-Type": "image/png"}
        return httpx.Response(200, content=NOISE, headers=headers)

    monkeypatch.setattr("tminus.service.client.Client", partial(Client, transport=httpx.MockTransport(answer)))
    file = tmp_path / "kept.png"
    file.write_bytes(NOISE)
    result = run("reproduce", file, "--url", "http://server:1/")
    assert result.exit_code == 0, result.output
    (request,) = requests
    assert request.url == "http://server:1/sample"
    assert request.headers["accept"] == "image/png"
    assert json.loads(request.content) == read_recipe(NOISE).parameters
    others = {"default": False, "state": "loaded", "url": "/models/student/"}
    models.append({"name": "student", "model": {"weights_hash": read_recipe(NOISE).weights}} | others)
    for options, path in (((), "/models/student/sample"), (("--model", "other"), "/models/other/sample")):
        assert run("reproduce", file, "--url", "http://server:1/", *options).exit_code == 0
        assert requests[-1].url.path == path
    file.write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8), recipe(make_spec(), INFO) | {"fingerprint": "\x1b[2J"}))
    one_line(run("reproduce", file, "--url", "http://server:1"), r"another build (\x1b[2J, here")


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


def test_an_edit_is_made_again_from_its_pictures_and_from_no_others(run: Run, edited: Path, drawn: Path) -> None:
    image, mask = edited.with_name("cat.png"), edited.with_name("mask.png")
    result = run("reproduce", edited, "--image", image, "--mask", mask)
    assert result.exit_code == 0, result.output
    recipe = read_recipe(edited.read_bytes())
    one_line(run("reproduce", edited), "--image", recipe.parameters["image_sha256"])
    one_line(run("reproduce", edited, "--image", image), "--mask")
    line = one_line(run("reproduce", edited, "--image", mask, "--mask", mask), "image_sha256")
    assert recipe.parameters["image_sha256"] in line
    one_line(run("reproduce", edited, "--image", image, "--mask", image), "mask_sha256")
    one_line(run("reproduce", edited, "--image", "nowhere.png", "--mask", mask), "nowhere.png")
    one_line(run("reproduce", drawn, "--image", image), "without an image")


def made(
    folder: Path,
    keep: Sequence[int] | None = None,
    dtype: TrajectoryType = "float32",
    precision: str = "auto",
    **parameters: Any,
) -> bytes:
    """A trajectory of the tiny checkpoint."""
    with torch_threads(None):
        options = LoadOptions(folder / "tiny", "cpu", "eager", precision)
        job = LocalJob.of(options, {"n": 1, "seed": 5, "steps": 4} | parameters)
    info = job.loaded.engine.info
    path = TrajectoryRecorder(job.spec, select_passes(keep, job.spec, info), dtype)
    pixels = job.run(path.record)
    return pack_trajectory(path.trajectory(), pixels, job.spec, info, recipe(job.spec, info))


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    """A file of each spec, made once."""
    return {name: made(folder, **parameters) for name, parameters in SPECS.items()}


@pytest.fixture
def check(run: Run, tmp_path: Path) -> Callable[..., Result]:
    def invoke(data: bytes, *options: str | Path, **kwargs: Any) -> Result:
        (tmp_path / "walk.safetensors").write_bytes(data)
        return run("trajectory", "check", tmp_path / "walk.safetensors", *options, **kwargs)

    return invoke


Check = Callable[..., Result]


def altered_trajectory(
    data: bytes,
    change: Callable[[dict[str, Any]], object] | None = None,
    *,
    spec: dict[str, object] | None = None,
    **document: object,
) -> bytes:
    """The same file with other arrays or other metadata. spec: other members of its spec."""
    file = read_trajectory(data)
    if spec is not None:
        document["spec"] = file.document["spec"] | spec
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


PARTS: dict[str, Any] = {"some passes": {"keep": [1, 3]}, "in half": {"keep": [0, 2], "dtype": "float16"}}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_file_of_some_passes_is_made_again_and_compared(check: Check, folder: Path, part: dict[str, Any]) -> None:
    data = made(folder, **part, **SPECS["ddpm"])
    result = check(data)
    assert result.exit_code == 0, result.output
    noisy = len([k for k in part["keep"] if k < 4])
    assert f"identical: x_t of 2 images at 2 of 5 steps, log p of the {noisy} that add noise" in result.stdout
    step = part["keep"][1]
    one_line(check(altered_trajectory(data, nudge("x_t", 2, 1, 0, 2, 3))), f"x_t differs first at step {step} of 5")
    one_line(check(altered_trajectory(data, keep=[0, 9])), "`keep` in its metadata must be one or more numbers")


def nudge(name: str, *at: int) -> Callable[[dict[str, Any]], object]:
    """Move a value by its last bits."""

    def change(arrays: dict[str, Any]) -> None:
        arrays[name][at] = np.nextafter(arrays[name][at], arrays[name].dtype.type(9))

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
        (nudge("x_0", 1, 0, 0, 4, 4), "x_0 differs first at step 2 of 5 (t = 30), image 0: 1 of 64 values"),
        (put("x_t", (2, 0, 0, 1, 1), np.nan), "x_t differs first at step 2 of 5 (t = 30), image 0: 1 of 64 values"),
        (put("log_p", (0, 1), -80.0), "log_p differs first at step 1 of 5, image 1: 1 of 1 values"),
        (put("s", (1, 0, 0, 0, 0), 0.5), "s differs first at [1, 0, 0, 0, 0]"),
        (put("images", (1, 3, 3, 0), 7), "images differs first at [1, 3, 3, 0]"),
        (lambda arrays: arrays.pop("mean"), "it has no mean"),
        (lambda arrays: arrays.update(log_p=arrays["log_p"].astype(np.float32)), "log_p is float32 (4, 2), and again"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_an_altered_value_is_named_by_array_step_and_image(
    files: dict[str, bytes], change: Callable[[dict[str, Any]], object], says: str
) -> None:
    again = read_trajectory(files["ddpm"]).arrays
    assert first_difference(read_trajectory(altered_trajectory(files["ddpm"])).arrays, again) is None
    found = first_difference(read_trajectory(altered_trajectory(files["ddpm"], change)).arrays, again)
    assert found is not None
    assert found.startswith(says)


@pytest.mark.parametrize(
    ("change", "spec", "says"),
    [
        (nudge("x_t", 3, 1, 0, 2, 3), {}, "x_t differs first at step 3 of 5 (t = 20), image 1: 1 of 64"),
        (None, {"seed": 6}, "x_t differs first in its first noise, image 0"),
        (None, {"steps": 40}, "x_t must be of shape (41, 2, 1, 8, 8), got (6,"),
        (None, {"steps": 10**9}, "steps must be"),
        (None, {"sampler": "ddim", "eta": 0.0}, "no step of its recipe adds noise (ddim)"),
    ],
    ids=["a value", "seed", "steps", "many steps", "no noise"],
)
def test_an_altered_file_is_told_with_exit_code_1(
    check: Check, files: dict[str, bytes], change: Any, spec: dict[str, object], says: str
) -> None:
    line = one_line(check(altered_trajectory(files["ddpm"], change, spec=spec)), says)
    assert ("the file was changed" in line) == ("differs" in says)


def test_a_file_of_other_weights_is_told(
    check: Check, files: dict[str, bytes], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    other = make_checkpoint(seed=5)
    result = check(files["ddpm"], checkpoint=saved(other, tmp_path / "other"))
    one_line(result, "made by other weights", other.weights_hash[:12])


def test_another_build_is_a_reason_for_a_difference_and_none_where_all_is_identical(
    check: Check, files: dict[str, bytes]
) -> None:
    elsewhere = {"fingerprint": "0" * 16, "made_by": {"executor": "openvino"}}
    result = check(altered_trajectory(files["ddpm"], **elsewhere))
    assert result.exit_code == 0, result.output
    nudged = altered_trajectory(files["ddpm"], nudge("x_t", 3, 1, 0, 2, 3), **elsewhere)
    line = one_line(check(nudged), "x_t differs first at step 3")
    assert "made by another build (0000000000000000, openvino in ?; here " in line
    assert "eager in float32)" in line


def test_it_is_run_as_servers_do_and_then_as_the_file_says_unless_another_way_is_given(
    check: Check, files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_executor, "available", lambda: False)  # which takes long to be measured
    result = check(files["ddpm"], executor=None)
    assert result.exit_code == 0, result.output
    lower = made(folder, precision="bfloat16", **SPECS["ddpm"])
    assert check(lower, executor=None).exit_code == 0
    one_line(check(lower, "--precision", "float32"), "made by another build", "eager in bfloat16; here")
    for made_by in ({"executor": "rm -rf", "precision": 5, "exact": "yes"}, 5):
        assert check(altered_trajectory(files["ddpm"], made_by=made_by), executor=None).exit_code == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-100], "not a trajectory, or truncated or damaged"),
        (lambda data: altered_trajectory(data, format=3), "of format 3, and this version of tminus reads 2"),
        (lambda data: altered_trajectory(data, keep="0,1"), "`keep` in its metadata must be a list of integers"),
        (lambda data: altered_trajectory(data, spec={"n": 10**9}), "no recipe"),
        (lambda data: altered_trajectory(data, spec={"x": 1}), "no recipe"),
    ],
    ids=["cut", "newer", "keep", "many", "unknown field"],
)
def test_what_cannot_be_checked_ends_in_one_clear_line_before_a_model_is_loaded(
    check: Check, files: dict[str, bytes], tmp_path: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    one_line(check(change(files["ddpm"]), checkpoint=tmp_path), "walk.safetensors", says)


def test_a_walk_from_a_picture_needs_that_picture(run: Run, check: Check, folder: Path, tmp_path: Path) -> None:
    result = run("sample", "--steps", "3", "--seed", "1", "--out", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
    picture = images.read_pictures(tmp_path / "cat.png", None)["image"]
    data = made(folder, steps=10, strength=0.5, image=picture)
    assert read_trajectory(data).arrays["x_t"].shape[0] == 6
    one_line(check(data), "it is an edit of another picture")
    result = check(data, "--image", tmp_path / "cat.png")
    assert result.exit_code == 0, result.output
