"""The commands and programs of README.md and of pages of docs/, as printed, against servers of the bundled model.

Those of docs/clients.md are in test_examples.py, of docs/webhooks.md in test_webhooks.py.
"""

import base64
import json
import re
import signal
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from tests.documents import ROOT, code_blocks, run_python, run_shell, shell_commands
from tests.e2e.conftest import BUNDLED, BUNDLED_THREADS, RunningServer, SlowDown, pixels, stop_server
from tests.model.latent.folders import save_latent_pipeline
from tests.service.keys import key_line
from tests.tools import needs
from tminus.model.rng import image_noise

HOME = "~/.local/state/tminus"
BOOT = {"sampler": "tuned", "steps": 8, "seed": 7, "class_label": "ankle-boot"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run commands in, which has what they read of the repository."""
    made = tmp_path_factory.mktemp("repository")
    for name in ("docs", "checkpoints"):
        (made / name).symlink_to(ROOT / name)
    return made


def run_commands(server: RunningServer, folder: Path, page: str, beginning: str) -> list[str]:
    """Run the commands of a page that begin so, against our server; what each printed."""
    commands = [command for command in shell_commands(page) if command.startswith(beginning)]
    # A thousand steps take too long here, and are steps like any other.
    same = {"OMP_NUM_THREADS": BUNDLED_THREADS}
    return [run_shell(command.replace("steps=1000", "steps=10"), folder, server.url, **same) for command in commands]


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def frames(file: Path) -> int:
    with Image.open(file) as image:
        return int(image.n_frames)  # type: ignore[attr-defined]


def test_the_requests_of_the_readme_are_answered_and_an_image_is_made_again_to_the_byte(
    bundled_server: RunningServer, folder: Path
) -> None:
    assert run_commands(bundled_server, folder, "README.md", "curl")
    assert run_commands(bundled_server, folder, "docs/troubleshooting.md", "curl")
    assert size(folder / "out.png") == (128, 64), "eight images"
    assert size(folder / "sneaker.png") == (32, 32)
    with zipfile.ZipFile(folder / "sneakers.zip") as archive:
        assert archive.namelist() == [f"{k:05}.png" for k in range(4)]
    assert size(folder / "boots.png") == (64, 64), "four images"
    assert (size(folder / "bags.webp"), frames(folder / "bags.webp")) == ((64, 64), 8)
    run_python(code_blocks("README.md", "python")[1], folder, bundled_server.url)
    assert size(folder / "sneakers.png") == (64, 64), "four images"
    here, there = run_commands(bundled_server, folder, "docs/determinism.md", ".venv/bin/tminus")
    assert here
    assert there


def test_a_folder_that_diffusers_saved_as_the_readme_does_is_served(
    own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    save, *_ = code_blocks("README.md", "python")
    run_python(save, tmp_path)
    server = own_server(checkpoint=tmp_path / "ddpm", TMINUS_EXECUTOR="eager")
    made = server.post(json={"n": 4, "steps": 2}).content
    assert pixels(made).shape == (64, 64, 3), "four images in colour"


def test_the_requests_of_the_api_page_are_answered(bundled_server: RunningServer, folder: Path) -> None:
    run_commands(bundled_server, folder, "docs/api.md", "curl")
    assert (folder / "three.zip").read_bytes().startswith(b"PK")
    assert size(folder / "third.png") == (32, 32)


def test_the_calls_of_the_page_of_edits_keep_what_they_should(bundled_server: RunningServer, folder: Path) -> None:
    keep = ~pixels((folder / "docs" / "images" / "upper-half.png").read_bytes())
    fillings = folder / "fillings.png"
    for language in ("sh", "python"):
        for code in code_blocks("docs/editing.md", language):
            run = run_shell if language == "sh" else run_python
            run(code, folder, bundled_server.url)
        original, sheet = (pixels((folder / name).read_bytes()) for name in ("sneaker.png", "fillings.png"))
        sheet = sheet[:: len(sheet) // 64, :: len(sheet) // 64]  # the command enlarges it
        for corner in (sheet[:32, :32], sheet[:32, -32:], sheet[-32:, :32], sheet[-32:, -32:]):
            np.testing.assert_array_equal(corner[keep], original[keep])
        fillings.unlink()
    assert {"varied.png", "way.webp"} <= {file.name for file in folder.iterdir()}


def test_the_calls_of_the_page_of_noise_make_more_and_more_of_it(bundled_server: RunningServer, tmp_path: Path) -> None:
    (commands,), (program,) = (code_blocks("docs/forward-process.md", language) for language in ("sh", "python"))
    run_shell(commands, tmp_path, bundled_server.url)
    assert len(run_python(program, tmp_path, bundled_server.url).splitlines()) == 5
    assert (tmp_path / "the_same.png").read_bytes() == (tmp_path / "x_500.png").read_bytes()
    pictures = [pixels((tmp_path / f"x_{t:03d}.png").read_bytes()).astype(float) for t in (0, 100, 250, 500, 999)]
    roughness = [np.abs(np.diff(picture)).mean() for picture in pictures]
    assert roughness == sorted(roughness)


def test_the_example_of_the_page_of_streams_keeps_each_frame(
    server: RunningServer, tmp_path: Path, slow_down: SlowDown
) -> None:
    slow_down(server, between_ticks_s=0.03)  # or frames are dropped
    (program,) = code_blocks("docs/streaming.md", "python")
    run_shell(*code_blocks("docs/streaming.md", "sh"), tmp_path, server.url)
    with server.client() as client:
        assert frames(tmp_path / "bags.webp") == client.get("/model").json()["recommended"]["steps"]
    assert json.loads((tmp_path / "way.json").read_text())["frames"][0]["step"] == 0
    assert len(run_python(program, tmp_path, server.url).splitlines()) == 2 + 2 * 4
    names = {f"{show}-{step:04d}.png" for show in ("x_t", "x_0") for step in (40, 80, 120, 160)}
    assert {file.name for file in tmp_path.iterdir()} == {"out.png", "bags.webp", "way.json", *names}


def test_other_clients_are_given_a_boot_and_make_a_sneaker_of_it(bundled_server: RunningServer, tmp_path: Path) -> None:
    ask, edit, tensors = code_blocks("docs/other-clients.md", "python")
    curl, numbers = code_blocks("docs/other-clients.md", "sh")
    boot, wanted = tmp_path / "boot.png", bundled_server.post(json=BOOT).content
    run_shell(curl, tmp_path, bundled_server.url)
    assert boot.read_bytes() == wanted
    for program in (ask, edit):
        boot.unlink()
        run_python(program, tmp_path, bundled_server.url)
    np.testing.assert_array_equal(pixels(boot.read_bytes()), pixels(wanted))
    picture = base64.b64encode(boot.read_bytes()).decode()
    sneaker = BOOT | {"strength": 0.6, "seed": 11, "class_label": "sneaker", "image": picture}
    made = (tmp_path / "sneaker.png").read_bytes()
    np.testing.assert_array_equal(pixels(made), pixels(bundled_server.post(json=sneaker).content))
    run_python(tensors, tmp_path, bundled_server.url)
    second = bundled_server.post(json=BOOT | {"index": 1}).content
    np.testing.assert_array_equal(pixels(boot.read_bytes()), pixels(second))
    run_shell(numbers, tmp_path, bundled_server.url)
    (images,) = json.loads((tmp_path / "answer.json").read_text())["outputs"]
    assert (images["shape"], len(images["data"])) == ([2, 32, 32, 1], 2 * 32 * 32)


def test_the_examples_of_openais_api_run(server: RunningServer, tmp_path: Path) -> None:
    same = {"seed": 7, "sampler": "dpmpp_2m", "guidance": 1.5, "steps": 20}
    images, stream = code_blocks("docs/openai.md", "python")
    (edit,) = code_blocks("docs/openai.md", "sh", section="Edits")
    said = run_python(images, tmp_path, server.url)
    assert said.splitlines()[2] == "sneaker dpmpp_2m 20 1.5 7 2"
    sneaker = server.post(json=same | {"class_label": "sneaker", "index": 2}).content
    assert (tmp_path / "sneaker-2.png").read_bytes() == sneaker
    said = run_python(stream, tmp_path, server.url)
    assert said.split() == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert (tmp_path / "bag.png").read_bytes() == server.post(json=same | {"class_label": "bag"}).content
    assert sorted(each.name for each in tmp_path.glob("bag-*.png")) == ["bag-0.png", "bag-1.png", "bag-2.png"]
    run_shell(edit, tmp_path, server.url)
    assert json.loads((tmp_path / "boot.json").read_text())["data"][0]["revised_prompt"] == "ankle-boot"


def test_pipelines_of_diffusers_are_served_and_make_the_same_images_of_the_servers_noise(
    own_server: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, compare = code_blocks("docs/diffusers.md", "python")
    run_python(save, tmp_path)
    folder = tmp_path / "runs" / "pipeline"
    net = UNet2DModel.from_pretrained(folder, subfolder="unet", num_class_embeds=None)
    plain = DDPMPipeline(net, DDPMScheduler())
    plain.save_pretrained(tmp_path / "plain")
    plain.set_progress_bar_config(disable=True)
    latent = save_latent_pipeline(tmp_path / "latent", scaling_factor=0.7)
    others = [f"--checkpoint={name}={tmp_path / name}" for name in ("plain", "latent")]
    server = own_server("--executor", "eager", *others, checkpoint=folder)

    assert float(run_python(compare, tmp_path, server.url)) < 0.001
    for name, pipeline, sampler in (("plain", plain, "ddpm"), ("latent", latent, "ddim")):
        side = pipeline.unet.config.sample_size
        draws = (image_noise(5, range(2), draw, (3, side, side), torch.device("cpu")) for draw in range(9))
        for part in (pipeline, pipeline.scheduler):
            monkeypatch.setattr(f"{type(part).__module__}.randn_tensor", lambda *_a, d=draws, **_k: next(d))
        theirs = pipeline(batch_size=2, num_inference_steps=8, output_type="np").images
        asked = {"n": 2, "steps": 8, "seed": 5, "sampler": sampler}
        answer = httpx.post(f"{server.url}/models/{name}/sample", json=asked, timeout=60)
        sheet = np.concatenate(np.round(theirs * 255), axis=1)
        assert theirs.std() > 0.05
        assert abs(pixels(answer.content) - sheet).max() <= 1
    refused = httpx.post(f"{server.url}/sample", json={"num_inference_steps": 8}).json()
    assert refused["field"] == "num_inference_steps"


@pytest.mark.long
def test_the_commands_of_the_command_line_page_do_what_it_says(
    own_server: Callable[..., RunningServer], small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMINUS_KEYS", key_line("ops", "tm_of_the_page", "admin"))
    monkeypatch.setenv("TMINUS_OPEN", "yes")
    monkeypatch.setenv("TMINUS_KEY", "tm_of_the_page")
    server = own_server("--checkpoint", f"colour={small}", checkpoint=BUNDLED)
    written = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    (folder / "command-line.md").write_text(written.replace("\ntminus ", "\n.venv/bin/tminus "), "utf-8")
    page = shell_commands(folder / "command-line.md")
    sample, *samples = (command for command in page if command.startswith(".venv/bin/tminus sample"))
    run_shell(sample, folder)
    server.slow_down(0.03)  # or few frames are seen
    for command in samples:
        # One has loaded the bundled model, which takes longer.
        run_shell(command if "--url" in command else f"{command} --checkpoint {small}", folder, server.url)
    server.speed_up()
    models = [command for command in page if command.startswith(".venv/bin/tminus models")]
    commands = [command if "--url" in command else f"{command} --url {server.url}" for command in models]
    listed, *changed, as_json = (run_shell(command, folder, server.url) for command in commands)
    assert [line.split()[0] for line in listed.splitlines()] == ["NAME", "fashion-mnist-32", "colour"]
    assert changed == ["colour: unloaded\n", "colour: loaded\n", "colour: reloaded\n"]
    assert [each["name"] for each in json.loads(as_json)["models"]] == ["fashion-mnist-32", "colour"]
    assert size(folder / "out.png") == (8 * 64, 8 * 64), "four images, enlarged"
    assert size(folder / "bags.png") == (6 * 160, 6 * 64), "ten images, enlarged"
    assert size(folder / "sneaker.png") == (32, 32)
    assert len(list((folder / "images").glob("*.png"))) == 10
    assert size(folder / "varied.png") == (32, 32)
    assert frames(folder / "way.webp") > 50


def wait_for_job(server: RunningServer, job_id: str) -> bytes:
    """The images of a durable job, when it is done."""
    with server.client() as client:
        server.wait_until(lambda: client.get(f"/jobs/{job_id}").json()["state"] == "done")
        return client.get(f"/jobs/{job_id}/image").content


@pytest.mark.long
def test_the_tutorial_goes_through_in_order(
    own_server: Callable[..., RunningServer], folder: Path, tmp_path: Path
) -> None:
    _, train, serve, sample, watch, again, job, fetch = code_blocks("docs/tutorial.md", "sh")
    train = re.sub(r"--(steps|save-every|sheet-every) \d+", r"--\1 2", train)
    small = train.replace("--widths 16,32,64", "--widths 8,16,32 --batch-size 8 --precision fp32")
    assert small != train
    run_shell(small, folder)
    assert size(folder / "runs" / "tutorial" / "sheets" / "0000002.png") == (6 * 160, 6 * 128), "twenty, enlarged"
    checkpoint = folder / serve.split()[-1]
    env = {"TMINUS_STATE_DIR": str(tmp_path), "TMINUS_EXECUTOR": "eager"}  # or each is tried for the new network
    first = own_server(checkpoint=checkpoint, **env)
    run_shell(sample, folder, first.url)
    assert size(folder / "sneakers.png") == (64, 64), "four images"
    run_shell(watch, folder, first.url)
    assert "same" in run_shell(again, folder, first.url)
    first.slow_down()
    run_shell(job.replace('"steps": 1000', '"steps": 40'), folder, first.url)
    assert stop_server(first) == 0
    second = own_server(checkpoint=checkpoint, **env)
    second.wait_until(lambda: "goes on from step" in second.log)
    wait_for_job(second, json.loads((folder / "job.json").read_text())["id"])
    run_shell(fetch, folder, second.url)
    assert size(folder / "eight.png") == (128, 64), "eight images"


@pytest.mark.long
def test_a_backup_of_a_running_server_is_restored_and_its_job_ends_in_the_same_bytes(
    own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    copy, restore = code_blocks("docs/operations.md", "sh", section="Back up")
    state = tmp_path / "state"
    server, other = own_server(TMINUS_STATE_DIR=str(state)), own_server(TMINUS_STATE_DIR=str(tmp_path / "another"))
    server.slow_down()
    with server.client() as client:
        job_id = client.post("/jobs", json={"n": 6, "steps": 1000, "seed": 7}).json()["id"]
        server.wait_until(lambda: server.metric("tminus_snapshots_total") > 0)
        (file,) = state.glob("*.sqlite3")
        backup = [needs("sqlite3"), file, ".backup copy"]
        refused = subprocess.run(backup, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "database is locked" in refused.stderr
        # As in a terminal: find fails for processes that end while it looks.
        stopped = run_shell(f"set +o pipefail\n{copy}echo $PID".replace(HOME, str(state)), tmp_path)
        assert stopped == f"{server.process.pid}\n", f"and not {other.process.pid}, another server"
        assert client.get(f"/jobs/{job_id}").json()["state"] == "running", "it goes on"
    server.speed_up()
    expected = wait_for_job(server, job_id)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(30)
    run_shell(restore.replace(HOME, str(state)), tmp_path)
    restored = own_server(TMINUS_STATE_DIR=str(state))
    restored.wait_until(lambda: f"job {job_id} goes on from step" in restored.log)
    assert wait_for_job(restored, job_id) == expected
