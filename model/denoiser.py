"""NetConfig and Denoiser, the interface that all networks share."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from tminus.model.config import Checked, Count, OptionalCount, given_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig(Checked):
    """Base class for the network configurations stored in config.json."""

    CLASS_NAME: ClassVar[str] = ""

    sample_size: int | tuple[int, int] | None = None
    """The side of a square input, or (height, width). None if config.json has no sample_size."""
    in_channels: Count = 3
    out_channels: Count = 3
    """Twice in_channels if the network predicts its variance."""
    num_class_embeds: OptionalCount = None
    """The number of classes, including the null class if there is one. None if the network takes no classes."""

    @property
    def class_name(self) -> str:
        """The `_class_name` in config.json."""
        return self.CLASS_NAME

    @property
    def size_px(self) -> tuple[int, int] | None:
        """The (height, width) of the input, or None if config.json has no sample_size."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Height and width must be multiples of this number."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The number of channels at each level, from the highest resolution to the lowest."""

    @abstractmethod
    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Estimate the memory of a forward pass of one image in float32, in bytes."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json. Raises ValueError for an unknown, missing or invalid field."""
        values = given_fields(config)
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            name = min(unknown)
            raise ValueError(f"{cls.KIND}{name}={values[name]!r:.100} is not a known setting")
        return cls.from_json(values)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": self.class_name, **dataclasses.asdict(self)}


class Denoiser(nn.Module):
    """Base class for networks.

    x [B, C, H, W], t [B], class_labels [B] or None -> [B, out_channels, H, W].

    The timestep and the class enter the network as one embedding, so a forward pass is `denoise(x, embed(t,
    class_labels))`.
    """

    config: NetConfig
    act: Callable[[Tensor], Tensor]
    class_embedding: nn.Embedding | None

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.denoise(x, self.embed(t, class_labels))

    def embed(self, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the joint embedding of timestep and class, with the activation already applied.

        t [B], class_labels [B] -> [B, temb].
        """
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
        """Return a function that embeds timesteps, t [B] -> [B, temb].

        The function does not add the class or apply the activation. It holds no reference to the rest of the network.
        """

    @abstractmethod
    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        """Run the network for given embeddings. x [B, C, H, W], act_temb [B, temb] -> [B, out_channels, H, W]."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose outputs serve as image features. If a module returns a tuple, the first item is used."""
