"""What the rest of tminus knows of a network that predicts eps, x_0 or v, whichever project it is from."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from tminus.model.files import given_fields

MAX_NUMBER = 2**31 - 1
MAX_LIST = 16


class NetConfig(Protocol):
    """The configuration of a network, which config.json holds. Frozen."""

    @property
    def in_channels(self) -> int:
        """The channels of the images."""

    @property
    def out_channels(self) -> int:
        """Twice as many where the variance is learned."""

    @property
    def num_class_embeds(self) -> int | None:
        """How many classes it knows, the null class among them; None for a network without classes."""

    @property
    def class_name(self) -> str:
        """`_class_name` of config.json."""

    @property
    def size_px(self) -> tuple[int, int] | None:
        """(height, width), or None where the config does not say."""

    @property
    def size_multiple(self) -> int:
        """Height and width must divide by this."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level, from the widest images to the narrowest."""

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Roughly what one row takes in a forward pass, in float32."""

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""


class Denoiser(nn.Module):
    """f(x_t, t, class): x [B, C, H, W], t [B], class_labels [B] (or None) -> [B, out_channels, H, W].

    A timestep and a class enter by one vector, so that a forward pass is `denoise(x, embed(t, class))`.
    """

    config: NetConfig
    act: Callable[[Tensor], Tensor]
    class_embedding: nn.Embedding | None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.denoise(x, self.embed(t, class_labels))

    def embed(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Embed timestep and class, with the activation that blocks expect: t [B], class_labels [B] -> [B, temb]."""
        temb = self.embed_time(t)
        if (self.class_embedding is None) != (class_labels is None):
            wanted = "needs" if self.class_embedding is not None else "takes no"
            raise ValueError(f"this network {wanted} class labels (num_class_embeds={self.config.num_class_embeds})")
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        return self.act(temb)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed the timestep alone, before class and activation: t [B] -> [B, temb]."""
        return self.time_embedder()(t)

    @property
    def fractional(self) -> bool:
        """Whether it takes timesteps between whole ones."""
        return True

    @abstractmethod
    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        """What `embed_time` calls, for those who keep it without the rest of the network."""

    @abstractmethod
    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        """Everything after the embedding: x [B, C, H, W], act_temb [B, temb] -> [B, out_channels, H, W]."""

    @abstractmethod
    def encode(self, x: Tensor, act_temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The way down and the middle: x [B, C, H, W], act_temb [B, temb] -> h [B, width, h, w], and the skips."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The parts whose outputs say what the network sees in an image; a tuple's first output counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherConfig:
    """Images, channels and classes of a network. Raises ValueError, naming the field and its value."""

    class_name: ClassVar[str] = ""

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    num_class_embeds: int | None = None
    """The null class among them, which is the last."""

    def require(self, ok: bool, field: str, bound: str) -> None:
        """Raise ValueError unless it is ok."""
        if not ok:
            raise ValueError(f"{self.class_name} config: {field} must be {bound}, got {getattr(self, field)!r:.100}")

    def require_numbers(self, *fields: str) -> None:
        """Each of these fields must be a positive integer."""
        for field in fields:
            self.require(_is_positive(getattr(self, field)), field, "a positive integer")

    def require_lists(self, *fields: str) -> None:
        """Each of these fields must be a list of positive integers."""
        for field in fields:
            value = getattr(self, field)
            ok = isinstance(value, tuple) and 1 <= len(value) <= MAX_LIST and all(map(_is_positive, value))
            self.require(ok, field, f"a list of 1 to {MAX_LIST} positive integers")

    def __post_init__(self) -> None:
        self.require_numbers("sample_size", "in_channels", "out_channels")
        if self.num_class_embeds is not None:
            self.require_numbers("num_class_embeds")

    @property
    def size_px(self) -> tuple[int, int]:
        return self.sample_size, self.sample_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json. Raises ValueError for a field that is not known, and one that is missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in given_fields(config).items()}
        if unknown := values.keys() - known:
            name = min(unknown)
            raise ValueError(
                f"{cls.class_name} config: {name}={values[name]!r:.100} is not something it is known to have"
            )
        try:
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:  # one is missing, or of a type that no check expects
            raise ValueError(f"{cls.class_name} config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **dataclasses.asdict(self)}


def _is_positive(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_NUMBER
