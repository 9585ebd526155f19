"""Fine-tune a served model by policy gradients: DDPO with importance sampling (Black et al. 2023), by PPO's clip.

The server makes the rollouts, as trajectories with log p. Here log p is computed again with torch from the x_t in them,
and the reward is the probability that a small classifier gives one class. After each iteration the server reloads the
folder. docs/reinforcement.md says how to start it all.

    python docs/examples/ddpo.py --checkpoint runs/policy --classifier checkpoints/fashion-mnist-classifier
"""

import argparse
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.classifier import Classifier, load_classifier
from tminus.model.pixels import to_model_range
from tminus.model.weights import hash_weights
from tminus.service.client import Client
from tminus.service.images.trajectory import TRAJECTORY, read_trajectory


@dataclass(frozen=True)
class Rollout:
    """n images and the K transitions of each that add noise, as tensors."""

    images: Tensor  # uint8 [n, C, H, W]
    lines: Tensor  # [K, 8]: p, q, a, b, c, s, clip, r
    inputs: Tensor  # [K, 2]: what x is multiplied by on its way into the network, and the network's timestep
    x: Tensor  # [K, n, C, H, W]: where each transition begins
    x_next: Tensor  # and ends
    x0_before: Tensor  # what the network predicted in the pass before
    labels: Tensor  # [n]
    log_p: Tensor  # float64 [K, n]: as the server has it
    weights: str  # the hash of those that made it

    @classmethod
    def read(cls, data: bytes) -> "Rollout":
        """Read a trajectory. Raises ValueError for what is none, and where `log_p_of` would need more than `lines`."""
        file = read_trajectory(data)
        if "matrices" in file.arrays or file.arrays["lines"][:, 7].any():
            raise ValueError("log p of a table that looks back twice, or of a learned variance, is not computed here")
        arrays: Mapping[str, Tensor] = {name: torch.from_numpy(each) for name, each in file.arrays.items()}
        k, x_0 = arrays["passes"], arrays["x_0"].float()
        begin = torch.searchsorted(arrays["x_t_at"], k)  # the file may have only some passes; each has both its ends
        before = torch.searchsorted(arrays["x_0_at"], k - 1)  # x_0 of the pass before, if its factor c is not 0
        has_before = (arrays["x_0_at"][before] == k - 1).reshape(-1, 1, 1, 1, 1)
        return cls(
            images=arrays["images"].permute(0, 3, 1, 2),
            lines=arrays["lines"][k].float(),
            inputs=arrays["inputs"][k].float(),
            x=arrays["x_t"][begin].float(),
            x_next=arrays["x_t"][begin + 1].float(),
            x0_before=torch.where(has_before, x_0[before], 0.0),
            labels=arrays["class_labels"],
            log_p=arrays["log_p"],
            weights=file.document["weights"],
        )


def log_p_of(net: Denoiser, rollout: Rollout, k: Tensor, i: Tensor) -> Tensor:
    """log p(x_next | x) of transitions k [B] of images i [B], by this network: float64 [B], summed over pixels."""
    p, q, a, b, c, s, clip, _ = rollout.lines[k].reshape(-1, 8, 1, 1, 1).unbind(1)
    scale, t = rollout.inputs[k].unbind(1)
    x = rollout.x[k, i]
    out = net(scale.reshape(-1, 1, 1, 1) * x, t, rollout.labels[i])
    x0 = (p * x + q * out).clamp(-clip, clip)
    mean = a * x + b * x0 + c * rollout.x0_before[k, i]
    z = (rollout.x_next[k, i] - mean).double() / s.double()
    each: Tensor = -(z**2) / 2 - s.double().log() - math.log(2 * math.pi) / 2
    return each.sum((1, 2, 3))


def update(
    net: Denoiser, optimizer: torch.optim.Optimizer, rollout: Rollout, advantages: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Take optimizer steps over the transitions, in random order; returns what was seen on the way."""
    passes, n = rollout.log_p.shape
    order = torch.randperm(passes * n)[: math.ceil(options.share * passes * n)]
    clipped, first = [], None
    for batch in order.chunk(options.updates):
        optimizer.zero_grad(set_to_none=True)
        ratios = []
        for part in torch.split(batch, options.rows):  # as many as go through the network together
            k, i = part // n, part % n
            ratio = (log_p_of(net, rollout, k, i) - rollout.log_p[k, i]).exp()
            gain = advantages[i] * ratio
            bounded = advantages[i] * ratio.clamp(1 - options.clip, 1 + options.clip)
            (-torch.minimum(gain, bounded).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            ratios.append(ratio.detach())
        ratio = torch.cat(ratios)
        first = (ratio - 1).abs().max().item() if first is None else first
        clipped.append(((ratio - 1).abs() > options.clip).double().mean().item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), options.max_norm)
        optimizer.step()
    assert first is not None
    return {"off_1_at_first": first, "clipped": sum(clipped) / len(clipped)}


@torch.no_grad()
def reward_of(classifier: Classifier, images: Tensor, target: int) -> tuple[Tensor, float]:
    """The probability of the target class [n], and the share of images of which it is the likeliest."""
    probabilities = classifier.net(to_model_range(images)).softmax(1).double()
    return probabilities[:, target], (probabilities.argmax(1) == target).double().mean().item()


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the new weights; what was checked or measured of the old ones is left out."""
    net, made_by = checkpoint.net, {"trainer": "docs/examples/ddpo.py"}
    save_checkpoint(folder, net.state_dict(), net.config, checkpoint.noise, checkpoint.labels, made_by)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate rollouts on the server and updates here; returns a line for each iteration."""
    torch.manual_seed(options.seed)
    checkpoint, classifier = (
        load_checkpoint(options.checkpoint),
        load_classifier(options.classifier, device=torch.device("cpu")),
    )
    net, target = checkpoint.net, classifier.class_names.index(options.class_name)
    net.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, weight_decay=0)
    asked: dict[str, Any] = {"n": options.images, "steps": options.steps, "sampler": options.sampler}
    history: list[dict[str, Any]] = []
    with Client(options.url, model=options.model, key=os.environ.get("TMINUS_KEY"), patience_s=120) as tminus:
        for iteration in range(options.iterations + 1):  # the last only measures
            began = time.perf_counter()
            sampled = tminus.sample(accept=TRAJECTORY, seed=options.seed + iteration, **asked)
            rollout = Rollout.read(sampled.data)
            assert rollout.weights == hash_weights(net.state_dict()), "the server has other weights than the trainer"
            rewards, share = reward_of(classifier, rollout.images, target)
            line = {"iteration": iteration, "reward": rewards.mean().item(), "share": share}
            line["rollout_s"] = time.perf_counter() - began
            if iteration < options.iterations:
                advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
                line |= update(net, optimizer, rollout, advantages.clamp(-5, 5), options)
                line["update_s"] = time.perf_counter() - began - line["rollout_s"]
                save(options.checkpoint, checkpoint)
                tminus.reload_model(options.model)
                line["reload_s"] = time.perf_counter() - began - line["rollout_s"] - line["update_s"]
            history.append(
                {name: value if name == "iteration" else float(f"{value:.4g}") for name, value in line.items()}
            )
            print(json.dumps(history[-1]), flush=True)
    return history


def plot(history: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Draw reward and share by iteration."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for name, label in (("reward", "reward: mean probability"), ("share", "share of images")):
        axes.plot([line["iteration"] for line in history], [line[name] for line in history], ".-", label=label)
    axes.set(xlabel="iteration", ylabel=options.class_name, ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.savefig(options.plot, metadata={"Date": None} if options.plot.suffix == ".svg" else None)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a served model by policy gradients.")
    parser.add_argument("--url", default="http://localhost:8000", help="the server")
    parser.add_argument("--model", default="policy", help="the model of the server, whose folder is --checkpoint")
    parser.add_argument("--checkpoint", type=Path, required=True, help="this folder gets the new weights")
    parser.add_argument("--classifier", type=Path, required=True, help="of the reward; `tminus evaluate` trains one")
    parser.add_argument("--class-name", default="trouser", help="the class that is rewarded")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--images", type=int, default=32, help="of a rollout")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="ddpm", help="one whose steps add noise")
    parser.add_argument("--share", type=float, default=0.5, help="of the transitions, that are learned from")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps for each rollout")
    parser.add_argument("--rows", type=int, default=16, help="transitions that go through the network together")
    parser.add_argument("--clip", type=float, default=0.2, help="how far from 1 a ratio still counts")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-norm", type=float, default=1.0, help="of the gradient")
    parser.add_argument("--seed", type=int, default=1000, help="of the first rollout; each has the next one")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--plot", type=Path, help="draw the rewards here, as SVG or PNG; needs matplotlib")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parsed = parse()
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    made = run(parsed)
    if parsed.plot is not None:
        plot(made, parsed)
