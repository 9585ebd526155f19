"""Compares samples with real images: class accuracy, distances, variance within classes, memorisation."""

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.classifier import Classifier, Reading
from tminus.model.evaluation.distances import (
    FITTED_VALUES,
    Components,
    Gaussian,
    class_variance,
    fit_components,
    fit_gaussian,
    frechet_distance,
    nearest_distances,
    share_within,
    variance_ratio,
)
from tminus.model.evaluation.figures import (
    ClassAccuracy,
    ClassifierFacts,
    Compared,
    FrechetDistance,
    LeftOut,
    Memorisation,
    NearestSummary,
    PerClass,
    PixelFigures,
    Reconstruction,
    SampleFigures,
)
from tminus.model.evaluation.samples import (
    EvaluateError,
    balanced_picks,
    class_map,
    class_weights,
    random_picks,
    sample_classes,
)
from tminus.model.latent.autoencoder import Autoencoder, images_of, latents_of
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.training.data import ImageSet


class _Real(NamedTuple):
    """Figures of as many real images as there are samples, picked with the same seed."""

    frechet: float | None
    num_frechet: int
    nearest: NearestSummary
    projected: Tensor  # projections of test images onto the principal components [N, K]
    pixel_frechet: float
    variance: dict[int, float]
    precision: float
    recall: float


class Judge:
    """Judges the samples of one checkpoint. The figures of real images are computed on first use."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        real_train: ImageSet,
        real_test: ImageSet,
        classifier: Classifier | None,
        device: torch.device,
    ) -> None:
        """Raises EvaluateError if the checkpoint, the data and the classifier do not match."""
        _check_fit(checkpoint, real_train, real_test, classifier)
        self._checkpoint, self._train, self._test, self._classifier = checkpoint, real_train, real_test, classifier
        self._device = device
        # The samples of a conditional checkpoint cycle through its classes, so the real images must have the same mix.
        self._in_turn = checkpoint.net.class_embedding is not None
        self._real: dict[tuple[int, int], _Real] = {}

    @property
    def facts(self) -> ClassifierFacts | None:
        if (classifier := self._classifier) is None:
            return None
        return ClassifierFacts(
            weights_hash=classifier.weights_hash,
            test_accuracy=classifier.test_accuracy,
            feature_dim=classifier.config.feature_dim,
            data=classifier.trained_on.get("data", "unknown"),
        )

    @property
    def left_out(self) -> list[LeftOut]:
        """Return the figures that cannot be computed for this checkpoint and data, with the reasons."""
        if self._classifier is None:
            why = "no classifier was given"
            if self._train.labels is None or self._test.labels is None:
                why = "no classifier: the data has no classes to train one on"
            elif len(self._train.class_names) < 2:
                why = "no classifier: the data has one class, and one is trained to tell classes apart"
            return [LeftOut("class_accuracy", why), LeftOut("classifier_frechet_distance", why)]
        if self._checkpoint.net.class_embedding is None:
            return [LeftOut("class_accuracy", "the checkpoint is unconditional: no class was asked for")]
        if class_map(self._checkpoint, self._classifier.class_names) is None:
            return [LeftOut("class_accuracy", "the checkpoint's class names are not those of the data")]
        return []

    def figures(self, samples: Tensor, seed: int, seconds_per_image: float) -> SampleFigures:
        """Judge samples 0 to N-1 of a seed: uint8 [N, C, H, W] on the CPU."""
        real = self._real_figures(len(samples), seed)
        accuracy, frechet = None, None
        if self._classifier is not None:
            read = self._classifier.read(samples)
            accuracy = self._class_accuracy(read)
            distance = frechet_distance(fit_gaussian(read.features), self._test_gaussian)
            assert real.frechet is not None
            frechet = FrechetDistance(distance, real.frechet, real.num_frechet, len(self._test))
        memorisation = Memorisation(self._nearest(samples), real.nearest, len(self._train))
        return SampleFigures(seed, accuracy, frechet, self._pixels(samples, real), memorisation, seconds_per_image)

    def reconstruction(self, num_images: int, seed: int) -> Reconstruction | None:
        """Compare real images with their reconstructions by the autoencoder. Returns None for a pixel model."""
        if (autoencoder := self._checkpoint.autoencoder) is None:
            return None
        picked = self._picks(self._train, num_images, seed)
        test, train = self._test.images[self._picks(self._test, num_images, seed)], self._train.images[picked]
        square = (to_model_range(test) - to_model_range(_decoded_again(autoencoder, test, self._device))).square()
        frechet = None
        if self._classifier is not None:
            frechet = self._real_frechet(_decoded_again(autoencoder, train, self._device), picked)
        mean = float(square.double().mean())
        return Reconstruction(mean**0.5, 10 * math.log10(4 / max(mean, 1e-12)), frechet, len(test))

    def _real_figures(self, num_images: int, seed: int) -> _Real:
        if (num_images, seed) not in self._real:
            picked = self._picks(self._train, num_images, seed)
            test_picked = self._test.images[self._picks(self._test, num_images, seed)]
            frechet = None
            if self._classifier is not None:
                frechet = self._real_frechet(self._train.images[picked], picked)
            images, classes = self._train.images[picked], self._classes_of(self._train)[picked]
            train_projected, test_projected = map(self._components.project, (images, test_picked))
            self._real[num_images, seed] = _Real(
                frechet,
                len(picked),
                self._nearest(test_picked),
                test_projected,
                frechet_distance(fit_gaussian(train_projected), self._pixel_gaussian),
                class_variance(images, classes),
                share_within(train_projected, test_projected),
                share_within(test_projected, train_projected),
            )
        return self._real[num_images, seed]

    def _pixels(self, samples: Tensor, real: _Real) -> PixelFigures:
        projected = self._components.project(samples)
        ratio = None
        mine = variance_ratio(class_variance(samples, self._target_classes(len(samples))), self._test_variance)
        theirs = variance_ratio(real.variance, self._test_variance)
        if mine is not None and theirs is not None:
            ratio = Compared(mine, theirs)
        return PixelFigures(
            Compared(frechet_distance(fit_gaussian(projected), self._pixel_gaussian), real.pixel_frechet),
            ratio,
            Compared(share_within(projected, real.projected), real.precision),
            Compared(share_within(real.projected, projected), real.recall),
            projected.shape[1],
        )

    def _target_classes(self, num_samples: int) -> Tensor:
        """Return each sample's class, numbered as in the data; zeros if classes are not compared."""
        asked, to_data = sample_classes(self._checkpoint, num_samples), self._to_data
        return to_data[asked] if asked is not None and to_data is not None else torch.zeros(num_samples).long()

    def _classes_of(self, data: ImageSet) -> Tensor:
        """Return each real image's class; zeros if classes are not compared."""
        return data.labels if self._to_data is not None and data.labels is not None else torch.zeros(len(data)).long()

    @cached_property
    def _to_data(self) -> Tensor | None:
        """Map the checkpoint's class numbers to the data's; None if classes are not compared."""
        split = self._train.class_names, self._test.class_names
        return class_map(self._checkpoint, split[1]) if self._in_turn and split[0] == split[1] else None

    @cached_property
    def _components(self) -> Components:
        many = max(2, FITTED_VALUES // self._train.images[0].numel())
        return fit_components(self._train.images[self._picks(self._train, many, 0)])

    @cached_property
    def _pixel_gaussian(self) -> Gaussian:
        return self._real_gaussian(self._components.project(self._test.images), self._test.labels)

    @cached_property
    def _test_variance(self) -> dict[int, float]:
        return class_variance(self._test.images, self._classes_of(self._test))

    def _picks(self, data: ImageSet, num_images: int, seed: int) -> Tensor:
        """Pick real images with the samples' mix of classes, as far as there are enough of each class."""
        return (balanced_picks if self._in_turn else random_picks)(data, num_images, seed)

    def _real_gaussian(self, features: Tensor, labels: Tensor | None) -> Gaussian:
        """Fit a Gaussian to features of real images, with the classes weighted as among the samples."""
        weights = class_weights(labels, len(self._test.class_names)) if self._in_turn and labels is not None else None
        return fit_gaussian(features, weights)

    def _real_frechet(self, images: Tensor, picked: Tensor) -> float:
        """Return the Fréchet distance of `images`, the picked training images or their reconstructions."""
        assert self._classifier is not None
        labels = self._train.labels[picked] if self._train.labels is not None else None
        gaussian = self._real_gaussian(self._classifier.read(images).features, labels)
        return frechet_distance(gaussian, self._test_gaussian)

    @cached_property
    def _read_test(self) -> Reading:
        assert self._classifier is not None
        return self._classifier.read(self._test.images)

    @cached_property
    def _test_gaussian(self) -> Gaussian:
        return self._real_gaussian(self._read_test.features, self._test.labels)

    @cached_property
    def _train_images(self) -> Tensor:
        return self._train.images.to(self._device)

    def _class_accuracy(self, read: Reading) -> ClassAccuracy | None:
        asked = sample_classes(self._checkpoint, len(read.labels))
        assert self._classifier is not None
        to_classifier = class_map(self._checkpoint, self._classifier.class_names)
        if asked is None or to_classifier is None:
            return None
        assert self._test.labels is not None
        right = read.labels == to_classifier[asked]
        right_test = self._read_test.labels == self._test.labels
        per_class = []
        for k, name in enumerate(self._checkpoint.labels.class_names):
            of_class, of_test = right[asked == k], right_test[self._test.labels == to_classifier[k]]
            per_class.append(PerClass(name, _share(of_class), len(of_class), _share(of_test)))
        num_real = len(self._test)
        return ClassAccuracy(
            float(right.double().mean()), float(right_test.double().mean()), num_real, tuple(per_class)
        )

    def _nearest(self, images: Tensor) -> NearestSummary:
        rms = nearest_distances(images.to(self._device), self._train_images)
        return NearestSummary(float(rms.min()), float(rms.quantile(0.01)), float(rms.median()), len(images))


def _decoded_again(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    return to_uint8(images_of(autoencoder, latents_of(autoencoder, images, device))).cpu()


def _check_fit(checkpoint: Checkpoint, train: ImageSet, test: ImageSet, classifier: Classifier | None) -> None:
    shape = checkpoint.image_shape
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


def _share(right: Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None
