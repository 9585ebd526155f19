import gc
import json
import logging
import math
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.latent.folders import save_latent_pipeline
from tests.service.conftest import Around, MakeCheckpoint
from tests.service.fakes import make_spec
from tminus.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tminus.model.files import CheckpointError
from tminus.service.engine import autotune, devices, loading, openvino_executor, selftest
from tminus.service.engine.autotune import AGREE_ROWS, Choice, Wish, agree_rows
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor
from tminus.service.engine.loading import load_engine, read_checkpoint, smallest_batch_at
from tminus.service.engine.protocol import LoadOptions, sample_locally
from tminus.service.images.encoder import PNG, etag
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import BatchPolicy
from tminus.service.spec import trial_spec
from tminus.service.work import Batch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quick_and_as_before(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(autotune, "TRIAL_S", 0.005)
    monkeypatch.setattr(loading, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "same_alone_and_together", lambda *_, **__: True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


SELFTEST = selftest.same_alone_and_together


@pytest.fixture
def real_selftest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "same_alone_and_together", SELFTEST)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(make_checkpoint: MakeCheckpoint, tmp_path: Path, cache: Path) -> LoadOptions:
    """Of a folder of its own; an executor is chosen once for all tests."""
    checkpoint = make_checkpoint()
    folder = tmp_path / "tiny"
    config = checkpoint.net.config
    save_checkpoint(folder, checkpoint.net.state_dict(), config, checkpoint.noise, checkpoint.labels, {})
    return LoadOptions(folder, device="cpu", executor="eager", threads=1, max_batch=4, cache_dir=cache)


@pytest.fixture
def unmeasured(options: LoadOptions, tmp_path: Path) -> LoadOptions:
    """With a cache of its own."""
    return replace(options, cache_dir=tmp_path / "cache")


@pytest.mark.usefixtures("real_selftest")
def test_what_is_loaded_serves(options: LoadOptions) -> None:
    loaded = load_engine(options)
    info = loaded.engine.info
    assert (info.name, info.exact, info.executor, info.precision) == ("tiny", True, "eager", "float32")
    assert info.class_names == ("cat", "dog", "3d-print")
    assert [places for places, _ in loaded.speed.policy.times.points] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in loaded.speed.policy.times.points)
    assert loaded.speed.policy.max_batch == 4
    images = sample_locally(loaded.engine, trial_spec(info, 3, 5), loaded.speed.policy.max_batch, lambda rows: None)
    assert images.shape == (3, 8, 8, 1)


@pytest.mark.usefixtures("real_selftest")
def test_the_same_folder_loaded_twice_gives_the_same_bytes_and_fingerprint(options: LoadOptions) -> None:
    one, other = load_engine(options), load_engine(options)
    assert one.engine.info == other.engine.info
    spec = trial_spec(one.engine.info, 3, 7, guidance=2.0)
    images = [sample_locally(loaded.engine, spec, 4, lambda rows: None) for loaded in (one, other)]
    np.testing.assert_array_equal(*images)


def test_a_start_imports_nothing_that_takes_longer_than_loading(options: LoadOptions) -> None:
    """torch imports these where values are made on the meta device, or what was traced is compared."""
    program = f"""if True:
        import sys
        from pathlib import Path
        from tminus.service.engine.loading import load_engine
        from tminus.service.engine.protocol import LoadOptions
        load_engine(LoadOptions(Path({str(options.checkpoint)!r}), device="cpu", executor="openvino", threads=1))
        print(*{{"sympy", "torch._dynamo", "torch.distributed.tensor"}} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_measured_batch_is_kept_between_starts_and_a_damaged_answer_is_not_taken(
    unmeasured: LoadOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, rounds_measured = iter([((4, 0.55), (8, 1.0), (16, 9.0)), *[((4, 1.0), (8, 9.0), (16, 9.0))] * 3]), []

    def measure(_engine: object, _max_batch: int, *, rounds: int) -> tuple[tuple[int, float], ...]:
        rounds_measured.append(rounds)
        return next(curves)

    monkeypatch.setattr(loading, "measure_ticks", measure)
    options = replace(unmeasured, max_batch=None)

    def batches() -> tuple[int, int]:
        loaded = load_engine(options)
        return loaded.speed.policy.max_batch, loaded.speed.policy.short_batch

    assert [batches() for _ in range(2)] == [(8, 4)] * 2
    for file in (tmp_path / "cache").iterdir():
        if "short_batch" in json.loads(file.read_bytes()):
            file.write_text('{"max_batch": 8, "short_batch": 17}')
    assert [batches() for _ in range(2)] == [(4, 4)] * 2
    assert rounds_measured == [loading.ROUNDS, 1, loading.ROUNDS, 1], "a start that knows the sizes measures little"


def test_a_round_that_a_slow_tick_ended_early_is_measured_again(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ((1, 0.001), (4, 0.004), (8, 0.005), (16, 0.006))
    curves, rounds_measured = iter([whole, whole[:3], whole, ((1, 2.5),), whole, whole]), []

    def measure(_engine: object, _max_batch: int, *, rounds: int) -> tuple[tuple[int, float], ...]:
        rounds_measured.append(rounds)
        return next(curves)

    monkeypatch.setattr(loading, "measure_ticks", measure)
    options = replace(unmeasured, max_batch=None)
    assert load_engine(options).speed.policy.max_batch == 16
    for _ in range(3):
        loaded = load_engine(options)
        assert (loaded.speed.policy.max_batch, loaded.speed.policy.times.points) == (16, whole)
    most = loading.ROUNDS
    assert rounds_measured == [most, 1, most, 1, most, 1], "the last start had no slow tick"


def test_in_bfloat16_the_fingerprint_of_a_small_network_hashes_as_many_rows_as_autotune_compares(
    make_checkpoint: MakeCheckpoint,
) -> None:
    small, large = make_checkpoint(), make_checkpoint(sample_size=128, block_out_channels=(32, 32))
    assert agree_rows(small, "bfloat16") > AGREE_ROWS
    assert selftest.probe_rows(small, "bfloat16") == agree_rows(small, "bfloat16")
    assert selftest.probe_rows(small, "float32") == selftest.probe_rows(large, "bfloat16") == selftest.PROBE_ROWS


@pytest.mark.parametrize(("max_batch", "short_batch"), [(5, 4), (4, 4)])
def test_a_short_tick_is_as_measured_but_never_longer_than_any(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch, max_batch: int, short_batch: int
) -> None:
    monkeypatch.setattr(loading, "measure_ticks", lambda engine, max_batch, rounds: ((4, 0.55), (8, 1.0)))
    loaded = load_engine(replace(unmeasured, max_batch=max_batch))
    assert (loaded.speed.policy.max_batch, loaded.speed.policy.short_batch) == (max_batch, short_batch)


@pytest.mark.usefixtures("real_selftest")
def test_so_many_rows_and_jobs_as_asked_fit_at_once(options: LoadOptions) -> None:
    loaded = load_engine(replace(options, max_rows=100, max_jobs=20))
    assert loaded.speed.max_rows == 100
    for _ in range(20):
        loaded.engine.add(trial_spec(loaded.engine.info, 5, 50))
    assert load_engine(replace(options, max_rows=4)).speed.max_rows == 4, "few are no hindrance to measuring"


class Mixing(Around):
    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return super().__call__(x, t, class_labels) + 1e-6 * x.mean()


@pytest.mark.usefixtures("real_selftest")
def test_an_executor_that_is_not_exact_after_all_is_refused_with_the_way_out(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(checkpoint: object, device: torch.device, *_args: object, **_more: object) -> Executor:
        return Mixing(EagerExecutor(checkpoint.net, device, sizes=(1,)))  # type: ignore[attr-defined]

    monkeypatch.setattr(loading, "choose_executor", mixing)
    with pytest.raises(ValueError, match="same bits alone and") as caught:
        load_engine(options)
    assert "--no-exact" in str(caught.value), "as the flag is spelled"
    assert not load_engine(replace(options, exact=False)).engine.info.exact


# --- what is tested at a start, and what is not ---


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the next starts test, and the batches of it."""
    seen: list[str] = []
    network, samplers = selftest.network_keeps_rows_apart, selftest.samplers_keep_rows_apart

    def network_keeps_rows_apart(*args: object) -> Iterator[bool | None]:
        number = 0
        for same in network(*args):  # type: ignore[arg-type]
            if same is not None:
                seen.append(f"batch {number}")
                number += 1
            yield same

    def samplers_keep_rows_apart(*args: object) -> bool:
        seen.append("samplers")
        return samplers(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(selftest, "network_keeps_rows_apart", network_keeps_rows_apart)
    monkeypatch.setattr(selftest, "samplers_keep_rows_apart", samplers_keep_rows_apart)
    return seen


def proof_of(options: LoadOptions) -> Path:
    assert options.cache_dir is not None
    (file,) = [file for file in options.cache_dir.glob("choice-*.json") if "bits" in json.loads(file.read_bytes())]
    return file


def test_what_was_tested_is_not_tested_again_unless_a_row_comes_out_otherwise(
    unmeasured: LoadOptions, tested: list[str]
) -> None:
    first = load_engine(unmeasured)
    assert list(first.spare_work or ()) == []
    assert tested == ["samplers", "batch 0", "batch 1", "batch 2"]
    tested.clear()
    assert load_engine(unmeasured).engine.info == first.engine.info
    assert tested == []
    kept = json.loads(proof_of(unmeasured).read_bytes())
    for damaged in (kept | {"row": "0" * 16, "bits": "1" * 16}, kept | {"bits": 3}, []):
        proof_of(unmeasured).write_text(json.dumps(damaged)) if damaged else proof_of(unmeasured).write_text("[]")
        assert load_engine(unmeasured).engine.info == first.engine.info, "the fingerprint is that of what runs here"
        assert len(tested) == 4
        tested.clear()


def test_a_start_tests_for_some_seconds_and_the_rest_is_left_for_when_no_job_runs(
    unmeasured: LoadOptions, tested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "TEST_S", 0.0)
    first = load_engine(unmeasured)
    assert tested == ["samplers", "batch 0"]
    assert first.engine.info.exact
    tested.clear()
    second = load_engine(unmeasured)
    assert tested == [], "a start that found nothing wrong is enough to serve"
    assert second.spare_work is not None
    assert list(second.spare_work)
    assert tested == ["batch 0", "batch 1", "batch 2"]
    assert json.loads(proof_of(unmeasured).read_bytes())["exact"] is True
    assert list(load_engine(unmeasured).spare_work or ()) == []


def test_batches_that_are_larger_than_what_was_tested_are_tested_while_no_job_runs(
    unmeasured: LoadOptions, tested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch sizes are measured again where they are not kept, and may come out otherwise."""
    policies = iter([BatchPolicy.of(size) for size in (2, 4, 3)])
    monkeypatch.setattr(loading, "_measure", lambda *_: loading.Measured({}, next(policies)))
    options = replace(unmeasured, max_batch=None)
    load_engine(options)
    tested.clear()
    assert list(load_engine(options).spare_work or ())
    assert tested == ["batch 0", "batch 1", "batch 2"]
    assert list(load_engine(options).spare_work or ()) == []


def test_bits_that_differ_after_the_start_end_the_promise_and_the_next_start_is_refused(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "TEST_S", 0.0)
    monkeypatch.setattr(selftest, "network_keeps_rows_apart", lambda *_: iter([True, True, False]))
    loaded = load_engine(unmeasured)
    loaded.engine.info = promised = replace(loaded.engine.info, name="mine")
    assert loaded.spare_work is not None
    assert list(loaded.spare_work) == [None]
    told = loaded.engine.info
    assert (told.name, told.exact) == ("mine", False)
    assert told.fingerprint != promised.fingerprint, "or what is made now would be taken for what was promised"
    assert "does not give the same bits" in caplog.text
    with pytest.raises(ValueError, match="same bits alone and") as caught:
        load_engine(unmeasured)
    assert str(proof_of(unmeasured)) in str(caught.value), "or nobody could have it tested again"
    assert not load_engine(replace(unmeasured, exact=False)).engine.info.exact


@pytest.mark.parametrize("long_s", [0.0, 1e9])
def test_a_start_tells_what_it_does_and_for_how_long_where_that_is_known(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch, long_s: float
) -> None:
    monkeypatch.setattr(loading, "LONG_TRIAL_S", long_s)
    told: list[tuple[str, float | None]] = []
    loading.prepare_engine(
        read_checkpoint(unmeasured), unmeasured, progress=lambda what, left_s: told.append((what, left_s))
    )
    steps = [what for what, _ in told]
    assert [steps[0], *steps[-2:]] == [
        "reading how the network runs fastest here, or measuring it",
        "measuring how long ticks take",
        "testing that a row has the same bits alone and among others",
    ]
    left = [left_s for what, left_s in told if what == "measuring how it runs fastest"]
    assert left
    assert all((left_s is None) == (long_s > 0) for left_s in left)


def test_long_ticks_are_not_measured_again_at_a_later_start(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    times = ((1, 0.3), (2, 0.6), (4, 1.2))
    monkeypatch.setattr(loading, "measure_ticks", lambda *_, rounds: measured.append(rounds) or times)
    first, second = load_engine(unmeasured), load_engine(unmeasured)
    assert measured == [loading.ROUNDS]
    assert first.speed.policy.times.points == second.speed.policy.times.points == times


def test_damaged_sizes_and_times_of_ticks_are_measured_again(
    unmeasured: LoadOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    times = ((1, 0.3), (2, 0.6), (4, 1.2))
    monkeypatch.setattr(loading, "measure_ticks", lambda *_, rounds: measured.append(rounds) or times)
    load_engine(unmeasured)
    (file,) = [each for each in (tmp_path / "cache").iterdir() if "short_batch" in json.loads(each.read_bytes())]
    kept = json.loads(file.read_bytes())
    for name, values in {
        "tick_times": (None, 3, [], [[1, "0.3"], [1, 0.4]], [[1, math.nan]], [[1, -1.0]], [[2, 0.5]], [[1, 0.3], [2]]),
        "overlapped": (0.0, 1.5, -0.5, "0.7", True, math.nan, [], {}),
    }.items():
        for value in values:
            measured.clear()
            file.write_text(json.dumps(kept | {name: value}))
            load_engine(unmeasured)
            assert measured, (name, value)


def test_a_gpu_that_is_not_the_first_is_refused_with_the_way_to_get_it(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that is put on a GPU some would land on the first."""
    monkeypatch.setattr(loading, "choose_device", lambda name: torch.device(name))
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1, not cuda:1"):
        load_engine(replace(options, device="cuda:1"))


def test_no_more_jobs_are_taken_than_their_plans_have_room(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "MAX_PLAN_LINES", 20 * 50)
    assert load_engine(replace(options, max_jobs=20)).engine.info.num_timesteps == 50
    with pytest.raises(ValueError, match="num_train_timesteps must be at most 47 to serve a checkpoint, got 50"):
        load_engine(replace(options, max_jobs=21))


def test_a_start_that_finds_other_sizes_with_the_same_bits_keeps_the_fingerprint(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that clients keep what they have."""

    class Resized(Around):
        """Passes of one row that say they are of another size."""

    def of_size(size: int) -> Callable[..., Executor]:
        def choose(checkpoint: Checkpoint, device: torch.device, *_args: object, **_more: object) -> Executor:
            executor = Resized(EagerExecutor(checkpoint.net, device, sizes=(1,)))
            executor.details = f"passes of {size}"
            return executor

        return choose

    infos = []
    for size in (1, 2):
        monkeypatch.setattr(loading, "choose_executor", of_size(size))
        infos.append(load_engine(options).engine.info)
        infos.append(load_engine(replace(options, exact=False)).engine.info)
    assert infos[0].executor_details != infos[2].executor_details
    assert infos[0].fingerprint == infos[2].fingerprint
    assert infos[1].fingerprint != infos[3].fingerprint, "where nothing is promised the details tell"


def test_the_same_weights_under_another_scheduler_have_another_fingerprint_and_other_tags(
    options: LoadOptions, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    noise, net = replace(checkpoint.noise, clip_sample_range=0.5), checkpoint.net
    save_checkpoint(tmp_path / "other", net.state_dict(), net.config, noise, checkpoint.labels, {})
    one = load_engine(options).engine.info
    other = load_engine(replace(options, checkpoint=tmp_path / "other")).engine.info
    assert one.weights_hash == other.weights_hash
    assert one.fingerprint != other.fingerprint
    spec = trial_spec(one, 1, 5)
    assert etag(PNG, spec, one) != etag(PNG, spec, other)


def test_the_loading_thread_is_gone_and_what_was_found_is_in_the_log(
    options: LoadOptions, caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.active_count()
    with caplog.at_level(logging.INFO):
        load_engine(options)
    assert threading.active_count() == before
    assert re.search(r"ticks of 1, 2, 4\b.* places take \d+\.\d\d, ", caplog.text)
    assert "executor eager in float32" in caplog.text


@pytest.mark.usefixtures("real_selftest")
def test_a_class_that_gives_nan_does_not_keep_the_others_from_being_served(
    options: LoadOptions, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Its weights are finite; and the trial jobs are of that class."""
    checkpoint = make_checkpoint()
    state = {key: value.clone() for key, value in checkpoint.net.state_dict().items()}
    state["class_embedding.weight"][0] = 3e38
    save_checkpoint(tmp_path / "nan", state, checkpoint.net.config, checkpoint.noise, checkpoint.labels, {})
    engine = load_engine(replace(options, checkpoint=tmp_path / "nan")).engine
    good = replace(trial_spec(engine.info, 1, 3), class_labels=(2,))
    assert sample_locally(engine, good, 4, lambda rows: None).shape == (1, 8, 8, 1)


def test_a_model_of_which_no_row_fits_the_memory_is_refused_before_it_takes_any(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"sample_size 8x8 of this network takes about .* GiB for one image"):
        loading.read_checkpoint(options)


def test_a_network_that_is_larger_than_memory_is_refused_before_its_weights_are_read(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: 10_000)
    monkeypatch.setattr(loading, "load_checkpoint", lambda _folder: pytest.fail("it was read"))
    with pytest.raises(
        CheckpointError, match=r"tiny: a network of 0\.0 M parameters takes about 0\.0 GiB to load, and 0\.0"
    ):
        loading.read_checkpoint(options)


def test_weights_of_another_precision_are_served_as_float32(options: LoadOptions) -> None:
    file = options.checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.to(torch.bfloat16) for key, value in load_file(file).items()}, file)
    loaded = load_engine(options)
    rows = loaded.engine.add(make_spec(n=1, steps=1))
    loaded.engine.step(Batch(rows, (0,), ()))
    assert loaded.engine.images(rows)().shape == (1, 8, 8, 1)


def test_the_thread_that_asks_for_a_checkpoint_runs_no_torch(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep a team of threads, which the worker's would have to share the cores with."""
    threads: list[threading.Thread] = []

    def load(folder: Path) -> Checkpoint:
        threads.append(threading.current_thread())
        return load_checkpoint(folder)

    monkeypatch.setattr(loading, "load_checkpoint", load)
    loading.read_checkpoint(options)
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


def test_other_weights_of_a_network_that_is_known_are_not_measured(
    options: LoadOptions, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_engine(options)
    other = make_checkpoint(seed=5)
    save_checkpoint(tmp_path / "other", other.net.state_dict(), other.net.config, other.noise, other.labels, {})
    monkeypatch.setattr(loading, "measure_ticks", lambda *args, **kwargs: pytest.fail("it is known"))
    options = replace(options, checkpoint=tmp_path / "other")
    again = loading.prepare_engine(read_checkpoint(options), options, [first.measured])
    assert again.engine.info.weights_hash != first.engine.info.weights_hash
    assert again.speed == first.speed


def test_another_network_or_way_is_measured(
    options: LoadOptions, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_engine(options)
    measured: list[int] = []
    measure_ticks = loading.measure_ticks

    def counted(engine: Engine, max_batch: int, rounds: int) -> tuple[tuple[int, float], ...]:
        measured.append(max_batch)
        return measure_ticks(engine, max_batch, rounds=rounds)

    monkeypatch.setattr(loading, "measure_ticks", counted)
    larger = make_checkpoint(sample_size=16)
    save_checkpoint(tmp_path / "larger", larger.net.state_dict(), larger.net.config, larger.noise, larger.labels, {})
    loading.prepare_engine(read_checkpoint(replace(options, checkpoint=tmp_path / "larger")), options, [first.measured])
    assert measured == [4]
    loading.prepare_engine(read_checkpoint(options), replace(options, max_batch=8), [first.measured])
    assert measured == [4, 8]


def test_a_model_that_is_loaded_after_another_has_all_cores_too(
    options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building an executor sets torch's number of threads, which the next load must not take for the machine's."""
    monkeypatch.setattr(loading, "CORES", 3)
    wished: list[tuple[int, bool]] = []
    choose = loading.choose_executor

    def chosen(
        checkpoint: Checkpoint, device: torch.device, wish: Wish, cache: Path | None, *_: object, **how: bool
    ) -> Executor:
        wished.append((wish.threads, how["shares_cores"]))
        return choose(checkpoint, device, replace(wish, threads=1), cache)

    monkeypatch.setattr(loading, "choose_executor", chosen)
    for threads in (None, None, 3):
        torch.set_num_threads(1)
        load_engine(replace(options, threads=threads))
    assert wished == [(3, True), (3, True), (3, False)]


# --- for one job ---


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((autotune, "_fastest"), (loading, "measure_ticks"), (selftest, "same_alone_and_together")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def places(count: int) -> Callable[[ModelInfo], int]:
    return lambda _info: count


@pytest.mark.usefixtures("nothing_is_measured")
def test_for_little_work_eager_is_taken_and_nothing_is_measured(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[Executor] = []
    probe_bits = loading.probe_bits
    monkeypatch.setattr(
        loading, "probe_bits", lambda executor, *rows: probed.append(executor) or probe_bits(executor, *rows)
    )
    loaded = load_engine(replace(unmeasured, executor="auto", threads=2), places(32))
    info = loaded.engine.info
    assert (info.executor, info.precision, info.exact) == ("eager", "float32", True)
    assert len(probed) == 1, "the engine that the work was measured on is the one that does it"
    several = sample_locally(loaded.engine, trial_spec(info, 3, 5), loaded.speed.policy.max_batch, lambda rows: None)
    alone = sample_locally(
        loaded.engine, replace(trial_spec(info, 1, 5), index=2), loaded.speed.policy.max_batch, lambda rows: None
    )
    np.testing.assert_array_equal(several[2:], alone)
    assert torch.get_num_threads() == 1, "so that the bits are the same on any number of cores"
    assert unmeasured.cache_dir is not None
    assert not unmeasured.cache_dir.exists()


def test_for_little_work_the_choice_of_an_earlier_start_is_taken_unless_another_fingerprint_is_wanted(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    options = replace(unmeasured, executor="auto")
    kept = Choice("openvino", "float32", True, (1, 2))
    monkeypatch.setattr(autotune, "_fastest", lambda *_: kept)
    plain = load_engine(options, places(1)).engine.info
    measured = load_engine(options).engine.info
    request.getfixturevalue("nothing_is_measured")
    assert load_engine(options, places(1)).engine.info == measured
    assert load_engine(options, places(10**9), plain.fingerprint).engine.info == plain
    assert load_engine(options, places(10**9), measured.fingerprint).engine.info == measured


def test_an_executor_that_is_asked_for_is_measured_for_little_work_the_first_time_alone(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    options = replace(unmeasured, executor="openvino")
    monkeypatch.setattr(autotune, "_fastest", lambda *_: Choice("openvino", "float32", True, (1, 2)))
    first = load_engine(options, places(1))
    assert first.measured is not None
    request.getfixturevalue("nothing_is_measured")
    assert load_engine(options, places(1)).engine.info == first.engine.info


def test_for_much_work_or_where_none_has_the_fingerprint_that_is_wanted_all_is_measured(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(loading, "measure_ticks", lambda *_, **__: measured.append(1) or ((1, 0.001), (4, 0.004)))
    load_engine(unmeasured, places(10**9))
    load_engine(unmeasured, places(1), "0" * 16)
    assert len(measured) == 2


def test_where_neither_has_the_fingerprint_that_is_wanted_the_weights_that_openvino_took_over_are_read_again(
    unmeasured: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(unmeasured, executor="auto")
    monkeypatch.setattr(autotune, "_fastest", lambda *_: Choice("openvino", "float32", True, (1, 2)))
    expected = load_engine(options).engine.info
    assert load_engine(options, places(1), "0" * 16).engine.info == expected


@pytest.mark.parametrize("cached", [True, False], ids=["kept", "not kept"])
def test_a_latent_model_is_loaded_for_little_work_after_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Two engines are built of one checkpoint: the second one needs the autoencoder's weights too."""
    save_latent_pipeline(tmp_path / "latent", "kl")
    monkeypatch.setattr(autotune, "_fastest", lambda *_: Choice("openvino", "float32", True, (1,)))
    options = LoadOptions(tmp_path / "latent", device="cpu", threads=1, max_batch=4, cache_dir=tmp_path / "cache")
    expected = load_engine(options).engine.info
    if not cached:
        monkeypatch.setattr(openvino_executor.KeptGraph, "read", lambda *_: None)
        monkeypatch.setattr(openvino_executor.KeptGraph, "write", lambda *_: None)
    assert load_engine(options, places(1)).engine.info == expected


def test_an_autoencoder_s_weights_are_freed_once_openvino_has_them_though_bits_are_left_to_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_latent_pipeline(tmp_path / "latent", "kl")
    monkeypatch.setattr(autotune, "_fastest", lambda *_: Choice("openvino", "float32", True, (1,)))
    monkeypatch.setattr(loading, "TEST_S", 0.0)
    options = LoadOptions(tmp_path / "latent", device="cpu", threads=1, max_batch=4, cache_dir=tmp_path / "cache")
    checkpoint = read_checkpoint(options)
    assert checkpoint.autoencoder is not None
    weights = weakref.ref(next(checkpoint.autoencoder.parameters()))
    loaded = loading.prepare_engine(checkpoint, options)
    del checkpoint
    gc.collect()
    assert weights() is None
    assert list(loaded.spare_work or ())


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_job_that_the_model_cannot_do_is_refused_before_anything_is_measured(unmeasured: LoadOptions) -> None:
    def places_of(info: ModelInfo) -> int:
        raise ValueError(f"steps must be in 1..{info.num_timesteps}, got 51")

    with pytest.raises(ValueError, match="got 51"):
        load_engine(unmeasured, places_of)


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8), st.floats(0.5, 1.0))
def test_the_batch_has_its_share_of_the_best_throughput_and_no_smaller_one_has(
    seconds: list[float], share: float
) -> None:
    points = [(2**k, s) for k, s in enumerate(seconds)]
    best = max(places / s for places, s in points)
    chosen = smallest_batch_at(points, share)
    assert dict(points)[chosen] <= chosen / (share * best) * (1 + 1e-12)
    assert all(places / s < share * best for places, s in points if places < chosen)
