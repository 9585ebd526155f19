"""How fast one model steps, and how much of its work there may be. Pure frozen values; no torch, no clock."""

from dataclasses import dataclass, replace

from tminus.service.scheduling.sharing import Sharing
from tminus.service.scheduling.tick_times import TickTimes
from tminus.service.work import Work


@dataclass(frozen=True, slots=True)
class Speed:
    """What admission and forecast know of one model."""

    sharing: Sharing
    tick_times: TickTimes  # until ticks are measured nothing is refused for time
    max_rows: int  # images that its engine holds
    decode_s: float = 0.0  # of one image of a latent model
    encode_s: float = 0.0

    @property
    def place_s(self) -> float:
        """How long a place takes in a full tick."""
        return self.tick_times.seconds_per_place(self.sharing.max_batch)

    @property
    def longest_tick_s(self) -> float:
        """Predicted seconds of a full tick."""
        return self.tick_times.seconds(self.sharing.max_batch)

    def with_beside(self, work: Work, *, has_picture: bool) -> Work:
        """Add to a job's work what it takes beside the ticks. has_picture: it starts from one."""
        beside_s = work.rows * self.decode_s + (self.encode_s if has_picture else 0.0)
        return replace(work, beside_s=beside_s)
