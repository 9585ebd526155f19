"""Measure a checkpoint on held-out images: the bound, class accuracy, a Fréchet distance, and memorisation.

Samples are judged as they are served, after rounding to uint8, and sample i is image i of a request with this seed.
"""

import copy
import dataclasses

import torch
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Checkpoint
from tminus.model.data import ImageSet
from tminus.model.evaluation.classes import balanced_picks, class_map, image_classes, sample_classes
from tminus.model.evaluation.classifier import Classifier, Reading
from tminus.model.evaluation.distances import fit_gaussian, frechet_distance, nearest_distances
from tminus.model.evaluation.report import (
    Bound,
    ClassAccuracy,
    ClassifierFacts,
    EvaluateOptions,
    EvaluationReport,
    FrechetDistance,
    LeftOut,
    Memorisation,
    NearestSummary,
    PerClass,
)
from tminus.model.loss import variational_bound
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.rng import image_noise
from tminus.model.samplers import Forward, sample
from tminus.model.unet import UNet2D


class EvaluateError(Exception):
    """Checkpoint, data and classifier do not fit together, or samples are not finite; the message says why."""


def evaluate(
    checkpoint: Checkpoint,
    real_train: ImageSet,
    real_test: ImageSet,
    classifier: Classifier | None,
    options: EvaluateOptions,
    *,
    device: torch.device,
    forward: Forward | None = None,
) -> EvaluationReport:
    """Make samples and compare them with the two splits. classifier=None leaves out the figures that need one.

    `forward` is another way of running the checkpoint's network, to be judged by the samples it makes (see
    `draw_samples`); the bound stays that of the network itself. options.executor and options.precision should name it.
    A figure that this checkpoint or this data does not allow is None in the report, with the reason in `left_out`.
    Raises EvaluateError, and ValueError for a sampler or number of steps that is not possible.
    """
    _check_fit(checkpoint, real_train, real_test, classifier)
    left_out: list[LeftOut] = []
    if options.guidance != 1.0 and checkpoint.labels.null_class is None:
        left_out.append(LeftOut(f"guidance {options.guidance:g}", "the checkpoint has no null class to guide from"))
        options = dataclasses.replace(options, guidance=1.0)
    net = copy.deepcopy(checkpoint.net).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    samples = draw_samples(net, checkpoint, options, device=device, forward=forward)
    train_picked = real_train.images[balanced_picks(real_train, options.num_samples, options.seed)]
    test_picked = real_test.images[balanced_picks(real_test, options.num_samples, options.seed)]

    bound = _bound(net, checkpoint, real_test, options)
    accuracy: ClassAccuracy | LeftOut
    frechet: FrechetDistance | LeftOut
    if classifier is None:
        labelled = real_train.labels is not None and real_test.labels is not None
        why = "no classifier was given" if labelled else "no classifier: the data has no classes to train one on"
        accuracy, frechet = LeftOut("class_accuracy", why), LeftOut("classifier_frechet_distance", why)
    else:
        read_samples, read_test = classifier.read(samples), classifier.read(real_test.images)
        accuracy = _class_accuracy(checkpoint, classifier, real_test, read_samples, read_test)
        test = fit_gaussian(read_test.features)
        frechet = FrechetDistance(
            samples=frechet_distance(fit_gaussian(read_samples.features), test),
            real=frechet_distance(fit_gaussian(classifier.read(train_picked).features), test),
            num_real=len(train_picked),
            num_test=len(real_test),
        )
    left_out += [figure for figure in (bound, accuracy, frechet) if isinstance(figure, LeftOut)]

    train_images = real_train.images.to(device)
    memorisation = Memorisation(
        samples=_nearest(samples.to(device), train_images),
        real=_nearest(test_picked.to(device), train_images),
        num_train=len(real_train),
    )
    return EvaluationReport(
        checkpoint=checkpoint.name,
        weights_hash=checkpoint.weights_hash,
        train_data=real_train.name,
        test_data=real_test.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch_version=str(torch.__version__),
        options=options,
        classifier=_facts(classifier) if classifier is not None else None,
        bound=None if isinstance(bound, LeftOut) else bound,
        class_accuracy=None if isinstance(accuracy, LeftOut) else accuracy,
        classifier_frechet_distance=None if isinstance(frechet, LeftOut) else frechet,
        memorisation=memorisation,
        left_out=tuple(left_out),
    )


def draw_samples(
    net: UNet2D,
    checkpoint: Checkpoint,
    options: EvaluateOptions,
    *,
    device: torch.device,
    forward: Forward | None = None,
) -> Tensor:
    """Sample images 0..num_samples-1 of the seed, uint8 [N, C, H, W] on the CPU. `net` lies on `device`.

    forward=None runs the net itself in options.precision; any other is called as it is, with tensors on `device`.
    """
    if options.sampler not in checkpoint.samplers:
        names = ", ".join(checkpoint.samplers)
        raise EvaluateError(f"{checkpoint.name}: sampler must be among {names}, got {options.sampler!r}")
    plan = checkpoint.plan(
        options.sampler, options.steps, guidance=options.guidance, eta=options.eta, spacing=options.spacing
    )
    shape = (net.config.in_channels, *checkpoint.size_px)
    classes = sample_classes(checkpoint, options.num_samples)
    starts = range(0, options.num_samples, options.batch_size)
    images = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=forward is None and options.precision == "bfloat16")
    with tqdm(total=len(starts) * len(plan), unit="step", desc="samples", disable=None) as progress, autocast:

        def on_step(_: int) -> None:
            progress.update()

        for start in starts:
            indices = range(start, min(start + options.batch_size, options.num_samples))

            def z_of(k: int, indices: range = indices) -> Tensor:
                return image_noise(options.seed, indices, k + 1, shape, device)

            x_0 = sample(
                forward or net,
                plan,
                image_noise(options.seed, indices, 0, shape, device),
                z_of,
                class_labels=classes[start : indices.stop].to(device) if classes is not None else None,
                null_class=checkpoint.labels.null_class,
                guidance=options.guidance,
                guidance_interval=options.guidance_interval,
                on_step=on_step,
            )
            if not bool(torch.isfinite(x_0).all()):
                raise EvaluateError(f"{checkpoint.name}: samples {indices.start}..{indices.stop - 1} are not finite")
            images.append(to_uint8(x_0).cpu())
    return torch.cat(images)


def _check_fit(checkpoint: Checkpoint, train: ImageSet, test: ImageSet, classifier: Classifier | None) -> None:
    shape = (checkpoint.net.config.in_channels, *checkpoint.size_px)
    for data in (train, test):
        if tuple(data.images.shape[1:]) != shape:
            got = tuple(data.images.shape[1:])
            raise EvaluateError(f"{data.name}: images are {got}, but {checkpoint.name} makes {shape}")
        if len(data) < 2:
            raise EvaluateError(f"{data.name}: must hold two images or more, got {len(data)}")
    if classifier is None:
        return
    reads = (classifier.config.channels, *classifier.config.size_px)
    if reads != shape:
        raise EvaluateError(f"the classifier reads images of {reads}, but {checkpoint.name} makes {shape}")
    if test.labels is None or test.class_names != classifier.class_names:
        raise EvaluateError(f"the classifier knows {classifier.class_names}, but {test.name} has {test.class_names}")


def _bound(net: UNet2D, checkpoint: Checkpoint, test: ImageSet, options: EvaluateOptions) -> Bound | LeftOut:
    noise, schedule = checkpoint.noise, checkpoint.noise.schedule()
    if checkpoint.student is not None:
        return LeftOut("bound", "a student predicts where trajectories end, not the mean of x_0, so it has none")
    if noise.variance_type == "learned_range":
        return LeftOut("bound", "it is measured for a fixed variance only, and this network learned its own")
    if noise.prediction_type == "epsilon" and schedule.alpha_bar[-1] <= 0:
        return LeftOut("bound", "eps says nothing of x_0 at the last timestep, where alpha_bar is 0")
    try:
        classes = image_classes(checkpoint, test)
    except ValueError as error:
        return LeftOut("bound", str(error))
    timesteps = min(options.bound_timesteps, schedule.num_timesteps - 1)
    picked = balanced_picks(test, options.bound_images, options.seed)
    starts = range(0, len(picked), options.batch_size)
    device = net.conv_in.weight.device
    parts = []
    with tqdm(total=len(starts) * (timesteps + 1), unit="step", desc="bound", disable=None) as progress:

        def counted(x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            progress.update()
            out: Tensor = net(x_t, t, class_labels)
            return out

        for start in starts:
            batch = picked[start : start + options.batch_size]
            x_0 = to_model_range(test.images[batch].to(device))
            # Numbered by position in the split, so that an image's terms do not depend on which others are picked.
            part = variational_bound(
                counted,
                noise,
                schedule,
                x_0,
                classes[batch].to(device) if classes is not None else None,
                seed=options.seed,
                indices=batch.tolist(),
                timesteps=timesteps or None,
            )
            parts.append(torch.stack([part.L_T, part.L_steps, part.L_0, part.total]).cpu())
    terms = torch.cat(parts, dim=1)  # [4, N]
    L_T, L_steps, L_0, total = terms.mean(1).tolist()
    standard_error = float(terms[3].std(correction=0)) / max(1, len(picked) - 1) ** 0.5
    return Bound(L_T, L_steps, L_0, total, standard_error, len(picked), timesteps)


def _class_accuracy(
    checkpoint: Checkpoint, classifier: Classifier, test: ImageSet, read_samples: Reading, read_test: Reading
) -> ClassAccuracy | LeftOut:
    asked = sample_classes(checkpoint, len(read_samples.labels))
    if asked is None:
        return LeftOut("class_accuracy", "the checkpoint is unconditional: no class was asked for")
    to_classifier = class_map(checkpoint, classifier.class_names)
    if to_classifier is None:
        return LeftOut("class_accuracy", "the checkpoint's class names are not those of the data")
    assert test.labels is not None
    right = read_samples.labels == to_classifier[asked]
    right_test = read_test.labels == test.labels
    per_class = []
    for k, name in enumerate(checkpoint.labels.class_names):
        of_class, of_test = right[asked == k], right_test[test.labels == to_classifier[k]]
        per_class.append(PerClass(name, _share(of_class), len(of_class), _share(of_test)))
    return ClassAccuracy(float(right.double().mean()), float(right_test.double().mean()), len(test), tuple(per_class))


def _share(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None


def _nearest(images: Tensor, train: Tensor) -> NearestSummary:
    rms = nearest_distances(images, train)
    return NearestSummary(float(rms.min()), float(rms.quantile(0.01)), float(rms.median()), len(images))


def _facts(classifier: Classifier) -> ClassifierFacts:
    return ClassifierFacts(
        weights_hash=classifier.weights_hash,
        test_accuracy=classifier.test_accuracy,
        feature_dim=classifier.config.feature_dim,
        data=classifier.trained_on.get("data", "unknown"),
    )
