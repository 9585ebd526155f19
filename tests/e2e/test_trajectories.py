"""Trajectories of a real server: the same bytes under load, checked again by the command, and trained on."""

import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.documents import ROOT
from tests.e2e.conftest import ADMIN_KEY, KEYS, RunningServer, pixels, run_cli, serving
from tests.service.images.test_trajectory import packed
from tests.tiny import randomize
from tminus.model.checkpoint import load_checkpoint
from tminus.model.evaluation.classifier import Classifier, ClassifierConfig, ClassifierNet, save_classifier
from tminus.service.client.results import MediaType

TRAJECTORY: MediaType = "application/vnd.tminus.trajectory"


def walked(server: RunningServer, spec: dict[str, Any]) -> bytes:
    with server.api() as tminus:
        return tminus.sample(accept=TRAJECTORY, **spec).data


def test_a_trajectory_ends_in_the_image_of_the_other_answers_and_the_command_makes_it_again(
    server: RunningServer, small: Path, tmp_path: Path
) -> None:
    spec = {"n": 2, "steps": 15, "sampler": "dpmpp_2m_sde", "seed": 10, "guidance": 3.0, "class_label": 1}
    file = tmp_path / "walk.safetensors"
    file.write_bytes(walked(server, spec | {"guidance_interval": (100, 600)}))
    arrays = safetensors.numpy.load(file.read_bytes())
    with server.api() as tminus:
        pngs = tminus.sample(accept="application/zip", **spec, guidance_interval=(100, 600)).pngs
    for image, x, png in zip(arrays["images"], arrays["x_t"][-1], pngs, strict=True):
        np.testing.assert_array_equal(image[:, :, 0], pixels(png))
        np.testing.assert_allclose((x[0] + 1) * 127.5, image[:, :, 0], atol=0.51)
    done = run_cli("trajectory", "check", str(file), "--checkpoint", str(small), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "identical: x_t of 2 images at 15 steps, log p of the 14 that add noise" in done.stdout


# --- docs/examples/ddpo.py ---


@pytest.fixture
def policy(small: Path, tmp_path: Path) -> Iterator[tuple[RunningServer, Path]]:
    """A server of a folder of its own, whose model may be changed."""
    folder = tmp_path / "policy"
    shutil.copytree(small, folder)
    with serving(Path(f"policy={folder}"), "--precision", "float32", **KEYS) as running:
        yield running, folder


def test_the_example_refuses_files_whose_log_p_needs_more_than_lines() -> None:
    read = runpy.run_path(str(ROOT / "docs" / "examples" / "ddpo.py"))["Rollout"].read
    whole, part = read(packed()), read(packed(keep=[1, 2]))
    assert whole.log_p.shape == (3, 2)
    for name in ("x", "x_next", "log_p", "lines", "inputs"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:]), name
    arrays = safetensors.numpy.load(packed())
    metadata = {"tminus": '{"format": 2, "weights": ""}'}
    learned = arrays["lines"] + np.eye(8)[7]
    for more in ({"matrices": np.zeros((4, 2, 5))}, {"lines": learned}):
        with pytest.raises(ValueError, match="is not computed here"):
            read(safetensors.numpy.save(arrays | more, metadata))


def test_the_example_trains_on_the_servers_log_p_and_the_server_takes_the_weights(
    policy: tuple[RunningServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, folder = policy
    torch.manual_seed(0)
    config = ClassifierConfig(1, (32, 32), 3, widths=(4, 4, 4), feature_dim=4)
    net = ClassifierNet(config)
    randomize(net)
    save_classifier(tmp_path / "judge", Classifier(net.eval(), config, ("a", "b", "c"), 0.5, "0" * 64))
    before = load_checkpoint(folder).weights_hash
    monkeypatch.setenv("TMINUS_KEY", ADMIN_KEY)
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "ddpo.py"))
    flags = ["--url", server.url, "--checkpoint", str(folder), "--classifier", str(tmp_path / "judge")]
    flags += ["--class-name", "b", "--iterations", "2", "--images", "4", "--steps", "5", "--updates", "2"]
    history = example["run"](example["parse"]([*flags, "--learning-rate", "1e-3"]))
    assert [line["iteration"] for line in history] == [0, 1, 2]
    for line in history[:2]:
        assert line["off_1_at_first"] < 2e-3, "log p computed again is that of the server"
    after = load_checkpoint(folder).weights_hash
    assert after != before
    with server.api() as tminus:
        assert tminus.model()["weights_hash"] == after


def is_guided(t: float, interval: Any) -> bool:
    return interval is None or interval[0] <= t <= interval[1]


@pytest.mark.parametrize(
    "more",
    [
        {"sampler": "ddpm", "guidance": 4.0, "guidance_rescale": 0.6, "clip": False},
        {"sampler": "dpmpp_2m_sde", "guidance": 3.0, "guidance_interval": (100, 600), "guidance_rescale": 1.0},
        {"sampler": "ddim", "eta": 0.5, "guidance": 0.0, "seed": 3, "to_seed": 5, "mix": 0.4},
    ],
)
def test_a_guided_step_is_what_the_docs_say(server: RunningServer, small: Path, more: dict[str, Any]) -> None:
    """The formulas of docs/reinforcement.md, with the network in float64."""
    spec = {"n": 2, "steps": 8, "seed": 4, "class_label": ["bag", "sneaker"]} | more
    file = safetensors.numpy.load(walked(server, spec))
    checkpoint = load_checkpoint(small)
    net = checkpoint.net.double()
    x_t, x_0, t = (torch.from_numpy(file[name]).double() for name in ("x_t", "x_0", "timesteps"))
    labels = torch.from_numpy(file["class_labels"])
    null = torch.full_like(labels, checkpoint.labels.null_class)
    for j, k in enumerate(file["passes"]):
        p, q, a, b, c, s, clip, _ = file["lines"][k]
        scale, shown_t = file["inputs"][k]
        with torch.no_grad():
            out_c, out_u = (net(scale * x_t[k], torch.full((2,), shown_t), which) for which in (labels, null))
        out = out_c
        if is_guided(float(t[k]), spec.get("guidance_interval")):
            out = out_u + spec["guidance"] * (out_c - out_u)
            spread = out_c.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)
            share = spec.get("guidance_rescale", 0.0)
            out = out * (share * spread + 1 - share)
        guess = (p * x_t[k] + q * out).clamp(-clip, clip)
        mean = a * x_t[k] + b * guess + c * (x_0[k - 1] if k else 0)
        np.testing.assert_allclose(file["mean"][j], mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))
        log_p = torch.distributions.Normal(mean, s).log_prob(x_t[k + 1]).sum((1, 2, 3))
        np.testing.assert_allclose(file["log_p"][j], log_p, rtol=0, atol=1e-3 * mean[0].numel())
