"""Folders damaged at random or made in malice: each is refused, or still a checkpoint, and nothing else happens."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from bench.servers import options_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError

HANG_S = 20  # for one folder
MEMORY = 4 * 2**30  # of address space that a child may add
CANARY = "a pickle ran code"
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "eps", "../../etc/passwd", "\u0000", "\ud800", "x" * 10**5, [], {}, [[]], {"a": {}}),
    *([10**6] * 3, [0], [-1, 2], ["x"], [1] * 10_000),
]
Mutation = Callable[[Path, random.Random], str]


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"echo {CANARY!r} > {self._canary}",)


def make(folder: Path, *, safe: bool) -> None:
    """A small checkpoint in diffusers' layout, by diffusers."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(folder, safe_serialization=safe)


# --- mutations, each of which says what it did ---


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def documents_of(folder: Path) -> list[Path]:
    return [path for path in files_of(folder) if path.suffix == ".json"]


def weights_of(folder: Path) -> Path:
    return next(path for path in files_of(folder) if path.suffix in (".safetensors", ".bin"))


def damage(folder: Path, draw: random.Random) -> str:
    """Flip bits of a file, cut it, or put bytes into it; its head is where that matters."""
    file = draw.choice(files_of(folder))
    data = bytearray(file.read_bytes())
    kind = draw.choice(("flipped bits of", "cut", "put bytes into"))
    if kind == "cut":
        del data[draw.choice((0, 1, 7, 8, draw.randrange(len(data)), len(data) - 1)) :]
    elif kind == "put bytes into":
        at = draw.choice((0, 8, len(data)))
        data[at:at] = draw.randbytes(draw.choice((1, 8, 4096)))
    else:
        end = min(draw.choice((64, 2048, len(data))), len(data))
        for _ in range(draw.choice((1, 1, 8, 200))):
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{kind} {file.name}"


def replace_by(folder: Path, draw: random.Random) -> str:
    """Nothing, a folder, a pipe that nobody writes to, an endless device, or a link to itself or to nowhere."""
    file = draw.choice(files_of(folder))
    kind = draw.choice(("nothing", "folder", "pipe", "endless", "loop", "nowhere"))
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "nothing":
        file.symlink_to({"endless": "/dev/zero", "loop": file.name, "nowhere": "nowhere"}[kind])
    return f"{kind} in place of {file.name}"


def swap(folder: Path, draw: random.Random) -> str:
    one, other = draw.sample(files_of(folder), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"swapped {one.name} and {other.name}"


def change_document(folder: Path, draw: random.Random) -> str:
    file = draw.choice(documents_of(folder))
    document = json.loads(file.read_text())
    for _ in range(draw.choice((1, 1, 3))):
        name = draw.choice(sorted(document))
        action = draw.choice(("value", "value", "value", "remove", "rename", "inside"))
        if action == "value":
            document[name] = draw.choice(VALUES)
        elif action == "inside" and isinstance(document[name], list) and document[name]:
            document[name][draw.randrange(len(document[name]))] = draw.choice(VALUES)
        else:
            value = document.pop(name)
            if action == "rename":
                document[f"{name}_"] = value
        if not document:
            break
    file.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    return f"changed {file.name}"


def nest(folder: Path, draw: random.Random) -> str:
    file, depth = draw.choice(documents_of(folder)), draw.choice((100, 10_000, 1_000_000))
    file.write_text(draw.choice(("[" * depth, '{"a":' * depth, "[" * depth + "]" * depth)))
    return f"nested {file.name} {depth} deep"


def claim(folder: Path, draw: random.Random) -> str:
    """Claim tensors of other shapes, types and places in the head of a safetensors file, or a head of another size."""
    file = weights_of(folder)
    data = file.read_bytes()
    if file.suffix != ".safetensors" or draw.random() < 0.2:
        file.write_bytes(draw.choice((2**63, 2**40, 10**8, 0, 2)).to_bytes(8, "little") + data[8:])
        return f"claimed another head of {file.name}"
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    name = draw.choice([each for each in head if each != "__metadata__"])
    part = draw.choice(("shape", "dtype", "data_offsets"))
    bad = {
        "shape": draw.choice(([], [10**9] * 4, [-1], [0], ["x"], [2**62, 4], None)),
        "dtype": draw.choice(("F64", "I8", "BOOL", "F13", "", None, "BF16")),
        "data_offsets": draw.choice(([0, 2**60], [5, 1], [-8, 8], [0], None, [0, 4])),
    }
    head[name][part] = bad[part]
    encoded = json.dumps(head).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    return f"claimed another {part} in {file.name}"


def bomb(folder: Path, draw: random.Random) -> str:
    file = weights_of(folder)
    file = file.with_name("diffusion_pytorch_model.bin")
    canary = folder.parent / "canary"
    if draw.random() < 0.5:
        weights_of(folder).unlink()
    if draw.random() < 0.5:
        file.write_bytes(pickle.dumps({"conv_in.weight": Bomb(canary)}))
    else:
        torch.save({"conv_in.weight": Bomb(canary)}, file)
    return f"a pickle that runs code in {file.name}"


def other_tensors(folder: Path, draw: random.Random) -> str:
    file = weights_of(folder).with_name("diffusion_pytorch_model.bin")
    weights_of(folder).unlink()
    one, name = torch.zeros(1), "conv_in.weight"
    of_another_kind = [{"a": one}, {}, [one], one, {1: one}, {"a": "b"}]
    of_other_values = [{name: one.to(torch.complex64)}, {name: torch.full((8, 1, 3, 3), float("nan"))}]
    torch.save(draw.choice(of_another_kind + of_other_values), file)
    return f"other tensors in {file.name}"


MUTATIONS: tuple[Mutation, ...] = (
    *(damage, damage, damage, damage, replace_by, replace_by, swap, nest, claim, claim, bomb, other_tensors),
    *(change_document, change_document, change_document, change_document),
)


# --- the trial ---


def attempt(number: int, seed: int, sources: list[Path], work: Path) -> tuple[str, str]:
    """Load one mutated folder: refused, loaded, or what went wrong; and what was done to it."""
    draw = random.Random(f"{seed} {number}")
    folder = work / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(draw.choice(sources), folder)
    mutate = draw.choice(MUTATIONS)
    done = mutate(folder, draw)
    began_s = time.monotonic()
    signal.alarm(HANG_S)
    try:
        load_checkpoint(folder)
        outcome = "loaded"
    except CheckpointError as error:
        text = str(error)
        outcome = "refused" if text and len(text.splitlines()) == 1 and len(text) < 2000 else f"unclear: {text[:300]!r}"
    except Exception:
        outcome = f"raised: {traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)
    if (work / "canary").exists():
        outcome = "ran code"
    if time.monotonic() - began_s > HANG_S / 2:
        outcome = "slow"
    return outcome, done


def run_some(numbers: range, seed: int, sources: list[Path], work: Path, report: int) -> None:
    """In a child: try folders, and write a line for each before and after, so that a crash shows where it was."""
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the child
    for number in numbers:
        os.write(report, json.dumps({"begun": number}).encode() + b"\n")
        outcome, done = attempt(number, seed, sources, work)
        os.write(report, json.dumps({"number": number, "outcome": outcome, "done": done}).encode() + b"\n")


def trial(folders: int, seed: int) -> Counter[str]:
    """Try so many folders. What is neither refused nor loaded is printed."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        work, sources = Path(place), [Path(place) / "safe", Path(place) / "pickled"]
        for source in sources:
            make(source, safe=source.name == "safe")
        at = 0
        while at < folders:
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(read)
                run_some(range(at, folders), seed, sources, work, write)
                os._exit(0)
            os.close(write)
            begun = at
            with os.fdopen(read) as lines:
                for line in lines:
                    told = json.loads(line)
                    begun = told.get("begun", begun)
                    if "outcome" in told:
                        kind = told["outcome"].partition(":")[0]
                        counts[kind] += 1
                        at = told["number"] + 1
                        if kind not in ("refused", "loaded"):
                            print(f"{told['number']}: {told['done']}: {told['outcome']}")
            _, status = os.waitpid(child, 0)
            if status:
                kind = "hung" if os.WTERMSIG(status) == signal.SIGALRM else "crashed"
                counts[kind] += 1
                print(f"{begun}: {kind}, status {status}")
                at = begun + 1
    return counts


if __name__ == "__main__":
    asked = options_of(__doc__, folders=1000, seed=0)
    torch.set_num_threads(1)
    counts = trial(asked.folders, asked.seed)
    print(json.dumps(counts))
    sys.exit(bool(counts.keys() - {"refused", "loaded"}))
