"""What the rest of tminus knows of a network that predicts eps, x_0 or v, whichever project it is from."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class NetConfig(Protocol):
    """The configuration of a network, which config.json holds. Frozen."""

    @property
    def in_channels(self) -> int:
        """Of the images."""

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
