"""A small classifier that judges samples.

Its labels give the class accuracy. Its penultimate layer gives the features for the Fréchet distance. A saved
classifier has two files: config.json, with the architecture, and classifier.safetensors, with the weights. The metadata
of the weights file holds the class names, the training settings and the test accuracy. Nothing is pickled.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tminus.model.config import Checked, Count, Counts
from tminus.model.files import write_atomically, write_json
from tminus.model.pixels import to_model_range
from tminus.model.training.data import ImageSet
from tminus.model.weights import hash_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "classifier.safetensors"
MAX_CONFIG_BYTES = 2**20
GRID = 4  # side of the last feature map after pooling
READ_BATCH = 500
MAX_SIZE = 2**16  # limit for layer widths, image sides and the number of classes
MIN_SIDE = 8  # pixels: three 2x2 poolings reduce 8 pixels to 1


class ClassifierError(ValueError):
    """Raised if a classifier cannot be trained or loaded. The message names the file or data set."""


@dataclass(frozen=True, slots=True)
class ClassifierConfig(Checked):
    """The architecture of a classifier. Raises ValueError, naming the field, for an invalid value."""

    KIND: ClassVar[str] = "classifier config: "

    channels: int
    size_px: Counts
    num_classes: Count
    widths: Counts = (24, 48, 96)
    feature_dim: Count = 96

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        self.require(self.channels in (1, 3, 4), "channels", "1, 3 or 4")
        self.require(len(self.widths) == 3, "widths", "three numbers")
        sides = len(self.size_px) == 2 and min(self.size_px) >= MIN_SIDE
        self.require(sides, "size_px", f"two sides of {MIN_SIDE} or more")
        small = max(*self.widths, self.feature_dim, self.num_classes, *self.size_px) <= MAX_SIZE
        self.require(small, "widths", f"at most {MAX_SIZE}, as all sizes and counts")


@dataclass(frozen=True, slots=True)
class ClassifierTraining:
    """Settings for training a classifier: AdamW with a one-cycle learning rate, no augmentation."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    dropout: float = 0.3
    seed: int = 0


class Reading(NamedTuple):
    """Output for N images, on the CPU: labels int64 [N] and features float32 [N, feature_dim]."""

    labels: Tensor
    features: Tensor


class ClassifierNet(nn.Module):
    """Three stages of convolution, batch norm, ReLU and pooling, then a feature layer and a logit layer."""

    def __init__(self, config: ClassifierConfig, dropout: float = 0.0) -> None:
        super().__init__()
        widths = (config.channels, *config.widths)
        stages: list[nn.Module] = []
        for width_in, width in itertools.pairwise(widths):
            stages += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            stages += [nn.ReLU(), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages)
        self.penultimate = nn.Linear(widths[-1] * GRID**2, config.feature_dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.feature_dim, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer's activations [B, feature_dim] for x [B, C, H, W] in [-1, 1]."""
        h = F.adaptive_avg_pool2d(self.stages(x), GRID)
        return F.relu(self.penultimate(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits


@dataclass(frozen=True, slots=True)
class Classifier:
    """A trained classifier. `trained_on` records the data set and the training settings."""

    net: ClassifierNet
    config: ClassifierConfig
    class_names: tuple[str, ...]
    test_accuracy: float
    weights_hash: str
    trained_on: Mapping[str, str] = field(default_factory=dict)

    @torch.inference_mode()
    def read(self, images: Tensor) -> Reading:
        """Classify images, uint8 [N, C, H, W]. Raises ValueError if they have the wrong shape."""
        if tuple(images.shape[1:]) != (self.config.channels, *self.config.size_px):
            expected = (self.config.channels, *self.config.size_px)
            raise ValueError(f"the classifier reads images of {expected}, got {tuple(images.shape[1:])}")
        device = self.net.head.weight.device
        labels, features = [], []
        for start in range(0, len(images), READ_BATCH):
            h = self.net.features(to_model_range(images[start : start + READ_BATCH].to(device)))
            labels.append(self.net.head(h).argmax(1).cpu())
            features.append(h.cpu())
        return Reading(torch.cat(labels), torch.cat(features))


def train_classifier(
    train: ImageSet, test: ImageSet, training: ClassifierTraining, *, device: torch.device
) -> Classifier:
    """Train a classifier on one split, and measure its accuracy on the other.

    The weights depend only on the data, the settings, the device and the number of threads. Raises ClassifierError if
    there are fewer than two classes, or if the splits differ in classes or image size.
    """
    if train.labels is None or test.labels is None:
        raise ClassifierError(f"{train.name}: a classifier needs labelled images, and these have no classes")
    if len(train.class_names) < 2:  # With a single class, the loss is always zero.
        raise ClassifierError(f"{train.name}: a classifier needs two classes or more, and these images have one")
    if train.class_names != test.class_names or train.images.shape[1:] != test.images.shape[1:]:
        raise ClassifierError(f"{train.name} and {test.name} differ in classes or image size")
    channels, height, width = train.images.shape[1:]
    try:
        config = ClassifierConfig(channels, (height, width), len(train.class_names))
    except ValueError as error:
        raise ClassifierError(f"{train.name}: {error}") from error

    images, labels = train.images.to(device), train.labels.to(device)
    batches = max(1, len(images) // training.batch_size)  # Drop an incomplete last batch, unless it is the only one.
    # Initial weights and dropout use the global random generator. Fork it, so that the caller's state does not change.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(training.seed)
        net = ClassifierNet(config, training.dropout).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=True
        )
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=training.learning_rate, total_steps=training.epochs * batches, pct_start=0.25
        )
        progress = tqdm(total=training.epochs * batches, unit="step", desc="classifier", disable=None)
        with progress:
            for _ in range(training.epochs):
                order = torch.randperm(len(images)).to(device)
                for k in range(batches):
                    picked = order[k * training.batch_size : (k + 1) * training.batch_size]
                    x = to_model_range(images[picked]).to(memory_format=torch.channels_last)
                    loss = F.cross_entropy(net(x), labels[picked])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    cycle.step()
                    progress.update()
    state = _state(net)
    net = _assemble(config, state).to(device)  # Rebuild it as loading does: another memory layout rounds differently.
    trained_on = {"data": train.name, **{k: str(v) for k, v in dataclasses.asdict(training).items()}}
    classifier = Classifier(net, config, train.class_names, 0.0, hash_weights(state), trained_on)
    accuracy = (classifier.read(test.images).labels == test.labels).double().mean().item()
    return dataclasses.replace(classifier, test_accuracy=accuracy)


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Write the classifier's two files to `folder`, each atomically."""
    metadata = {
        "format": "pt",
        "class_names": json.dumps(classifier.class_names),
        "test_accuracy": repr(classifier.test_accuracy),
        "trained_on": json.dumps(dict(classifier.trained_on)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, dataclasses.asdict(classifier.config))
    tensors = _state(classifier.net)
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))


def load_classifier(folder: Path, *, device: torch.device) -> Classifier:
    """Load a classifier from its folder. Raises ClassifierError if that fails."""
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        with config_file.open("rb") as file:
            fields = json.loads(file.read(MAX_CONFIG_BYTES))
        config = ClassifierConfig.from_json(fields)
    except (OSError, ValueError, AttributeError) as error:
        raise ClassifierError(f"{config_file}: {error}") from error
    try:
        with safetensors.safe_open(weights_file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        class_names = tuple(map(str, json.loads(metadata["class_names"])))
        test_accuracy = float(metadata["test_accuracy"])
        trained_on = {str(k): str(v) for k, v in json.loads(metadata["trained_on"]).items()}
        net = _assemble(config, state).to(device)
    except KeyError as error:
        raise ClassifierError(f"{weights_file}: its metadata lacks {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ClassifierError(f"{weights_file}: {' '.join(str(error).split())[:300]}") from error
    if len(class_names) != config.num_classes:
        raise ClassifierError(
            f"{weights_file}: {len(class_names)} class names, but {CONFIG_FILE} says {config.num_classes}"
        )
    return Classifier(net, config, class_names, test_accuracy, hash_weights(state), trained_on)


def load_or_train_classifier(folder: Path, train: ImageSet, test: ImageSet, *, device: torch.device) -> Classifier:
    """Load the classifier in `folder`. If there is none, train one and save it there.

    Raises ClassifierError if the saved classifier was trained on another data set.
    """
    if (folder / WEIGHTS_FILE).is_file():
        loaded = load_classifier(folder, device=device)
        if loaded.trained_on.get("data") != train.name:
            raise ClassifierError(f"{folder}: trained on {loaded.trained_on.get('data')!r}, not on {train.name!r}")
        return loaded
    classifier = train_classifier(train, test, ClassifierTraining(), device=device)
    save_classifier(folder, classifier)
    return classifier


def _assemble(config: ClassifierConfig, state: Mapping[str, Tensor]) -> ClassifierNet:
    with torch.device("meta"):  # No initial weights, which would change the global random state.
        net = ClassifierNet(config)
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()


def _state(net: ClassifierNet) -> dict[str, Tensor]:
    # Clone, because contiguous() can keep the channels_last strides of a single channel, and those round differently.
    plain = torch.contiguous_format
    return {key: value.detach().cpu().clone(memory_format=plain) for key, value in net.state_dict().items()}
