"""The interface of all networks: the config, and f(x_t, t, class)."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from tminus.model.config import Checked, Count, OptionalCount, given_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig(Checked):
    """The content of a network's config.json: image size, channels and classes."""

    CLASS_NAME: ClassVar[str] = ""

    sample_size: int | tuple[int, int] | None = None
    """The side of the input, or (height, width); None if the config does not say."""
    in_channels: Count = 3
    out_channels: Count = 3
    """The output's channels; twice the input's if the variance is learned."""
    num_class_embeds: OptionalCount = None
    """The number of classes with the null class, which is the last; None for a network without classes."""

    @property
    def class_name(self) -> str:
        """`_class_name` of config.json."""
        return self.CLASS_NAME

    @property
    def size_px(self) -> tuple[int, int] | None:
        """(height, width), or None if the config does not say."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Height and width must be multiples of this."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the highest resolution to the lowest."""

    @abstractmethod
    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Estimate the bytes of one row in a forward pass, in float32."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json. Raises ValueError for an unknown or a missing field."""
        values = given_fields(config)
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            name = min(unknown)
            raise ValueError(f"{cls.KIND}{name}={values[name]!r:.100} is not a known setting")
        return cls.from_json(values)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **dataclasses.asdict(self)}


class Denoiser(nn.Module):
    """The network f: x [B, C, H, W], t [B], class_labels [B] (or None) -> [B, out_channels, H, W].

    One vector embeds timestep and class: a forward pass is `denoise(x, embed(t, class))`.
    """

    config: NetConfig
    act: Callable[[Tensor], Tensor]
    class_embedding: nn.Embedding | None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.denoise(x, self.embed(t, class_labels))

    def embed(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Embed timestep and class, and apply the blocks' activation: t [B], class_labels [B] -> [B, temb]."""
        temb = self.time_embedder()(t)
        if (self.class_embedding is None) != (class_labels is None):
            verb = "needs" if self.class_embedding is not None else "takes no"
            raise ValueError(f"this network {verb} class labels (num_class_embeds={self.config.num_class_embeds})")
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        return self.act(temb)

    @property
    def fractional(self) -> bool:
        """True if the network accepts fractional timesteps."""
        return True

    @abstractmethod
    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        """Return the function that embeds timesteps, before class and activation: t [B] -> [B, temb].

        The function does not need the rest of the network.
        """

    @abstractmethod
    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        """Run the network after the embedding: x [B, C, H, W], act_temb [B, temb] -> [B, out_channels, H, W]."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Modules whose outputs serve as image features. If an output is a tuple, the feature is its first member."""
