"""The benchmark's arithmetic, its arrivals, its client and its peers; nothing here measures anything."""

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fastapi import FastAPI, Request, Response
from PIL import Image, ImageChops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import arrivals, client, cluster, controls, figures, gpu, lock_step, networks, servers, tables, traffic
from bench.bare import flops_per_row
from bench.loads import BATCH, Lengths, Turn
from bench.measures import Findings, Measure, table
from bench.peers import encode
from bench.records import SLO, Answer, Arrival, Ask, Bare, Counters, Loaded, Pace, Run
from bench.result_file import ROOT
from bench.servers import contenders
from bench.tally import Tally, read_tally
from tests.service.engine.exact import needs_openvino
from tests.service.fakes import wait_until
from tests.tiny import TINY
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.machine import torch_threads
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.service.scheduling import scheduler
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.work import Work

pytestmark = pytest.mark.slow

PNG = encode([Image.new("L", (2, 2))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = replace(TINY, num_class_embeds=3)
    torch.manual_seed(0)
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_checkpoint(path, UNet2D(config).state_dict(), config, NoiseConfig(), Labels(("a", "b"), 2), {})
    return path


def answer(steps: int = 20, waited_s: float = 1.0, **changes: object) -> Answer:
    return replace(Answer(0.0, 1, steps, 0, "ok", waited_s), **changes)


def loaded(
    load: str, contender: str, rate: float = 100.0, answers: Sequence[Answer] = (), number: int = 1, **changes: object
) -> Loaded:
    counted = Counters(10 * rate, 10 * rate, 100)
    return replace(Loaded(load, contender, number, 10.0, counted, 10 * rate, tuple(answers)), **changes)


def a_run(loads: Sequence[Loaded] = (), **changes: object) -> Run:
    model = {"executor": "eager", "precision": "float32", "limits": {"max_batch": 8}}
    bare_run = Bare(1, "eager", "float32", 10_000_000, {1: Pace(50, 0.01), 8: Pace(200, 0.01)})
    return replace(Run("toy", model, loads=[*loads], bare=[bare_run]), **changes)


def summary_of(*loads: Loaded) -> dict[str, Any]:
    return figures.summary(a_run(loads), {"float32": 10.0})


# --- figures ---


def test_a_ratio_is_of_medians_and_keeps_the_ratio_of_each_round() -> None:
    ours = [loaded("saturation_1", "tminus", rate, number=number) for number, rate in enumerate((90, 96, 99))]
    theirs = [loaded("saturation_1", "lock", rate, number=number) for number, rate in enumerate((40, 60, 48))]
    found = summary_of(*ours, *theirs)["saturation_1"]["tminus_over_lock"]
    assert found == {"value": 96 / 48, "rounds": [90 / 40, 96 / 60, 99 / 48]}


def test_who_waits_half_as_long_is_twice_as_fast() -> None:
    ours = [answer(20, 0.5), answer(20, 0.5), answer(1000, 40)]
    theirs = [answer(20, 30), answer(20, 30), answer(1000, 50)]
    found = summary_of(loaded("mixed", "tminus", answers=ours), loaded("mixed", "litserve", answers=theirs))
    assert found["short"]["tminus_over_litserve"]["value"] == pytest.approx(60)
    assert found["long"]["tminus_over_litserve"]["value"] == pytest.approx(50 / 40)


def test_tminus_is_compared_with_itself_with_one_thing_left_out() -> None:
    took_s = {"tminus_in_order": 40.0, "tminus_one_job": 2.0, "tminus_eager": 4.0, "tminus": 1.0}
    loads = [loaded("mixed", key, answers=[answer(20, s)]) for key, s in took_s.items()]
    loads += [loaded("saturation_1", key, rate) for key, rate in {"tminus": 300, "tminus_in_order": 300}.items()]
    assert tables.effects(summary_of(*loads)).splitlines()[2] == "| 20 steps beside long jobs | 40 | 2 | 4 |"
    assert tables.effects(summary_of(*loads[:-1])) == "", "no control"


@pytest.mark.parametrize(("control", "jobs"), [("in-order", ["a"]), ("one-job", ["b"])])
def test_a_control_leaves_out_one_rule(control: str, jobs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs_of_ticks() -> list[list[str]]:
        of, found = Scheduler(BatchPolicy.of(8)), []
        of.add("a", range(8), Work(8, 9, range(0)))
        of.add("b", range(2), Work(2, 4, range(0)))
        while (batch := of.next_batch()) is not None:
            found.append(sorted(each.job_id for each in batch.jobs))
            of.advance(batch)
        return found

    assert jobs_of_ticks()[1] == ["a", "b"]
    monkeypatch.setattr(scheduler, "OwnerQueue", controls.CONTROLS[control])
    found = jobs_of_ticks()
    assert found[1] == jobs, "the first tick of one job is that of the reserve"
    assert (found.count(["a"]), found.count(["b"])) == (9, 4)


def test_the_page_tells_how_an_executor_divides_its_passes_in_words() -> None:
    details = "openvino 2026.4.1-22982, 2 streams, passes of 1, 2, 4, up to 1 wide"
    model = {"executor": "openvino", "precision": "bfloat16", "executor_details": details, "limits": {"max_batch": 8}}
    made = dict.fromkeys(("command", "date", "commit", "seconds", "load_average", "busy_share"), 1)
    made |= {"machine": dict.fromkeys(("cpu", "cores", "system", "python"), "x")}
    assert tables.machine({"made": made, **figures.summary(a_run(model=model), {"float32": 10.0})}).endswith(
        "\n- tminus chose OpenVINO in bfloat16: 2 streams of one thread each, passes of 1, 2 or 4 rows, a rest of 1 at "
        "most on all threads. A tick has up to 8 rows."
    )


def test_steps_that_nobody_got_are_wasted() -> None:
    answers = [answer(20), answer(50, outcome="left")]
    noticed = loaded("hang_ups", "tminus", answers=answers, took_row_steps=25.0)
    blind = loaded("hang_ups", "lock", answers=answers, took_row_steps=70.0)
    again = replace(noticed, round=2, took_row_steps=30.0)
    assert summary_of(noticed, blind, again)["hang_ups"] == {
        "tminus": {"value": 15, "rounds": [10, 20]},
        "lock": {"value": 100},
    }
    assert figures.wasted_of_abandoned(loaded("hang_ups", "lock", answers=[answer()])) is None


def test_a_request_without_an_answer_is_told() -> None:
    answers = [answer(20), answer(1000, 40.0, outcome="unanswered")]
    rounds = [loaded("mixed", "lock", answers=answers, number=number) for number in (1, 2)]
    assert summary_of(*rounds)["unanswered"] == {"lock": 2}, "in all rounds"


def test_a_wait_that_had_not_ended_is_the_least_that_it_can_be() -> None:
    def one(key: str, *unanswered: bool) -> Loaded:
        answers = [answer(20, 9.0, outcome="unanswered" if each else "ok") for each in unanswered]
        return loaded("mixed", key, answers=answers)

    few, most = one("tminus", False, False, True), one("lock", False, True, True)
    short = {key: each for key, each in summary_of(few, most)["short"].items() if each}
    assert short == {
        "tminus": {"value": 9.0},  # the third may take for ever: the median stays
        "lock": {"value": 9.0, "at_least": True},
        "tminus_over_lock": {"value": 1.0, "at_least": True},
    }
    assert "tminus_over_lock" not in summary_of(one("tminus", True), most)["short"]
    assert "| > 9 |" in tables.headline(summary_of(few, most))


def at_rates(key: str, *in_time: int, number: int = 1) -> list[Loaded]:
    """A turn at each rate, with twenty requests of 1x20 that take 0.2 s or have no answer after 0.9 s."""
    late = answer(20, 0.9, outcome="unanswered")
    return [
        loaded(load, key, number=number, answers=[answer(20, 0.2)] * good + [late] * (20 - good))
        for load, good in zip(SLO, in_time, strict=False)
    ]


def slo_summary(*loads: Loaded) -> dict[str, Any]:
    return figures.summary(a_run(loads, own_rate=1000.0, alone_s={"1x20": 0.1}), {"float32": 10.0})


def test_attainment_is_of_all_rounds_and_goodput_lies_where_it_is_95_percent() -> None:
    found = slo_summary(*at_rates("tminus", 20, 20, 20, 18, 2), *at_rates("tminus", 20, 20, 18, 14, 0, number=2))
    slo = {load: found["slo"][load]["all"]["tminus"] for load in SLO}
    assert slo["slo_80"]["within_3"] == {"value": 0.95, "rounds": [1.0, 0.9]}
    assert slo["slo_90"]["within_3"]["value"] == pytest.approx(0.8)
    assert found["goodput"]["tminus"] == {"value": pytest.approx(800)}
    assert slo["slo_40"]["within_1_5"]["value"] == 0
    assert slo["slo_40"]["p50"] == {"value": pytest.approx(2), "rounds": pytest.approx([2, 2])}
    late = slo["slo_100"]["p50"]
    assert (late["value"], late["at_least"]) == (pytest.approx(9), True), "most had no answer"


def test_a_goodput_beyond_the_rates_is_a_bound_and_so_is_its_ratio() -> None:
    loads = [*at_rates("tminus", 20, 20, 20, 19, 0), *at_rates("lock", 18), *at_rates("before", 20, 20, 20, 20, 20)]
    found = slo_summary(*loads)
    assert found["goodput"]["lock"] == {"value": 400, "at_most": True}, "it had no turn at higher rates"
    assert found["goodput"]["tminus_over_lock"] == {"value": pytest.approx(900 / 400), "at_least": True}
    assert found["goodput"]["tminus_over_before"] == {"value": pytest.approx(0.9), "at_most": True}
    text = tables.attainment(found)
    assert "| diffusers behind a lock | 0.9 |  |  |  |  |" in text
    assert "| tminus, 1x20 | 2 | 2 |" in text
    assert tables.attainment(summary_of(*at_rates("tminus", 20))) == "", "nothing is known of the rates"
    assert "| < 400 |" in tables.headline(found)


def test_a_server_of_slow_passes_is_still_only_after_a_pass_of_all_its_workers() -> None:
    server: Any = None
    slow, fast = (Turn(server, 1, Lengths(), capacity) for capacity in (12.0, 400.0))
    assert slow.still_s > 2 * BATCH / 12
    assert fast.still_s < 1


# --- arrivals ---


def test_who_saturates_comes_at_once_and_then_faster_than_anybody_can_serve() -> None:
    made = arrivals.saturating(Ask(1, 50), 4, 100.0, 10.0)
    assert [a.at_s for a in made[:4]] == [0.0] * 4
    assert sum(a.ask.row_steps for a in made[4:]) == 1000
    assert [a.seed for a in made] == list(range(len(made)))


def test_a_mix_comes_at_the_rate_that_is_asked_for_and_differs_by_round() -> None:
    mix = Lengths().mix
    first, again, other = (arrivals.of_mix(mix, 500.0, 25.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [sorted(a.ask.row_steps for a in each) for each in (first, other)] == 2 * [
        [20] * 36 + [200] * 14 + [2000] * 5
    ]
    assert [a.seed for a in first] == list(range(len(first)))


# --- client ---


def drive_on(app: FastAPI, comers: Sequence[Arrival], **options: float) -> list[Answer]:
    async def go() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
            return await client.drive(http, comers, **{"drain_s": 5.0, **options})

    return asyncio.run(go())


def answering(reply: Callable[[int], Awaitable[Response]]) -> FastAPI:
    app = FastAPI()

    @app.post("/sample")
    async def sample(body: dict[str, object]) -> Response:
        seed = body["seed"]
        assert isinstance(seed, int)
        return await reply(seed)

    return app


def test_requests_start_at_their_own_time_whatever_is_answered() -> None:
    started: list[int] = []
    last = asyncio.Event()

    async def reply(seed: int) -> Response:
        started.append(seed)
        if seed == 2:
            last.set()
        await last.wait()  # the first is not answered before the last has come
        return Response(PNG)

    comers = [Arrival(0.01 * seed, Ask(1, 5), seed) for seed in range(3)]
    answers = drive_on(answering(reply), comers)
    assert started == [0, 1, 2]
    assert [a.outcome for a in answers] == ["ok"] * 3
    assert answers[0].waited_s >= 0.02


def test_images_are_asked_of_several_processes_in_turns() -> None:
    async def port(http: httpx.AsyncClient) -> int | None:
        with pytest.raises(httpx.ConnectError) as found:
            await http.post("/sample")
        return found.value.request.url.port

    async def go() -> list[int | None]:
        async with client.open_client("http://127.0.0.1:1", "http://127.0.0.1:2") as http:
            return [await port(http) for _ in range(3)]

    assert asyncio.run(go()) == [1, 2, 1]


def test_each_outcome_has_its_name() -> None:
    async def reply(seed: int) -> Response:
        if seed == 0:
            return Response(status_code=429)
        if seed == 1:
            return Response(b"no picture")
        if seed in (2, 3):
            await asyncio.Event().wait()
        return Response(PNG)

    comers = [Arrival(0.0, Ask(1, 5), seed, leaves_after_s=0.05 if seed == 2 else None) for seed in range(5)]
    answers = {a.seed: a for a in drive_on(answering(reply), comers, drain_s=0.3)}
    assert [answers[seed].outcome for seed in range(5)] == ["refused", "failed", "left", "unanswered", "ok"]
    assert answers[3].waited_s >= 0.3


# --- servers and peers ---


@pytest.mark.long
def test_the_lock_server_tells_its_steps_and_answers_a_png(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from bench.peers import lock_server

    pipeline = lock_server.load_pipeline(folder)
    tallies = tmp_path / "tallies"
    tallies.mkdir()
    with lock_server.ThreadPoolExecutor(1) as thread:
        app = lock_server.create_app(pipeline, thread, Tally(tallies))
        (found,) = drive_on(app, [Arrival(0.0, Ask(2, 3), seed=1)])
    assert found.outcome == "ok"
    assert read_tally(tallies) == (6, 3)


@pytest.mark.long
def test_the_batching_peers_group_by_steps_and_give_a_row_the_same_noise_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from bench.peers.denoiser import Denoiser, Wanted, even_parts

    tallies = tmp_path / "tallies"
    tallies.mkdir()
    denoiser = Denoiser(folder, Tally(tallies))
    wanted = [Wanted(2, 4, "ddpm", 1, None), Wanted(1, 3, "ddim", 2, 1), Wanted(1, 4, "ddpm", 3, 0)]
    together = denoiser.sample(wanted)
    assert read_tally(tallies) == (3 * 4 + 3, 4 + 3)
    for png, one in zip(together, wanted, strict=True):
        assert far_apart(png, denoiser.sample([one])[0]) <= 2  # a batch's size moves the last bits
    assert [len(part) for part in even_parts([None] * 33, 16)] == [11, 11, 11]  # type: ignore[list-item]
    with pytest.raises(ValueError, match="cannot do"):
        Wanted.parse({"steps": 0})


@pytest.mark.long
def test_requests_that_go_step_by_step_join_and_leave_between_passes_and_get_the_same_images(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    from bench.peers.denoiser import Denoiser, Wanted

    tallies = tmp_path / "tallies"
    tallies.mkdir()
    denoiser = Denoiser(folder, Tally(tallies))
    wanted = [Wanted(2, 4, "ddpm", 1, None), Wanted(1, 3, "ddim", 2, 1), Wanted(15, 2, "ddpm", 3, 0)]
    courses = [denoiser.begin(wanted[0])]
    denoiser.step(courses)
    courses += map(denoiser.begin, wanted[1:])
    while left := [course for course in courses if course.timesteps]:
        denoiser.step(left)
    assert read_tally(tallies) == (2 * 4 + 3 + 15 * 2, 1 + 2 * 2 + 1), "18 rows took two passes"
    for course, one in zip(courses, wanted, strict=True):
        assert far_apart(denoiser.finish(course), denoiser.sample([one])[0]) <= 2


@pytest.mark.long
def test_a_long_request_goes_to_the_queue_of_long_ones_with_its_body() -> None:
    pytest.importorskip("litserve")
    from bench.peers.litserve_server import ByLength

    app = FastAPI()
    app.add_middleware(ByLength)

    @app.post("/sample")
    @app.post("/long")
    async def answered(request: Request) -> list[Any]:
        return [request.url.path, await request.json()]

    async def go(ask: Ask) -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake") as http:
            found: list[Any] = (await http.post("/sample", json=ask.to_body(1))).json()
            return found

    for ask, path in ((Ask(4, 50), "/sample"), (Ask(8, 250), "/long")):
        assert asyncio.run(go(ask)) == [path, ask.to_body(1)]


def far_apart(png: bytes, other: bytes) -> int:
    """The greatest difference in grey levels."""
    with Image.open(io.BytesIO(png)) as one, Image.open(io.BytesIO(other)) as two:
        extrema = ImageChops.difference(one, two).getextrema()
    return max(max(each) if isinstance(each, tuple) else int(each) for each in extrema)


@pytest.mark.long
def test_a_quick_run_from_start_to_end(folder: Path, tmp_path: Path) -> None:
    """A real server with a tiny model: every figure that needs only tminus is there."""
    command = [sys.executable, "-m", "bench", "--quick", "--checkpoint", str(folder), "--contenders", "tminus"]
    command[-1] += ",tminus_one_job,tminus_two"
    command += ["--only", "idle,saturation_1,mixed,hang_ups,slo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "serving.json").read_bytes())
    assert "left_out" not in found
    assert found["made"]["quick"] is True
    for figure in ("idle", "saturation_1", "short", "long", "goodput"):
        assert found[figure]["tminus"]["value"] > 0
    assert found["short"].keys() == {"tminus", "tminus_one_job", "tminus_over_tminus_one_job"}
    assert found["saturation_1"]["tminus_two_over_tminus"]["value"] > 0
    assert found["hang_ups"].keys() == {"tminus"}
    assert found["slo"]["alone_s"].keys() == {"1x5", "4x10"}
    assert found["slo"]["slo_40"]["all"]["tminus"]["p95"]["value"] > 0


@pytest.mark.long
@needs_openvino
def test_a_peer_with_tminus_own_graph_makes_the_images_of_the_eager_one(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from bench.peers.denoiser import Denoiser, Wanted

    wanted = [Wanted(2, 4, "ddpm", 1, 0), Wanted(3, 4, "ddpm", 5, 1)]
    with torch_threads(1):
        eager, openvino = (Denoiser(folder, Tally(tmp_path), "cpu", kind).sample(wanted) for kind in (None, "float32"))
    assert max(map(far_apart, eager, openvino)) <= 2


@pytest.mark.long
@pytest.mark.parametrize("kind", ["a quantised one", "a variational one"])
def test_a_peer_decodes_latents_as_tminus_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from bench.peers.denoiser import reader

    checkpoint = networks.write("tiny-ldm", tmp_path) if kind == "a quantised one" else ROOT / "checkpoints/avatars-64"
    latents = torch.randn(2, *load_checkpoint(checkpoint).row_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = (reader(checkpoint, openvino=kind)(latents) for kind in (True, False))
    assert max(far_apart(encode([one]), encode([other])) for one, other in zip(ours, theirs, strict=True)) <= 1


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_in_the_simulation_end_every_job_that_they_accept_and_die_in_vain(replicas: int) -> None:
    requests = list(traffic.at_rate(1.2 * replicas * cluster.capacity_per_s(), 60.0))
    deaths = [(10.0, 0), (12.0, replicas - 1), (50.0, 0)]
    outcome = cluster.Cluster(replicas).run(requests, deaths)
    assert len(outcome.jobs) + len(outcome.refused) == len(requests)
    assert all(job.ended_s is not None and min(job.steps) == job.work.steps for job in outcome.jobs)
    assert any(job.moves for job in outcome.jobs)
    free_s = cluster.LEASE_S if replicas > 1 else cluster.BACK_S  # alone it takes them on again itself
    assert min(outcome.taken_s) <= free_s + cluster.CLAIM_S
    assert max(outcome.taken_s) <= free_s + 4 * cluster.CLAIM_S, "some seconds of work in each second"
    per_job = outcome.statements / len(outcome.jobs)
    assert cluster.ADD + cluster.FINISH <= per_job < 20


def test_short_jobs_do_not_wait_longer_among_many_replicas() -> None:
    waits = []
    for replicas in (1, 4):
        requests = list(traffic.at_rate(0.8 * replicas * cluster.capacity_per_s(), 60.0))
        waits.append(max(cluster.simulate(replicas, requests, 60.0, 0.0).outcome.waits(20)))
    assert waits[1] < 2 * waits[0]


@pytest.mark.long
def test_recorded_traffic_is_what_came_to_a_server(folder: Path, tmp_path: Path) -> None:
    asks: list[dict[str, object]] = [
        {"n": 1, "steps": 3},
        {"n": 2, "steps": 4, "class_label": "a", "guidance": 2},
        {"n": 3, "steps": 5, "sampler": "heun"},
    ]
    with servers.running(contenders(1)["tminus"], folder, None) as server:
        for ask in asks:
            httpx.post(f"{server.url}/jobs", json=ask).raise_for_status()
            time.sleep(0.3)
        rows = list(traffic.record(server.url))
    assert [float(rows[k + 1][0]) - float(rows[k][0]) >= 0.3 for k in range(2)] == [True, True]
    file = tmp_path / "traffic.csv"
    file.write_text("\n".join(",".join(row) for row in [traffic.COLUMNS, *rows]))
    assert [work.places for _, work in traffic.read(file)] == [3, 2 * 4 * 2, 3 * 9]
    outcome = cluster.Cluster(1).run(traffic.read(file))
    assert len(outcome.waits()) == 3


# --- the lock step ---


def test_joined_streams_take_their_passes_together_and_free_ones_do_not_wait() -> None:
    counts = [0, 0]
    fifth = threading.Event()

    def fast() -> None:
        counts[0] += 1
        if counts[0] == 5:
            fifth.set()

    def waits_for_the_other() -> None:
        assert fifth.wait(lock_step.STUCK_S)
        counts[1] += 1

    assert lock_step.rate([fast, waits_for_the_other], 0.0, 0.05, joined=False) > 0
    assert counts[0] > counts[1] > 0, "one had five passes while the other had none"
    counts[:] = [0, 0]
    assert lock_step.rate([fast, waits_for_the_other], 0.001, 0.05, joined=True) > 0
    assert counts[0] == counts[1] > 0


@pytest.mark.long
def test_another_process_takes_a_core_only_as_long_as_it_is_wanted() -> None:
    with lock_step.taken(0.2) as number:
        process = psutil.Process(number)
        before_s = process.cpu_times().user
        wait_until(lambda: process.cpu_times().user > before_s)
    assert has_ended(process.pid)


# --- large networks, and a GPU ---


@pytest.mark.parametrize(("name", "millions"), [("cifar", 35.7), ("celebahq", 113.7), ("ldm", 274.1)])
def test_the_published_networks_have_as_many_parameters_as_published(name: str, millions: float) -> None:
    network = networks.PUBLISHED[name]
    with torch.device("meta"):
        parts = [UNet2D(network.unet)]
        assert round(sum(each.numel() for each in parts[0].parameters()) / 1e6, 1) == millions
        if network.autoencoder is not None:
            decoder = Autoencoder(network.autoencoder)
            assert round(sum(each.numel() for each in decoder.parameters()) / 1e6, 1) == 55.3


@pytest.mark.long
def test_a_network_is_written_once_and_loads_here_and_in_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = networks.write("tiny-ldm", tmp_path)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert networks.write("tiny-ldm", tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == files
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.size_px, checkpoint.row_shape) == ((16, 16), (3, 8, 8))
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    theirs = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    codes = diffusers.VQModel.from_pretrained(folder, subfolder="vqvae")
    with torch.inference_mode():
        assert torch.allclose(theirs.eval()(x, t)[0], checkpoint.net(x, t.float(), None), atol=1e-5)
        assert checkpoint.autoencoder is not None
        assert torch.allclose(codes.eval().decode(x)[0], checkpoint.autoencoder.decode(x), atol=1e-5)


def test_networks_that_are_nowhere_or_of_one_name_are_one_clear_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    one, other = tmp_path / "a" / "model", tmp_path / "b" / "model"
    assert networks.folders(f"{one}/,{tmp_path}/b/model/..") == {"model": one, "b": tmp_path / "b"}
    with pytest.raises(SystemExit, match="names of their own, got 'model' twice"):
        networks.folders(f"{one},{other}")
    with pytest.raises(SystemExit, match="or folders of checkpoints, got 'nowhere'"):
        networks.folders("nowhere")


def test_a_pass_of_a_row_is_counted_as_published(tmp_path: Path) -> None:
    """Fang et al. 2023 (Diff-Pruning) have 6.1 G multiply-adds without the products of the attention, 0.17 G.

    Those of a latent model are of its latents.
    """
    assert flops_per_row(load_checkpoint(networks.write("cifar", tmp_path))) / 2e9 == pytest.approx(6.27, abs=0.1)
    latent = load_checkpoint(networks.write("tiny-ldm", tmp_path))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        latent.net(torch.zeros(1, 3, 8, 8), torch.zeros(1), None)
    assert flops_per_row(latent) == counter.get_total_flops()


@pytest.mark.long
def test_what_a_part_has_measured_when_its_time_is_up_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is ended, with those that it has started; what it has half printed is dropped."""
    whole = Measure("passes", "tminus", 7.0, rows=2)
    (tmp_path / "slow_part.py").write_text(
        "import subprocess, sys, time\n"
        f"print({json.dumps(asdict(whole))!r}, {json.dumps({'left_out': 'nothing else'})!r}, '{{', sep='\\n', end='')\n"
        "sys.stdout.flush()\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open(sys.argv[1].partition('=')[2], 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings, started = Findings(), tmp_path / "started"
    findings.gather("cifar", "a part", "slow_part", {"started": started}, 4.0)
    assert findings.measures == [replace(whole, network="cifar")]
    assert [each.partition(": a part: ")[2] for each in findings.left_out] == [
        "nothing else",
        "what is not in the table had no time in 4 s",
    ]
    wait_until(lambda: has_ended(int(started.read_text())))


def has_ended(pid: int) -> bool:
    """Whether nothing of a process runs any more; somebody else may have to read its exit code."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_part_that_fails_is_left_out_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_part.py").write_text("raise ValueError('no such network')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = Findings()
    findings.gather("cifar", "a part", "failing_part", {}, 60.0)
    assert findings.left_out == ["cifar: a part ended with 1: ValueError: no such network"]


def test_a_table_has_a_column_for_each_number_of_rows() -> None:
    some = [Measure("passes", "tminus", 1234.56, "row-steps/s", "float32", rows) for rows in (1, 64)]
    lines = table([*some, replace(some[0], contender="diffusers", value=0.5)]).splitlines()
    assert lines[0] == "| what | of | precision | unit | 1 row | 64 rows |"
    assert lines[2:] == [
        "| passes | tminus | float32 | row-steps/s | 1235 | 1235 |",
        "| passes | diffusers | float32 | row-steps/s | 0.5 |  |",
    ]


@pytest.mark.long
def test_the_bench_of_other_networks_from_start_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.large", "--networks", "tiny", "--contenders", "tminus", "--quick", "1"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "networks.json").read_bytes())
    assert found["left_out"] == []
    tiny = found["tiny"]
    assert min(tiny[key] for key in ("start_s", "second_start_s", "of_peak", "parameters_m")) > 0
    assert tiny["peak_memory_mib"] >= tiny["memory_mib"] > 100
    assert min(tiny[key]["tminus"]["value"] for key in ("saturation", "short", "long")) > 0


def test_without_a_card_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--check"])
    with pytest.raises(SystemExit, match=r"^no GPU: torch \S+ sees no CUDA device; DEVICE=cpu"):
        gpu.main()


@pytest.mark.long
def test_the_bench_of_a_gpu_runs_on_a_cpu_from_start_to_end(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--seconds", "600", "--out", str(tmp_path)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-cpu.json").read_bytes())
    assert [each for each in found["left_out"] if "not installed" not in each] == [
        "what is compiled is not tried on a CPU"
    ]
    measures = [Measure(**each) for each in found["measures"]]
    assert all(each.value > 0 for each in measures if "not exact" not in each.contender)
    for name in ("tiny", "tiny-ldm"):
        of = {(each.what, each.rows) for each in measures if each.network == name}
        whats = (
            "passes",
            "passes, ratio",
            "share of the faster peak",
            "ticks",
            "ticks, ratio",
            "a tick without its pass",
        )
        assert {(what, rows) for what in whats for rows in (1, 4)} <= of
    assert any(each.what == "decoding" for each in measures)
    assert any(each.what.startswith("served") and each.contender == "tminus" for each in measures)
    same = [each.value for each in measures if "same bits" in each.what and each.contender == "tminus eager, exact"]
    assert same == [100] * 4, "alone and repeated, of both networks"
    assert "### tiny-ldm" in done.stdout
