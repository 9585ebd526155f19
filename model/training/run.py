"""A run: a folder with a checkpoint of the averaged weights (EMA), and the state for exact resumption.

All training commands share the training loop, the saved state, the signal handling and the progress display.
"""

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tminus.model.denoiser import Denoiser
from tminus.model.files import write_atomically, write_text
from tminus.model.machine import threads_left
from tminus.model.training.config import RunConfig
from tminus.model.training.curve import LossCurve, loss_svg
from tminus.model.training.data import listed

log = logging.getLogger(__name__)

STATE_FILE = "training-state.safetensors"
PARTS = ("net", "ema", "remembered")
LOSS_FILE = "loss.svg"
FIRST_LINE, LINE_EVERY = 10, 100  # step of the first log line, and steps between further lines, if there is no terminal
TIMED_PASSES = 3  # passes timed in each precision; the fastest counts
Config = TypeVar("Config", bound=RunConfig)
Net = TypeVar("Net", bound=nn.Module)
FREE_TO_CHANGE = ("steps", "save_every", "sheet_every", "compile", "learning_rate", "decay_fraction", "threads")


class Ema:
    """Averaged weights in float32. The decay starts low, so that the initial weights are soon forgotten."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move the average towards the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = net.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [state[k] for k in self.shadow], 1 - decay)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Load a saved average. Raises ValueError if the keys differ."""
        if shadow.keys() != self.shadow.keys():
            raise ValueError("the saved average belongs to another network")
        for key, value in shadow.items():
            self.shadow[key].copy_(value)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run atomically. PARTS and `optimizer` are state dicts; the rest becomes JSON."""
    moments = state["optimizer"]["state"]
    tensors: dict[str, Tensor] = {
        **{f"{part}.{key}": value for part in PARTS for key, value in state[part].items()},
        **{f"optimizer.{index}.{key}": value for index in moments for key, value in moments[index].items()},
    }
    rest = {key: value for key, value in state.items() if key not in (*PARTS, "optimizer")}
    rest["param_groups"] = state["optimizer"]["param_groups"]
    # Keep the memory layout, because the optimiser's kernel processes weights and moments in memory order.
    rest["channels_last"] = [key for key, value in tensors.items() if not value.is_contiguous()]
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    head = {"format": "pt", "state": json.dumps(rest)}
    write_atomically(folder / STATE_FILE, lambda path: save_file(tensors, path, metadata=head))


def read_state(folder: Path) -> dict[str, Any]:
    """Load the state of a run onto the CPU. A damaged file can raise many kinds of errors."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*PARTS, "optimizer")}
    with safe_open(folder / STATE_FILE, framework="pt") as opened:
        state: dict[str, Any] = json.loads(opened.metadata()["state"])
        channels_last = set(state.pop("channels_last"))
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            part, _, key = name.partition(".")
            value = opened.get_tensor(name)
            parts[part][key] = value.to(memory_format=torch.channels_last) if name in channels_last else value
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    optimizer = {"state": moments, "param_groups": state.pop("param_groups")}
    return {**state, **parts, "optimizer": optimizer}


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the run saved in a folder; {} if there is none or its file is damaged."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as opened:  # does not read tensors
            return dict(json.loads(opened.metadata()["state"])["config"])
    except Exception:  # Resuming the run will report the error.
        return {}


class TrainError(ValueError):
    """Raised if a run cannot start or continue. The message gives the reason."""


class Run:
    """A run's folder and state: the weights, their average, the optimiser's moments and the step."""

    net: nn.Module
    ema: Ema

    def __init__(self, folder: Path, command: str, origin: str | None) -> None:
        """Only `command` may resume the run. `origin` is the checkpoint that a new run starts from."""
        self.folder, self.command, self.origin, self.step = folder, command, origin, 0
        self.curve = LossCurve()
        self._received: list[int] = []
        self.begun = (folder / STATE_FILE).is_file()

    def begin(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        identity: Mapping[str, Any],
        device: torch.device,
        forward: Callable[[], Tensor],
        remembered: nn.Module | None = None,
    ) -> Config:
        """Start a new run or load the saved state, and prepare the network for training.

        `identity` holds values that must stay the same when the run is resumed, in addition to the config. `forward`
        runs the network on a batch, to time the precisions. `remembered` is a module whose state is saved too, such as
        a teacher. Returns the config with the precision and the number of threads that the run uses. Raises TrainError.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.net, self.optimizer, self.remembered, self.identity = net, optimizer, remembered, identity
        self.ema = Ema(net, config.ema_decay)
        if self.begun:
            config = self._resume(config)
        net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        config = take_threads(config, device)
        if config.precision == "auto":  # A resumed run keeps the choice.
            config = dataclasses.replace(config, precision=faster_of(net, forward, device))
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        log.info("%s: step %d of %d, %s, %s", self.folder, self.step, config.steps, device, config.precision)
        return config

    def interrupted(self) -> bool:
        """Return whether SIGINT or SIGTERM was received."""
        return bool(self._received)

    def descend(
        self,
        config: RunConfig,
        loss_of: Callable[[int], Tensor | None],
        save: Callable[[], None],
        look: Callable[[], None],
    ) -> bool:
        """Take the remaining steps. Returns whether all steps are done.

        All random numbers of a step are seeded by (seed, step). `loss_of` returns the loss of a step, or None if it was
        interrupted. `save` writes the checkpoint of the averaged weights. `look` shows and measures the averaged
        network. Each save and look also redraws the loss curve.

        On SIGTERM or SIGINT, finishes the current step and saves. After SIGINT, also raises KeyboardInterrupt if steps
        are left, to stop a calling script.
        """

        def note(signum: int, _frame: object) -> None:
            self._received.append(signum)

        previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
        began_at = self.step
        try:
            with tqdm(
                total=config.steps, initial=began_at, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None
            ) as bar:
                progress = Progress(config, bar, self.curve)
                while self.step < config.steps and not self.interrupted():
                    started = time.perf_counter()
                    torch.manual_seed(step_seed(config.seed, self.step))
                    loss = loss_of(self.step)
                    if loss is None:
                        break
                    grad_norm = self._step_down(loss, config)
                    seconds = time.perf_counter() - started
                    progress.show(self.step, loss, grad_norm, seconds, last=self.interrupted())
                    if self.step % config.save_every == 0 and self.step < config.steps:
                        save()
                        self.save(config)
                    if config.looks_at(self.step) and self.step < config.steps:
                        self.draw_losses()
                        look()
                save()
                self.save(config)
                if began_at < self.step == config.steps:  # after the save, so that an error loses no steps
                    look()
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        done = self.step >= config.steps
        if signal.SIGINT in self._received and not done:
            raise KeyboardInterrupt("interrupted and saved; the same command goes on")
        return done

    def _step_down(self, loss: Tensor, config: RunConfig) -> Tensor:
        """Take one optimiser step and update the average. Returns the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.net, self.step)
        self.step += 1
        return grad_norm

    def provenance(self, config: RunConfig, **origins: str | None) -> dict[str, Any]:
        seen = {"step": self.step, "images_seen": self.step * config.batch_size, "config": dataclasses.asdict(config)}
        return {"trained_by": f"tminus {self.command}", **origins, **seen}

    def save(self, config: RunConfig) -> None:
        """Write the state file atomically, and redraw the loss curve."""
        state = {
            "command": self.command,
            "step": self.step,
            "init_from": self.origin,
            "identity": dict(self.identity),
            "net": self.net.state_dict(),
            "ema": self.ema.shadow,
            "optimizer": self.optimizer.state_dict(),
            "remembered": self.remembered.state_dict() if self.remembered is not None else {},
            "config": dataclasses.asdict(config),
            "losses": self.curve.state(),
        }
        write_state(self.folder, state)
        self.draw_losses()

    def draw_losses(self) -> None:
        if len(self.curve.points) > 1:
            write_text(self.folder / LOSS_FILE, loss_svg(self.curve.points, self.folder.resolve().name))

    def _resume(self, config: Config) -> Config:
        """Load the saved state. Returns the config with the run's precision and threads. Raises TrainError."""
        folder = self.folder
        try:
            state = read_state(folder)
            began = state["command"]
            if began != self.command:
                raise TrainError(
                    f"{folder}: holds a run of tminus {began}, which tminus {self.command} cannot go on with"
                )
            was = {**state["config"], **state["identity"]}
            if config.precision == "auto":
                config = dataclasses.replace(config, precision=was["precision"])
            if config.threads == 0 and was["threads"] <= torch.get_num_threads():  # unless this machine has fewer
                config = dataclasses.replace(config, threads=was["threads"])
            # A round trip through JSON turns tuples into lists, as in the saved values.
            now = json.loads(json.dumps({**dataclasses.asdict(config), **self.identity}))
            usual = {each.name: each.default for each in dataclasses.fields(config)}  # for files from older versions
            for field in sorted(now.keys() - FREE_TO_CHANGE):
                begun = was.get(field, usual.get(field))
                if begun != now[field]:
                    differs = f"this run was begun with {field}={_quoted(begun)}, got {_quoted(now[field])}"
                    raise TrainError(f"{folder}: {differs}; choose another folder to begin anew")
            self.net.load_state_dict(state["net"])
            self.ema.load(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.remembered is not None:
                self.remembered.load_state_dict(state["remembered"])
            self.step, self.origin = int(state["step"]), state["init_from"]
            self.curve.load(state["losses"])
        except TrainError:
            raise
        except Exception as error:
            message = f"cannot resume from it ({error}); remove it or choose another folder"
            raise TrainError(f"{folder / STATE_FILE}: {message}") from error
        return config


def _quoted(value: Any) -> str:
    """Format a setting for a message. Long lists of names are shortened."""
    names = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return f"[{listed(value)}]" if names else repr(value)


class Progress:
    """Shows the progress of a run, as a bar on a terminal or as log lines."""

    def __init__(self, config: RunConfig, bar: "tqdm[NoReturn]", curve: LossCurve) -> None:
        self._config, self._bar, self._curve = config, bar, curve
        self._began_at, self._began_s = bar.n, time.perf_counter()
        bar.bar_format = "step {n_fmt}/{total_fmt} {percentage:3.0f}%, {remaining} left{postfix}"

    def show(self, step: int, loss: Tensor, grad_norm: Tensor, seconds: float, *, last: bool) -> None:
        """Record the loss of a step that took `seconds`, and show the progress.

        Reading the loss waits for the device, so this happens only every ten steps, at saves and at the end. Raises
        TrainError if the loss or the gradient is not finite.
        """
        config, bar = self._config, self._bar
        self._curve.add(step, loss)
        bar.update()
        if not (last or step % 10 == 0 or step % config.save_every == 0 or step == config.steps):
            return
        mean = self._curve.recent()
        if not (math.isfinite(mean) and bool(torch.isfinite(grad_norm))):
            raise TrainError(f"step {step}: the loss or its gradient is not finite; the last save is intact")
        rate = f"{config.batch_size / seconds:.0f}"
        if not bar.disable:
            bar.set_postfix_str(f"loss {mean:.4g}, {rate} images/s", refresh=False)
        elif step % LINE_EVERY == 0 or step in (FIRST_LINE, config.steps) or config.looks_at(step):
            passed = time.perf_counter() - self._began_s
            left = tqdm.format_interval((config.steps - step) * passed / (step - self._began_at))
            log.info("step %d of %d, loss=%.4g, images_s=%s, left=%s", step, config.steps, mean, rate, left)


def take_threads(config: Config, device: torch.device) -> Config:
    """On a CPU, set the number of torch threads, and return the config with this number."""
    if device.type != "cpu":
        return config
    threads = config.threads or threads_left(torch.get_num_threads())
    torch.set_num_threads(threads)
    return dataclasses.replace(config, threads=threads)


def step_seed(seed: int, step: int) -> int:
    """Mix (seed, step) into 63 bits with the finaliser of splitmix64, so that steps share no randomness."""
    z = (seed * 0x9E3779B97F4A7C15 + step) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1


def example_pass(net: Denoiser, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """Return a function that runs a denoiser on a random x of this shape, which also gets gradients."""
    x, t = torch.randn(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    classes = t if net.class_embedding is not None else None
    return lambda: net(x, t, classes)


def faster_of(net: nn.Module, forward: Callable[[], Tensor], device: torch.device) -> str:
    """Return the faster precision, "fp32" or "bf16" with autocast, for a forward and a backward pass."""
    seconds = {}
    for precision in ("fp32", "bf16"):
        timings = []
        for _ in range(TIMED_PASSES):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = forward()
            out.float().square().mean().backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timings.append(time.perf_counter() - started)
            net.zero_grad(set_to_none=True)
        seconds[precision] = min(timings)
    return min(seconds, key=lambda name: seconds[name])


def averaged(make: Callable[[], Net], ema: Ema) -> Net:
    """Return a new network in eval mode that shares memory with the averaged weights."""
    with torch.device("meta"):
        net = make()
    net.load_state_dict(ema.shadow, assign=True)
    return net.requires_grad_(False).eval()
