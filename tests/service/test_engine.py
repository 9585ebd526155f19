import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.data import to_uint8
from model.noise import NoiseConfig
from model.rng import image_noise
from model.samplers import sample
from service import engine as engine_module
from service.engine import Engine, choose_device, default_max_rows, describe
from service.job import Batch, SampleSpec
from service.local import sample_locally
from service.scheduler import Scheduler
from tests.service.conftest import MakeCheckpoint
from tests.service.fakes import make_spec

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float32]


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Engine.images return x itself instead of rounding it to bytes."""
    monkeypatch.setattr(engine_module, "to_uint8", lambda x: x)


@pytest.fixture
def forward_sizes(tiny: Checkpoint) -> Iterator[list[int]]:
    """The batch size of each forward pass of the tiny net."""
    sizes: list[int] = []
    handle = tiny.net.register_forward_hook(lambda net, args, out: sizes.append(len(args[0])))
    yield sizes
    handle.remove()


def make_engine(
    checkpoint: Checkpoint, *, max_rows: int = 32, max_jobs: int = 16, device: torch.device = CPU
) -> Engine:
    return Engine(checkpoint, device, max_rows=max_rows, max_jobs=max_jobs)


def spec_of(**fields: object) -> SampleSpec:
    return make_spec(**{"steps": 10, "n": 1} | fields)


# Mixed in every way a batch may be: samplers, step counts, eta, classes, none, guidance, clip, index, number of rows.
MIXED = (
    spec_of(n=2, steps=50, seed=1, class_labels=(0, 2)),
    spec_of(n=3, steps=10, seed=2, sampler="ddim", class_labels=(1, None, 0)),
    spec_of(n=2, steps=7, seed=3, guidance=3.0, class_labels=(2, 1)),
    spec_of(n=1, steps=50, seed=4, sampler="ddim", eta=1.0, guidance=1.5, class_labels=(0,)),
    spec_of(n=1, steps=1, seed=5),
    spec_of(n=2, steps=13, seed=2**64 - 1, sampler="ddim", eta=0.3, clip=False, index=2**32 - 2),
    spec_of(n=1, steps=3, seed=7, guidance=0.0, class_labels=(1,), index=9),
)


def alone(checkpoint: Checkpoint, spec: SampleSpec, device: torch.device = CPU) -> Floats:
    """The images of a job that has the engine for itself."""
    return sample_locally(make_engine(checkpoint, device=device), spec, 32, lambda rows: None).images


def together(engine: Engine, specs: Sequence[SampleSpec], *, max_batch: int, seed: int = 0) -> list[Floats]:
    """The images of jobs that arrive at random ticks and share the engine and its batches."""
    rng, scheduler = random.Random(seed), Scheduler(max_batch)
    order = list(range(len(specs)))
    rng.shuffle(order)
    rows: dict[str, tuple[int, ...]] = {}
    images: dict[str, Floats] = {}
    while len(images) < len(specs):
        if order and (not scheduler.num_rows or rng.random() < 0.3):
            k = order.pop()
            rows[str(k)] = engine.add(specs[k])
            scheduler.add(str(k), rows[str(k)], specs[k].steps, specs[k].places_per_row)
        batch = scheduler.next_batch()
        if batch is None:
            continue
        engine.step(batch)
        for job in scheduler.advance(batch).finished:
            images[job] = engine.images(rows[job])
            engine.remove(rows[job])
    return [images[str(k)] for k in range(len(specs))]


def independent(checkpoint: Checkpoint, spec: SampleSpec) -> Floats:
    """The images by model.samplers.sample, which moves one batch in step."""
    shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
    plan = make_engine(checkpoint).compile(spec)
    indices = range(spec.index, spec.index + spec.n)
    labels = None
    if spec.class_labels is not None:
        null = checkpoint.labels.null_class
        labels = torch.tensor([null if label is None else label for label in spec.class_labels])
    x = sample(
        checkpoint.net,
        plan,
        image_noise(spec.seed, indices, 0, shape, CPU),
        lambda k: image_noise(spec.seed, indices, k + 1, shape, CPU),
        class_labels=labels,
        null_class=checkpoint.labels.null_class,
        guidance=spec.guidance,
    )
    return x.permute(0, 2, 3, 1).numpy()


# --- a batch of strangers ---


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("max_batch", [2, 5, 16])
def test_rows_that_differ_in_everything_share_batches_and_get_the_images_they_get_alone(
    tiny: Checkpoint, max_batch: int
) -> None:
    shared = together(make_engine(tiny), MIXED, max_batch=max_batch, seed=max_batch)
    for spec, images in zip(MIXED, shared, strict=True):
        np.testing.assert_allclose(images, alone(tiny, spec), atol=1e-5, rtol=1e-5, err_msg=str(spec))


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("spec", MIXED, ids=lambda spec: f"seed{spec.seed}")
def test_the_engine_agrees_with_the_independent_loop(tiny: Checkpoint, spec: SampleSpec) -> None:
    images = alone(tiny, spec)
    assert images.shape == (spec.n, 8, 8, 1)
    np.testing.assert_allclose(images, independent(tiny, spec), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("floats")
def test_all_of_a_spec_matters(tiny: Checkpoint) -> None:
    """Or the tests above would compare images that a lost field leaves alone."""
    base = spec_of(sampler="ddim", eta=0.5, guidance=2.0, class_labels=(0,), clip=True)
    others = ({"steps": 9}, {"sampler": "ddpm"}, {"eta": 0.6}, {"guidance": 2.5}, {"class_labels": (1,)})
    others += ({"clip": False}, {"seed": 2}, {"seed": 1 + 2**32}, {"index": 1}, {"guidance": 1.0})  # type: ignore[assignment]
    images = alone(tiny, base)
    for change in others:
        other = alone(tiny, replace(base, **change))  # type: ignore[arg-type]
        assert np.abs(other - images).max() > 1e-3, change
    null = alone(tiny, replace(base, class_labels=(None,), guidance=1.0))
    assert np.abs(null - alone(tiny, replace(base, guidance=1.0))).max() > 1e-3


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("fields", [{}, {"guidance": 2.0}, {"sampler": "ddim", "eta": 0.7}])
def test_image_k_made_alone_is_image_k_of_the_batch(tiny: Checkpoint, fields: dict[str, object]) -> None:
    spec = spec_of(n=4, index=5, class_labels=(0, 1, 2, 1), **fields)
    batch = alone(tiny, spec)
    for k in range(4):
        one = replace(spec, n=1, index=5 + k, class_labels=spec.class_labels[k : k + 1])  # type: ignore[index]
        np.testing.assert_allclose(alone(tiny, one)[0], batch[k], atol=1e-5)
    assert np.abs(batch[1] - batch[3]).max() > 1e-3, "the index makes images of one class differ"


def test_the_same_seed_gives_the_same_bytes_again(tiny: Checkpoint) -> None:
    spec = spec_of(n=3, guidance=2.0)
    assert alone(tiny, spec).tobytes() == alone(tiny, spec).tobytes()


def test_images_are_bytes_rounded_as_training_data_is(tiny: Checkpoint) -> None:
    spec = spec_of(n=3, seed=11)
    images = alone(tiny, spec)
    expected = to_uint8(torch.from_numpy(independent(tiny, spec).copy())).numpy()
    assert images.dtype == np.uint8
    assert images.std() > 10, "not a blank image"
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)
    assert (images == expected).mean() > 0.99


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_other_predictions_and_variances_agree_with_the_independent_loop(
    make_checkpoint: MakeCheckpoint, prediction_type: str, variance_type: str
) -> None:
    noise = NoiseConfig(num_train_timesteps=20, prediction_type=prediction_type, variance_type=variance_type)
    checkpoint, spec = make_checkpoint(noise=noise), spec_of(n=2, steps=20)
    np.testing.assert_allclose(alone(checkpoint, spec), independent(checkpoint, spec), atol=1e-5, rtol=1e-5)


# --- other models ---


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"classes": False}, (8, 8, 1)),
        ({"in_channels": 3, "out_channels": 3}, (8, 8, 3)),
        ({"sample_size": (4, 10)}, (4, 10, 1)),
        ({"classes": False, "in_channels": 3, "out_channels": 3, "sample_size": (12, 6)}, (12, 6, 3)),
    ],
    ids=["unconditional", "colour", "wide", "unconditional colour tall"],
)
def test_models_of_other_shapes(
    make_checkpoint: MakeCheckpoint, fields: dict[str, object], shape: tuple[int, int, int]
) -> None:
    checkpoint = make_checkpoint(**fields)
    labels = (0, 1) if checkpoint.labels.class_names else None
    specs = [spec_of(n=2, class_labels=labels), spec_of(n=2, steps=7, sampler="ddim", seed=2, class_labels=labels)]
    for spec, images in zip(specs, together(make_engine(checkpoint), specs, max_batch=3), strict=True):
        assert images.shape == (2, *shape)
        np.testing.assert_allclose(images, independent(checkpoint, spec), atol=1e-5, rtol=1e-5)


# --- against diffusers ---


def diffusers_images(
    checkpoint: Checkpoint, spec: SampleSpec, monkeypatch: pytest.MonkeyPatch, scheduler_name: str
) -> Floats:
    """The images by diffusers' U-Net and scheduler with our weights and our noise."""
    import diffusers
    from diffusers.schedulers import scheduling_ddpm

    config = {key: value for key, value in checkpoint.net.config.to_dict().items() if not key.startswith("_")}
    net = diffusers.UNet2DModel(**config).eval()
    net.load_state_dict(checkpoint.net.state_dict())
    scheduler = getattr(diffusers, scheduler_name).from_config(checkpoint.noise.to_dict())
    scheduler.set_timesteps(spec.steps)
    shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
    indices = range(spec.index, spec.index + spec.n)
    draws = [image_noise(spec.seed, indices, draw, shape, CPU) for draw in range(spec.steps + 1)]
    null = checkpoint.labels.null_class
    labels = torch.tensor([null if label is None else label for label in spec.class_labels or ()])
    x = draws[0]
    with torch.inference_mode():
        for k, t in enumerate(scheduler.timesteps):
            out = net(x, t, labels).sample
            if spec.guided:
                out_u = net(x, t, torch.full_like(labels, null)).sample
                out = out_u + spec.guidance * (out - out_u)
            z = draws[k + 1]
            if scheduler_name == "DDIMScheduler":
                # eps is taken from the clipped x0 here, as the one update rule does.
                step = scheduler.step(out, t, x, eta=spec.eta, use_clipped_model_output=True, variance_noise=z)
            else:

                def randn(*_args: object, z: Tensor = z, **_kwargs: object) -> Tensor:
                    return z

                monkeypatch.setattr(scheduling_ddpm, "randn_tensor", randn)
                step = scheduler.step(out, t, x)
            x = step.prev_sample
    images: Floats = x.permute(0, 2, 3, 1).numpy()
    return images


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("steps", [50, 10, 1])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddpm_agrees_with_diffusers(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    variance_type: str,
    guidance: float,
) -> None:
    noise = NoiseConfig(num_train_timesteps=50, beta_end=0.1, variance_type=variance_type)
    checkpoint, spec = make_checkpoint(noise=noise), spec_of(n=2, steps=steps, guidance=guidance, class_labels=(0, 2))
    ours, theirs = alone(checkpoint, spec), diffusers_images(checkpoint, spec, monkeypatch, "DDPMScheduler")
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("steps", [50, 10, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_agrees_with_diffusers(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    eta: float,
    set_alpha_to_one: bool,
) -> None:
    noise = NoiseConfig(num_train_timesteps=50, beta_end=0.1, set_alpha_to_one=set_alpha_to_one, default_sampler="ddim")
    checkpoint = make_checkpoint(noise=noise)
    spec = spec_of(n=2, steps=steps, sampler="ddim", eta=eta, class_labels=(1, None))
    ours, theirs = alone(checkpoint, spec), diffusers_images(checkpoint, spec, monkeypatch, "DDIMScheduler")
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-4)


# --- forward passes ---


def test_a_tick_is_one_forward_pass_of_the_batchs_places(tiny: Checkpoint, forward_sizes: list[int]) -> None:
    engine = make_engine(tiny)
    plain = engine.add(spec_of(n=3))
    guided = engine.add(spec_of(n=2, guidance=2.0))
    batches = [
        Batch(plain, (0, 0, 0), ()),
        Batch((*plain, *guided), (1, 1, 1, 0, 0), (3, 4)),
        Batch((guided[0], plain[2], guided[1]), (1, 2, 1), (0, 2)),
        Batch(guided, (2, 2), (0, 1)),
    ]
    for batch in batches:
        engine.step(batch)
    assert forward_sizes == [3, 7, 5, 4] == [batch.places for batch in batches]


def test_an_unguided_job_of_a_class_costs_no_null_class_pass(tiny: Checkpoint, forward_sizes: list[int]) -> None:
    sample_locally(make_engine(tiny), spec_of(n=4, steps=5), 8, lambda rows: None)
    assert forward_sizes == [4] * 5


@pytest.mark.usefixtures("floats")
def test_the_order_of_rows_in_a_batch_does_not_matter(tiny: Checkpoint) -> None:
    spec = spec_of(n=3, steps=2, guidance=2.0, class_labels=(0, 1, 2))
    images = []
    for order in ((0, 1, 2), (2, 0, 1)):
        engine = make_engine(tiny)
        rows = engine.add(spec)
        for step in range(2):
            engine.step(Batch(tuple(rows[i] for i in order), (step,) * 3, (0, 1, 2)))
        images.append(engine.images(rows))
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)


@pytest.mark.usefixtures("floats")
def test_a_row_that_is_not_in_the_batch_stands_still(tiny: Checkpoint) -> None:
    engine = make_engine(tiny)
    rows, others = engine.add(spec_of(n=2)), engine.add(spec_of(n=2, seed=2))
    before = engine.images(rows)
    np.testing.assert_array_equal(before, image_noise(1, (0, 1), 0, (1, 8, 8), CPU).permute(0, 2, 3, 1).numpy())
    engine.step(Batch(others, (0, 0), ()))
    np.testing.assert_array_equal(engine.images(rows), before)


# --- slots ---


def test_a_removed_jobs_slots_go_to_the_next(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=4, max_jobs=2)
    first = engine.add(spec_of(n=4))
    assert len(set(first)) == 4
    engine.remove(first)
    assert set(engine.add(spec_of(n=4))) == set(first)


def test_slots_and_plans_that_are_all_taken_are_a_programmers_mistake(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=4, max_jobs=2)
    engine.add(spec_of(n=3))
    with pytest.raises(AssertionError):
        engine.add(spec_of(n=2))
    engine.add(spec_of(n=1))
    with pytest.raises(AssertionError):
        make_engine(tiny, max_rows=4, max_jobs=0).add(spec_of())


def test_thousands_of_jobs_come_and_go_without_a_leak(tiny: Checkpoint) -> None:
    rng, engine = random.Random(0), make_engine(tiny, max_rows=12, max_jobs=5)
    held: list[tuple[int, ...]] = []
    for _ in range(3000):
        n = rng.randint(1, 4)
        if held and (len(held) == 5 or sum(map(len, held)) + n > 12):
            engine.remove(held.pop(rng.randrange(len(held))))
        else:
            held.append(engine.add(spec_of(n=n, steps=rng.choice([1, 50]), seed=rng.getrandbits(64))))
        taken = [row for rows in held for row in rows]
        assert len(set(taken)) == len(taken), "two jobs share a slot"
    for rows in held:
        engine.remove(rows)
    jobs = [engine.add(spec_of(n=2)) for _ in range(5)]
    assert len({row for rows in jobs for row in rows}) == 10
    for rows in jobs:
        engine.remove(rows)
    assert sorted(engine.add(spec_of(n=12))) == list(range(12))


def test_a_slots_former_row_leaves_no_trace(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=4, max_jobs=4)
    former = (
        spec_of(n=4, steps=50, seed=9, guidance=7.0, class_labels=(2, 2, 2, 2), index=100),
        spec_of(n=3, steps=50, seed=8, sampler="ddim", eta=1.0, clip=False, class_labels=(1, 1, 1)),
    )
    for spec in (spec_of(n=4, steps=3, seed=4), spec_of(n=2, steps=7, guidance=2.0)):
        expected = alone(tiny, spec).tobytes()
        for before in former:
            rows = engine.add(before)
            for step in range(5):
                guided = tuple(range(len(rows))) if before.guided else ()
                engine.step(Batch(rows, (step,) * len(rows), guided))
            engine.remove(rows)
            assert sample_locally(engine, spec, 32, lambda rows: None).images.tobytes() == expected


@pytest.mark.usefixtures("floats")
def test_nan_stays_in_its_row_and_leaves_with_it(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=3, max_jobs=3)
    sick, well = engine.add(spec_of(n=1, guidance=2.0)), engine.add(spec_of(n=2, seed=2, steps=2))

    def poison(_net: object, _args: object, out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor([0]), float("nan"))

    handle = tiny.net.register_forward_hook(poison)
    try:
        for step in range(2):
            engine.step(Batch((*sick, *well), (step,) * 3, (0,)))
    finally:
        handle.remove()
    assert np.isnan(engine.images(sick)).all()
    np.testing.assert_allclose(engine.images(well), alone(tiny, spec_of(n=2, seed=2, steps=2)), atol=1e-5)
    engine.remove(sick)
    again = sample_locally(engine, spec_of(n=1, seed=3), 8, lambda rows: None).images
    np.testing.assert_allclose(again, alone(tiny, spec_of(n=1, seed=3)), atol=1e-5)


def test_a_job_that_cannot_be_compiled_takes_no_slot(make_checkpoint: MakeCheckpoint) -> None:
    engine = make_engine(make_checkpoint(), max_rows=2, max_jobs=1)
    for bad in (spec_of(sampler="euler"), spec_of(steps=51), spec_of(steps=0)):
        with pytest.raises(ValueError, match="must be"):
            engine.add(bad)
    assert len(engine.add(spec_of(n=2))) == 2


def test_many_steps_in_a_small_noise_schedule_fill_a_plan_to_its_last_line(make_checkpoint: MakeCheckpoint) -> None:
    engine = make_engine(make_checkpoint(noise=NoiseConfig(num_train_timesteps=3)), max_rows=4, max_jobs=2)
    specs = [spec_of(n=1, steps=3, seed=1), spec_of(n=1, steps=3, seed=2, sampler="ddim")]
    shared = together(engine, specs, max_batch=2)
    checkpoint = make_checkpoint(noise=NoiseConfig(num_train_timesteps=3))
    for spec, images in zip(specs, shared, strict=True):
        np.testing.assert_allclose(images.astype(int), alone(checkpoint, spec).astype(int), atol=1)


# --- devices, limits, description ---


@pytest.mark.parametrize("name", ["", "gpu", "cpu:x", "cuda:", "mps", "meta", "cuda:-1", "cuda:4096", "xpu", "CPU "])
def test_a_bad_device_name_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match="device") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_default_number_of_rows_fits_the_latent_budget(make_checkpoint: MakeCheckpoint) -> None:
    assert default_max_rows(make_checkpoint()) == engine_module.MAX_DEFAULT_ROWS
    large = make_checkpoint(in_channels=3, out_channels=3, sample_size=512)
    assert default_max_rows(large) == 512 * 2**20 // (2 * 4 * 3 * 512 * 512)
    assert default_max_rows(replace(large, size_px=(2**16, 2**16))) == 4, "the least that --max-batch may be"


def test_the_model_is_described_as_it_was_loaded(tiny: Checkpoint, make_checkpoint: MakeCheckpoint) -> None:
    info = make_engine(tiny).info
    assert info == describe(tiny, CPU, "eager")
    assert info.num_parameters == sum(parameter.numel() for parameter in tiny.net.parameters())
    assert (info.height_px, info.width_px, info.channels, info.num_timesteps) == (8, 8, 1, 50)
    assert (info.conditional, info.class_names, info.null_class) == (True, ("cat", "dog", "3d-print"), 3)
    assert (info.samplers, info.default_sampler) == (("ddpm", "ddim"), "ddpm")
    assert info.weights_hash == tiny.weights_hash
    assert "CPU" in info.device
    other = describe(make_checkpoint(classes=False, sample_size=(4, 10)), CPU, "eager")
    assert (other.conditional, other.class_names, other.null_class) == (False, (), None)
    assert (other.height_px, other.width_px) == (4, 10)


def test_the_fingerprint_names_the_build_and_not_the_weights(make_checkpoint: MakeCheckpoint) -> None:
    one, other = make_checkpoint(seed=1), make_checkpoint(seed=2)
    assert one.weights_hash != other.weights_hash
    assert describe(one, CPU, "eager").fingerprint == describe(other, CPU, "eager").fingerprint
    assert describe(one, CPU, "eager").fingerprint != describe(one, CPU, "compiled").fingerprint


def test_the_fingerprint_changes_with_the_number_of_threads(tiny: Checkpoint) -> None:
    threads, before = torch.get_num_threads(), describe(tiny, CPU, "eager").fingerprint
    try:
        torch.set_num_threads(threads + 1)
        assert describe(tiny, CPU, "eager").fingerprint != before
    finally:
        torch.set_num_threads(threads)


def test_memory_on_a_cpu_is_the_processs_own(tiny: Checkpoint) -> None:
    engine = make_engine(tiny)
    engine.synchronize()
    assert engine.memory_bytes() is None


# --- on a GPU ---

OnGpu = Callable[[], tuple[Checkpoint, torch.device]]


@pytest.fixture
def on_gpu(make_checkpoint: MakeCheckpoint) -> Iterator[OnGpu]:
    """A checkpoint of its own, as an engine moves the net; and the exact float32 that the comparison needs."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield lambda: (make_checkpoint(), torch.device("cuda"))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("floats")
def test_a_gpu_gives_the_images_of_the_cpu(tiny: Checkpoint, on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    for spec, images in zip(MIXED, together(engine, MIXED, max_batch=8), strict=True):
        np.testing.assert_allclose(images, alone(tiny, spec), atol=1e-3, err_msg=str(spec))


@pytest.mark.gpu
def test_an_engine_on_a_gpu_tells_its_memory_and_name(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    memory = engine.memory_bytes()
    assert memory is not None
    assert memory > 0
    assert engine.info.device == torch.cuda.get_device_name(device)


@pytest.mark.gpu
def test_a_tick_on_a_gpu_does_not_wait_for_it(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    rows, guided = engine.add(spec_of(n=2)), engine.add(spec_of(n=1, guidance=2.0))
    engine.step(Batch((*rows, *guided), (0, 0, 0), (2,)))
    engine.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(Batch((*rows, *guided), (1, 1, 1), (2,)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
