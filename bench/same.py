"""Whether another checkout of tminus gives the same bytes: requests of all kinds, to both, compared.

    python -m bench.same --before ../old

The two run one after the other, with the same weights and the executor that the first one chose. Exit code 1 where an
answer differs. What may differ between two answers (times, ids) is in headers; bodies are compared as they are.
"""

import argparse
import base64
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from bench import servers
from bench.conductor import say

MASK = servers.ROOT / "docs" / "images" / "upper-half.png"
ACCEPTS = ("image/png", "image/png", "application/zip", "application/json", "image/webp")
STEPS = (1, 2, 5, 10, 20, 50)


def main() -> None:
    """Ask both, compare, tell."""
    parser = argparse.ArgumentParser(prog="python -m bench.same", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--checkpoint", type=Path, default=servers.ROOT / "checkpoints" / "fashion-mnist-32")
    parser.add_argument("--specs", type=int, default=50, help="how many requests")
    args = parser.parse_args()
    found = servers.contenders(1, before=args.before.resolve())
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        before, after = (answers(found[key], args.checkpoint, args.specs) for key in ("before", "tminus"))
    different = [k for k, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    print(f"{args.specs - len(different)} of {args.specs} answers are equal to the byte")
    for k in different:
        print(
            f"request {k}: {request(k, ())}: {before[k][0]} {len(before[k][1])} B, {after[k][0]} {len(after[k][1])} B"
        )
    sys.exit(1 if different else 0)


def answers(contender: servers.Contender, checkpoint: Path, count: int) -> list[tuple[int, bytes]]:
    """Status and body of each request."""
    say(f"{contender.title}: {contender.tree}")
    with servers.running(contender, checkpoint, None) as server:
        names = server.model["class_names"] if server.model["null_class"] is not None else ()
        with httpx.Client(base_url=server.url, timeout=600, trust_env=False) as http:
            return [ask(http, *request(k, names)) for k in range(count)]


def ask(http: httpx.Client, accept: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """One answer."""
    response = http.post("/sample", json=body, headers={"Accept": accept})
    return response.status_code, response.content


def request(k: int, class_names: tuple[str, ...] | list[str]) -> tuple[str, dict[str, Any]]:
    """Request k: always the same one. Together they use every parameter that bears on the pixels."""
    draw = random.Random(k)
    accept, n = ACCEPTS[k % len(ACCEPTS)], draw.choice((1, 1, 2, 3, 5))
    body: dict[str, Any] = {"seed": draw.randrange(2**64), "n": n, "steps": draw.choice(STEPS)}
    body["sampler"] = draw.choice(("ddpm", "ddim", "dpmpp_2m"))
    if body["sampler"] == "ddim":
        body["eta"] = draw.choice((0, 0.5, 1))
    if draw.random() < 0.3:
        body["index"] = draw.randrange(1000)
    if draw.random() < 0.2:
        body |= {"to_seed": draw.randrange(2**64), "mix": draw.random()}
    if draw.random() < 0.3:
        body["timestep_spacing"] = draw.choice(("leading", "trailing", "linspace", "karras"))
    if draw.random() < 0.2:
        body["clip"] = draw.random() < 0.5
    if class_names and draw.random() < 0.7:
        body["class_label"] = [draw.choice(class_names) for _ in range(n)]
        if draw.random() < 0.7:
            body["guidance"] = draw.choice((0, 1.5, 2, 4))
            if draw.random() < 0.5:
                body["guidance_interval"] = sorted(draw.sample(range(1000), 2))
            if draw.random() < 0.3:
                body["guidance_rescale"] = 0.7
    if accept == "image/webp":
        body |= {"every": draw.choice((1, 2, 5)), "show": draw.choice(("x_t", "x_0"))}
    if k % 5 == 0:
        picture = base64.b64encode(MASK.read_bytes()).decode("ascii")
        body |= {"image": picture} | ({"mask": picture} if draw.random() < 0.5 else {"strength": 0.6})
    return accept, body


if __name__ == "__main__":
    main()
