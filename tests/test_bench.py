"""The benchmark's arithmetic, its load and its peer; nothing here measures anything."""

import asyncio
import statistics
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from bench import bare, load, lock_server, report
from bench.__main__ import parse_args
from bench.pace import Pace
from model.checkpoint import Labels, load_checkpoint, save_checkpoint
from model.noise import NoiseConfig
from model.unet import UNet2D
from tests.tiny import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = replace(TINY, num_class_embeds=3)
    torch.manual_seed(0)
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_checkpoint(path, UNet2D(config).state_dict(), config, NoiseConfig(), Labels(("a", "b"), 2), {})
    return path


def loaded(rate: float, **changes: object) -> load.Loaded:
    whole = load.Counters(row_steps=100, places=100, ticks=10, ticks_s=1, cpu_s=2, saved=20)
    return replace(load.Loaded(rate, rate, 16, 0.9, 0.01, 5, 90, 30, whole), **changes)


def a_run(lock_rates: tuple[float, ...]) -> report.Run:
    rounds = tuple(
        report.Round(
            1e9,
            2e9,
            {1: Pace(50, 0.01), 16: Pace(100, 0.01)},
            loaded(90),
            loaded(96),
            loaded(rate),
            [0.5, 0.7],
            [1.0, 1.0],
        )
        for rate in lock_rates
    )
    machine: dict[str, str | int] = dict.fromkeys(
        ("cpu", "capability", "cores", "threads", "torch", "diffusers", "python", "system"), "x"
    )
    return report.Run("python -m bench", "today", "abc", 0.1, "toy", machine, 10_000_000, 16, 50, {}, rounds)


def test_both_lists_ask_for_the_same_sizes() -> None:
    plain, mixed = load.unguided_asks(), load.mixed_asks()
    assert all(ask.sampler == "ddpm" and ask.guidance == 1 for ask in plain)
    assert {(ask.n, ask.steps) for ask in plain} == {(ask.n, ask.steps) for ask in mixed}
    assert statistics.mean(ask.guidance != 1 for ask in mixed) == pytest.approx(1 / 3)
    assert plain == load.unguided_asks()


def test_a_ratio_is_of_medians_with_the_range_of_the_rounds() -> None:
    run = a_run((40, 60, 48))
    value, low, high = next(ratio for name, ratio in report.ratios(run).items() if "lock" in name)
    assert (value, low, high) == (96 / 48, 96 / 60, 96 / 40)
    assert report.best_batch(run) == 16


def test_the_page_and_the_json_are_written(tmp_path: Path) -> None:
    report.write(a_run((40,)), tmp_path / "results")
    page = (tmp_path / "results" / "latest.md").read_text()
    assert "| bare loop, batch 16 | 100.0 [100.0 to 100.0] |" in page
    assert "account for the same row-steps in all 3 loads" in page
    assert (tmp_path / "results" / "latest.json").is_file()


def test_what_the_server_took_and_saved_must_be_what_was_asked() -> None:
    assert loaded(1).agrees
    assert not loaded(1, received_row_steps=91).agrees
    of_a_lock = load.Counters(row_steps=100, places=100, ticks=10, ticks_s=0, cpu_s=2)
    assert loaded(1, counted=of_a_lock).agrees
    assert not loaded(1, counted=of_a_lock, received_row_steps=101).agrees


def test_quantiles_are_linear_between_the_values() -> None:
    assert report._quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report._quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert report._quantile([4.0], 0.95) == 4.0


def test_quick_is_one_short_round_and_an_option_beats_it() -> None:
    assert parse_args(["--quick"]).rounds == 1
    assert parse_args(["--quick", "--rounds", "2"]).rounds == 2
    assert parse_args([]).rounds == 3


def test_counting_flops_counts_the_attention_too(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert bare.flops_per_row(checkpoint) > 2 * 9 * 8 * 8 * 8 * 8  # one convolution of the widest map alone
    without = replace(checkpoint.net.config, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    fewer = replace(checkpoint, net=UNet2D(without).eval())
    assert bare.flops_per_row(fewer) < bare.flops_per_row(checkpoint)


def test_the_lock_server_counts_its_rows_and_answers_a_png(folder: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    lock_server.save_twin(folder, tmp_path / "twin")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "twin")
    pipeline.set_progress_bar_config(disable=True)

    async def talk() -> tuple[httpx.Response, load.Counters]:
        with lock_server.ThreadPoolExecutor(1) as thread:
            transport = httpx.ASGITransport(lock_server.create_app(pipeline, thread))
            async with httpx.AsyncClient(transport=transport, base_url="http://lock") as client:
                response = await load.send_to_lock(client, load.Ask(n=2, steps=3), seed=1)
                return response, await load.read_lock(client)

    response, counters = asyncio.run(talk())
    assert response.content.startswith(load.PNG_MAGIC)
    assert (counters.row_steps, counters.ticks) == (6, 3)
