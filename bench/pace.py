"""What the bare loop tells the parent, which does without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast rows went through the network, and what a row took of the processor (all threads together)."""

    rows_per_s: float
    cpu_s_per_row: float
