"""The benchmark's arithmetic, its arrivals, its client and its peers; nothing here measures anything."""

import asyncio
import io
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from fastapi import FastAPI, Response
from PIL import Image, ImageChops

from bench import arrivals, bare, client, cluster, figures, report, same, servers, traffic
from bench.__main__ import parse_args
from bench.conductor import same_places
from bench.loads import QUICK, Lengths
from bench.peers.picture import encode
from bench.records import Answer, Arrival, Ask, Bare, Counters, Crowd, Etas, EtaSample, Loaded, Memory, Pace, Run
from bench.servers import ROOT, contenders, cpu_seconds, sum_metrics
from bench.tally import Tally, read_tally
from tests.service.fakes import INFO, LIMITS
from tests.tiny import TINY
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.service.api.request.schemas import SampleRequest

pytestmark = pytest.mark.slow

PNG = encode([Image.new("L", (2, 2))], 0.0)
PLAIN_PNG = io.BytesIO()
Image.new("L", (2, 2)).save(PLAIN_PNG, "PNG")


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
    counted = Counters(10 * rate, 10 * rate, 100, 9.0, 5.0)
    return replace(Loaded(load, contender, number, 10.0, counted, 10 * rate, tuple(answers)), **changes)


def a_run(loads: Sequence[Loaded] = (), **changes: object) -> Run:
    machine: dict[str, str | int] = dict.fromkeys(("cpu", "capability", "cores", "torch", "python", "system"), "x")
    model = {"executor": "eager", "precision": "float32", "limits": {"max_batch": 8}}
    bare_run = Bare(1, "eager", "float32", 10_000_000, 1e9, 3e9, 2e9, {1: Pace(50, 0.01), 8: Pace(200, 0.01)})
    run = Run(
        "python -m bench", "today", "abc", 0.1, 60.0, "toy", False, machine, model, {"lock": "one thread."}, (), 100.0,
        tuple(loads), (bare_run,),
    )  # fmt: skip
    return replace(run, **changes)


def figure_of(run: Run, *words: str) -> figures.Figure:
    (found,) = [figure for figure in figures.figures(run) if all(word in figure.name for word in words)]
    return found


# --- figures ---


def test_quantiles_are_linear_between_the_values() -> None:
    assert figures.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert figures.quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert figures.quantile([4.0], 0.95) == 4.0


def test_a_ratio_is_of_medians_with_the_range_of_the_rounds() -> None:
    ours = [loaded("saturation", "tminus", rate, number=number) for number, rate in enumerate((90, 96, 99))]
    theirs = [loaded("saturation", "lock", rate, number=number) for number, rate in enumerate((40, 60, 48))]
    found = figure_of(a_run(ours + theirs), "requests of 1 image", "lock")
    assert (found.value, found.low, found.high) == (96 / 48, 96 / 60, 90 / 40)


def test_a_run_beside_an_earlier_checkout_has_figures_of_both_samplers() -> None:
    rates = {"tminus": 101, "before": 100}
    run = a_run(
        [loaded(load, key, rate) for load in ("saturation", "saturation-dpmpp_2m") for key, rate in rates.items()]
    )
    assert figure_of(run, "requests of 1 image", "tminus before").value == pytest.approx(1.01)
    assert figure_of(run, "row-steps/s, dpmpp_2m", "tminus before").value == pytest.approx(1.01)
    assert "### Saturation, `dpmpp_2m`" in report.to_markdown(run)


def test_the_bare_loop_counts_at_the_servers_own_batch() -> None:
    assert figure_of(a_run([loaded("saturation", "tminus", 150)]), "bare").value == pytest.approx(150 / 200)


def test_in_the_mixed_load_the_peer_is_over_tminus_for_waits_and_under_it_for_long_jobs() -> None:
    ours = [answer(20, 0.5), answer(20, 0.7), answer(1000, 40)]
    theirs = [answer(20, 30), answer(20, 30), answer(1000, 50)]
    run = a_run([loaded("mixed", "tminus", answers=ours), loaded("mixed", "litserve", answers=theirs)])
    assert figure_of(run, "median wait").value == pytest.approx(30 / 0.6)
    assert figure_of(run, "long jobs").value == pytest.approx(40 / 50)


def test_who_has_no_answer_at_the_end_waited_at_least_so_long_and_who_left_or_was_refused_does_not_count() -> None:
    outcomes = ("ok", "unanswered", "left", "refused", "failed", "unsent")
    answers = [answer(waited_s=float(number), outcome=outcome) for number, outcome in enumerate(outcomes)]
    assert figures.waits(answers) == [0.0, 1.0]


def test_policies_are_compared_by_short_tail_and_long_mean() -> None:
    default = loaded("policy", "tminus", answers=[answer(20, 1.0), answer(1000, 44.0)])
    fcfs = loaded("policy", "fcfs", answers=[answer(20, 30.0), answer(1000, 40.0)])
    run = a_run([default, fcfs])
    assert figure_of(run, "99th percentile").value == pytest.approx(30)
    assert figure_of(run, "1000-step jobs").value == pytest.approx(40 / 44)


def test_the_first_step_is_told_in_mean_ticks_of_its_own_load_and_without_the_long_job() -> None:
    answers = [answer(3, first_step_s=0.18), answer(1000, first_step_s=9.0)]
    assert figure_of(a_run([loaded("first-step", "tminus", answers=answers)]), "place free").value == pytest.approx(2)


def test_steps_that_nobody_got_are_wasted() -> None:
    answers = [answer(20), answer(50, outcome="left")]
    noticed = loaded("hang-ups", "tminus", answers=answers, took_row_steps=25.0)
    blind = loaded("hang-ups", "lock", answers=answers, took_row_steps=70.0)
    assert figures.wasted_share(noticed) == pytest.approx(5 / 25)
    assert (figures.wasted_of_abandoned(noticed), figures.wasted_of_abandoned(blind)) == (0.1, 1.0)
    assert figures.wasted_of_abandoned(loaded("hang-ups", "lock", answers=[answer()])) is None


def test_an_eta_is_judged_by_what_was_left_as_a_share_of_the_whole_time() -> None:
    done = answer(waited_s=10.0, job_id="a")
    told = [EtaSample(2.0, "a", 9.0), EtaSample(9.9, "a", 5.0), EtaSample(2.0, "never answered", 1.0)]
    assert figures.eta_errors(Etas(tuple(told), (done,))) == [pytest.approx(0.1)]


def test_crowds_and_memory_are_ratios_of_the_later_to_the_first() -> None:
    crowds = (Crowd(0, 0.02, 0.020, 16), Crowd(1000, 0.022, 0.0252, 16), Crowd(0, 0.02, 0.022, 16))
    run = a_run(crowds=crowds, memory=(Memory(500, 1e8), Memory(10_000, 1.1e8)))
    assert figure_of(run, "1000 jobs waiting", "between ticks").value == pytest.approx(1.2)
    assert figure_of(run, "resident memory").value == pytest.approx(1.1)


def test_images_are_compared_by_job_and_only_where_both_were_answered() -> None:
    one = [answer(seed=0, digest="a"), answer(seed=1, digest="b"), answer(seed=2, outcome="failed")]
    other = [answer(seed=2, digest="c"), answer(seed=1, digest="x"), answer(seed=0, digest="a")]
    assert same_places(one, other) == [("b", "x"), ("a", "a")]


# --- report ---


def test_a_run_survives_json_and_becomes_a_page(tmp_path: Path) -> None:
    answers = [answer(20), answer(1000, 40.0, outcome="unanswered")]
    run = a_run([loaded("mixed", key, answers=answers) for key in ("tminus", "lock")], left_out=("mosec is left out.",))
    report.write(run, tmp_path / "results")
    assert report.from_json((tmp_path / "results" / "latest.json").read_bytes()) == run
    page = (tmp_path / "results" / "latest.md").read_text()
    assert "### Long and short" in page
    assert "| lock around DDPMPipeline | 1 x 20 | 1 of 1 |" in page
    assert "0 of 1 (1 unanswered)" in page
    assert "mosec is left out." in page


def test_results_go_between_the_marks_of_a_page_and_leave_the_rest() -> None:
    page = f"# Title\n{report.BEGIN}\nold\n{report.END}\nprose\n"
    written = report.into_page(page, "new\n")
    assert written == f"# Title\n{report.BEGIN}\n\nnew\n\n{report.END}\nprose\n"
    assert report.into_page(written, "new\n") == written
    with pytest.raises(ValueError, match="the page has no"):
        report.into_page("# Title\n", "new")


def test_the_page_in_the_documentation_has_the_marks() -> None:
    report.into_page((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "new")


def test_the_picture_can_be_drawn_of_whatever_was_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import plot

    plot(a_run(), tmp_path / "none.svg")
    mixed = [loaded("mixed", key, answers=[answer(20, 0.5)]) for key in ("tminus", "lock")]
    plot(a_run([*mixed, loaded("saturation", "tminus")]), tmp_path / "some.svg")
    assert "LitServe" not in (tmp_path / "some.svg").read_text()


# --- arrivals ---


def test_arrivals_are_the_same_each_time_in_order_and_within_the_time() -> None:
    made = arrivals.poisson([Ask(1, 20)] * 50, 30.0, seed=1)
    assert made == arrivals.poisson([Ask(1, 20)] * 50, 30.0, seed=1)
    times = [a.at_s for a in made]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= 30
    assert len({a.seed for a in made}) == 50


def test_the_step_counts_have_their_shares_and_the_load_is_exact() -> None:
    made = arrivals.of_steps(4, 300.0, 100.0, most_steps=1000)
    assert sum(a.ask.row_steps for a in made) / 100 == pytest.approx(300, rel=0.05)
    for steps, share in arrivals.STEP_SHARES.items():
        assert sum(a.ask.steps == steps for a in made) / len(made) == pytest.approx(share, abs=0.015)


def test_an_exact_share_hangs_up_within_the_expected_time() -> None:
    made = arrivals.with_hang_ups(arrivals.at_once([Ask(2, 50)] * 40), 0.2, seconds_per_row_step=0.01)
    leaving = [a.leaves_after_s for a in made if a.leaves_after_s is not None]
    assert len(leaving) == 8
    assert max(leaving) <= 2 * 50 * 0.01


def test_saturating_starts_full_and_goes_on_over_capacity() -> None:
    made = arrivals.saturating(Ask(1, 50), 48, 1000.0, 10.0)
    assert sum(a.at_s == 0 for a in made) == 48
    assert len(made) == 48 + 200
    assert [a.seed for a in made] == list(range(248))


def test_all_kinds_have_every_sampler_guided_and_not_and_no_guidance_without_classes() -> None:
    model = {
        "samplers": ["ddpm", "heun", "tuned"],
        "null_class": 10,
        "tables": [{"sampler": "tuned", "steps": 8, "guidance": 1.5}],
    }
    ways = arrivals.all_ways(model, (5, 10))
    assert {*ways} == {(name, steps, g) for name in ("ddpm", "heun") for steps in (5, 10) for g in (1.0, 2.0)} | {
        ("tuned", 8, 1.5)
    }
    made = arrivals.of_all_kinds(300, ways, 10)
    assert {(ask.sampler, ask.steps, ask.guidance) for ask in made} == {*ways}
    assert {ask.n for ask in made} == {1, 2, 3}
    without = arrivals.of_all_kinds(20, arrivals.all_ways(model | {"null_class": None, "tables": []}, (5,)), 0)
    assert all(ask.class_label is None and ask.guidance == 1 for ask in without)


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


def test_each_outcome_has_its_name() -> None:
    async def reply(seed: int) -> Response:
        if seed == 0:
            return Response(status_code=429)
        if seed == 1:
            return Response(b"no picture")
        if seed in (2, 3):
            await asyncio.Event().wait()
        return Response(
            PLAIN_PNG.getvalue(), headers={"X-Job-ID": "j", "Server-Timing": "queue;dur=1.0, first_step;dur=250.0"}
        )

    comers = [Arrival(0.0, Ask(1, 5), seed, leaves_after_s=0.05 if seed == 2 else None) for seed in range(5)]
    answers = {a.seed: a for a in drive_on(answering(reply), comers, drain_s=0.3)}
    assert [answers[seed].outcome for seed in range(5)] == ["refused", "failed", "left", "unanswered", "ok"]
    assert (answers[4].job_id, answers[4].first_step_s) == ("j", 0.25)
    assert answers[3].waited_s >= 0.3


def test_over_the_cap_a_request_is_not_sent_and_is_counted() -> None:
    async def reply(_seed: int) -> Response:
        await asyncio.sleep(0.05)
        return Response(PNG, headers={"X-Job-ID": "j"})

    answers = drive_on(answering(reply), arrivals.at_once([Ask(1, 5)] * 3), most_outstanding=2)
    assert sorted(a.outcome for a in answers) == ["ok", "ok", "unsent"]


# --- servers and peers ---


def test_metrics_are_summed_over_their_labels() -> None:
    text = 'a_total{x="1"} 2\na_total{x="2"} 3\n'
    assert sum_metrics(f"# TYPE a counter\n{text}") == {"a_total": 5.0}


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")
def test_processor_time_counts_children_too() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = cpu_seconds(child.pid)
        end = time.monotonic() + 10
        while cpu_seconds(child.pid) == before:
            assert time.monotonic() < end
        assert cpu_seconds(child.pid) is not None
    finally:
        child.kill()
        child.wait()
    assert cpu_seconds(child.pid) is None


def test_a_tally_is_the_sum_of_all_processes(tmp_path: Path) -> None:
    tally = Tally(tmp_path)
    tally.add(4)
    tally.add(3)
    (tmp_path / "another").write_bytes((tmp_path / next(iter(tmp_path.iterdir())).name).read_bytes())
    assert read_tally(tmp_path) == (14, 4)


def test_quick_is_one_short_round_and_an_unknown_load_is_refused() -> None:
    assert QUICK.rounds == 1
    assert Lengths().rounds == 3
    assert parse_args(["--only", "idle,burst"]).only == ["idle", "burst"]
    with pytest.raises(SystemExit):
        parse_args(["--only", "idle,nothing"])


def test_a_peer_gets_no_flags_of_tminus() -> None:
    assert all(one.is_peer == (one.command[0] != "tminus") for one in contenders(2).values())
    assert contenders(4)["litserve"].command[1:] == ("--workers", "4", "--threads", "1")


@pytest.mark.parametrize("name", ["tminus", "service"])
def test_another_checkout_takes_part_under_its_own_code(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--before", str(tmp_path)])
    (tmp_path / name).mkdir()
    (tmp_path / name / "__main__.py").touch()
    args = parse_args(["--before", str(tmp_path)])
    assert args.contenders[0] == "before"
    found = contenders(2, before=args.before)
    assert found["before"].tree == tmp_path
    assert found["before"].command == (name, *found["tminus"].command[1:])
    assert list(found)[:2] == ["tminus", "before"]


def test_what_both_checkouts_are_asked_is_the_same_each_time_and_uses_every_parameter() -> None:
    asked = [same.request(k, INFO.class_names) for k in range(50)]
    assert asked == [same.request(k, INFO.class_names) for k in range(50)]
    bodies = [body for _, body in asked]
    sample = {*SampleRequest.model_fields} - {"deadline_s", "image_sha256", "mask_sha256", "nearest", "table"}
    assert sample | {"every", "show"} == {name for body in bodies for name in body}
    assert {accept for accept, _ in asked} == {"image/png", "application/zip", "application/json", "image/webp"}
    for body in bodies:
        SampleRequest.parse(
            {name: value for name, value in body.items() if name not in ("every", "show")}, INFO, LIMITS
        )


def test_counting_flops_counts_the_attention_too(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert bare.flops_per_row(checkpoint) > 2 * 9 * 8 * 8 * 8 * 8  # one convolution of the widest map alone
    without = replace(checkpoint.net.config, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    fewer = replace(checkpoint, net=UNet2D(without).eval())
    assert bare.flops_per_row(fewer) < bare.flops_per_row(checkpoint)


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
    assert found.first_step_s is not None
    assert 0 < found.first_step_s <= found.waited_s
    assert read_tally(tallies) == (6, 3)


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


def far_apart(png: bytes, other: bytes) -> int:
    """The greatest difference in grey levels."""
    with Image.open(io.BytesIO(png)) as one, Image.open(io.BytesIO(other)) as two:
        extrema = ImageChops.difference(one, two).getextrema()
    return int(extrema[1])


def test_a_quick_run_from_start_to_end(folder: Path, tmp_path: Path) -> None:
    """A real server with a tiny model: every figure that needs only tminus is there."""
    out = tmp_path / "results"
    command = [sys.executable, "-m", "bench", "--quick", "--checkpoint", str(folder), "--contenders", "tminus"]
    command += ["--only", "idle,saturation,burst,hang-ups", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    run = report.from_json((out / "latest.json").read_bytes())
    # Where nothing can be kept between starts, each finds its own number of places; the page says so.
    assert [line for line in run.left_out if "places a tick" not in line] == []
    assert {one.load for one in run.loads} == {"idle", "saturation", "burst", "hang-ups"}
    (burst,) = figures.of(run, "burst", "tminus")
    assert [a.outcome for a in burst.answers] == ["ok"] * QUICK.burst
    assert burst.took_row_steps == figures.received(burst.answers)
    assert all(a.first_step_s is not None for a in burst.answers)


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
