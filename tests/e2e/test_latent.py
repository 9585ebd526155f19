"""A latent model from pictures to images: trained, served, previewed, edited, killed and resumed."""

import concurrent.futures
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.e2e.conftest import RunningServer, pixels, png_of, run_cli, serving
from tests.e2e.restarting import Restarting, Start
from tests.e2e.test_train import ONE_THREAD, save_pictures
from tests.model.latent.folders import save_latent_pipeline
from tminus.service.images.trajectory import TRAJECTORY

TRAIN = ("--size", "16", "--batch-size", "8", "--warmup-steps", "2", "--precision", "fp32", "--steps", "6")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers writes it, of random weights; with classes."""
    folder = tmp_path_factory.mktemp("latent") / "pipeline"
    save_latent_pipeline(folder, "kl", classes=4, scaling_factor=0.7)
    (folder / "tminus.json").write_text(json.dumps({"class_names": ["a", "b", "c"], "null_class": 3}))
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    with serving(checkpoint, "--executor", "eager", "--result-cache-mb", "0") as running:
        yield running


@pytest.mark.long
def test_an_autoencoder_and_a_latent_model_are_trained_sampled_and_evaluated(tmp_path: Path) -> None:
    data = save_pictures(tmp_path / "data", 0)
    trained = run_cli(
        "train-autoencoder", "--data", str(data), "--out", str(tmp_path / "autoencoder"), *TRAIN,
        "--widths", "8,16", "--groups", "4", "--sheet-every", "6", **ONE_THREAD,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "autoencoder/sheets/0000006.png").is_file()
    run = tmp_path / "run"
    trained = run_cli(
        "train", "--data", str(data), "--latent", str(tmp_path / "autoencoder"), "--out", str(run), *TRAIN,
        "--widths", "8,16", "--attention-at", "4", "--groups", "4", "--head-dim", "8", "--timesteps", "50",
        "--sheet-every", "6", **ONE_THREAD,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert pixels((run / "sheets/0000006.png").read_bytes()).shape == (512, 512, 3), (
        "four images of 16 x 16 pixels, enlarged"
    )

    told = run_cli("inspect", str(run))
    assert "4x8x8, by AutoencoderKL" in told.stdout, told.stderr
    drawn = run_cli("sample", "--checkpoint", str(run), "-n", "2", "--steps", "5", "--out", str(tmp_path / "a.png"),
                    "--scale", "1")  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert pixels((tmp_path / "a.png").read_bytes()).shape == (16, 32, 3)
    judged = run_cli(
        "evaluate", "--checkpoint", str(run), "--data", str(data), "--test-data", str(save_pictures(tmp_path / "t", 1)),
        "--steps", "2", "--num-samples", "4", "--batch-size", "4", **ONE_THREAD,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    assert "real images through the autoencoder, PSNR (dB)" in judged.stdout


def test_what_is_served_is_told(server: RunningServer) -> None:
    told = httpx.get(f"{server.url}/model").json()
    assert told["latent"] == {
        "autoencoder": "AutoencoderKL", "channels": 3, "height": 8, "width": 8, "scaling_factor": 0.7,
    }  # fmt: skip
    assert (told["height_px"], told["width_px"], told["channels"], told["clip"]) == (16, 16, 3, False)
    refused = server.post(params={"clip": True, "steps": 2})
    assert (refused.status_code, refused.json()["field"]) == (422, "clip"), "latents have no range"


def test_images_alone_and_under_load_are_the_same_bytes(server: RunningServer) -> None:
    asked = [{"n": 1 + k % 3, "steps": 5 + k, "seed": k, "class_label": "abc"[k % 3]} for k in range(9)]
    alone = [server.post(params=params).content for params in asked]
    with server.client() as client, concurrent.futures.ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda params: client.post("/sample", params=params), asked))
    assert [answer.content for answer in together] == alone
    assert all("decode;dur=" in answer.headers["Server-Timing"] for answer in together)
    assert server.metric("tminus_autoencoder_duration_seconds_count") >= 2 * sum(p["n"] for p in asked)  # type: ignore[misc]


def test_a_trajectory_is_of_latents_and_has_the_decoded_images(server: RunningServer) -> None:
    params = {"n": 2, "steps": 6, "seed": 3, "sampler": "ddpm", "class_label": "a"}
    arrays = safetensors.numpy.load(server.post(params=params, headers={"Accept": TRAJECTORY}).content)
    assert arrays["x_t"].shape == (7, 2, 3, 8, 8)
    assert arrays["log_p"].shape == (5, 2)
    sheet = pixels(server.post(params=params).content)
    np.testing.assert_array_equal(np.concatenate(list(arrays["images"]), axis=1), sheet)


def test_an_image_is_varied_and_the_known_part_of_it_kept(server: RunningServer) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:7] = 255
    fields = {"steps": 6, "seed": 4}
    files = {"image": png_of(picture)}
    varied = httpx.post(f"{server.url}/sample", files=files, data=fields | {"strength": 0.5}, timeout=60)
    assert varied.status_code == 200, varied.text
    painted = httpx.post(f"{server.url}/sample", files=files | {"mask": png_of(mask)}, data=fields, timeout=60)
    np.testing.assert_array_equal(pixels(painted.content)[7:], picture[7:])
    noisy = httpx.post(f"{server.url}/noise", params={"t": 500, "seed": 1}, files=files, timeout=60)
    assert pixels(noisy.content).shape == (16, 16, 3)


@pytest.mark.long
def test_a_durable_job_survives_a_kill(
    own_server: Start, server: RunningServer, checkpoint: Path, tmp_path: Path
) -> None:
    restarting, asked = (
        Restarting(partial(own_server, "--executor", "eager", checkpoint=checkpoint), tmp_path),
        {"n": 2, "steps": 900, "seed": 8, "class_label": "a"},
    )
    restarting.server.slow_down()
    job = restarting.post(asked, "k")
    restarting.server.wait_until(lambda: restarting.get(f"/jobs/{job}").json()["step"] > 20)
    restarting.kill()
    restarting.start()
    assert restarting.wait_for(job)["state"] == "done"
    assert restarting.get(f"/jobs/{job}/image").content == server.post(json=asked).content
