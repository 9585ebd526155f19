"""The values that cross the benchmark's files: requests, answers, what a server counted, and the whole run."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tminus.service.cli.bench import LADDER, Size

Outcome = Literal["ok", "refused", "failed", "left", "unanswered", "unsent"]
SLO = {f"slo_{100 * share:.0f}": share for share in LADDER}  # loads, by the share of the executor's own rate


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks for. Guidance other than 1 makes a row-step take two places."""

    n: int
    steps: int
    sampler: str = "ddpm"
    guidance: float = 1.0
    class_label: int | None = None

    @property
    def row_steps(self) -> int:
        """The work that it asks for."""
        return self.n * self.steps

    def to_body(self, seed: int) -> dict[str, Any]:
        """Return the JSON that every contender takes. What is off is left out."""
        body: dict[str, Any] = {"n": self.n, "steps": self.steps, "sampler": self.sampler, "seed": seed}
        if self.guidance != 1.0:
            body["guidance"] = self.guidance
        if self.class_label is not None:
            body["class_label"] = self.class_label
        return body


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes at its own time, whatever has been answered by then."""

    at_s: float
    ask: Ask
    seed: int
    leaves_after_s: float | None = None  # its client hangs up if it has no answer by then


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an arrival."""

    at_s: float  # when it was due, since the load's start
    n: int
    steps: int
    seed: int
    outcome: Outcome
    waited_s: float  # from when it was due to the answer, or to when it was abandoned

    @property
    def row_steps(self) -> int:
        """The work that was asked for."""
        return self.n * self.steps

    @property
    def size(self) -> str:
        """How a mix names what was asked for."""
        return str(Size(self.n, self.steps))


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server says it has done since it started."""

    row_steps: float
    places: float  # rows through the U-Net
    ticks: float

    def since(self, before: "Counters") -> "Counters":
        """Return what was added since."""
        return Counters(self.row_steps - before.row_steps, self.places - before.places, self.ticks - before.ticks)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One contender at one load."""

    load: str
    contender: str
    round: int
    seconds: float  # the window that `counted` is of
    counted: Counters
    took_row_steps: float  # in the whole load, to the end of what it left behind
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast rows went through the network, and what a row took of the processor (all threads together)."""

    rows_per_s: float
    cpu_s_per_row: float


@dataclass(frozen=True, slots=True)
class Bare:
    """The bare executor loop, by batch size."""

    round: int
    executor: str
    precision: str
    flops_per_row: int
    paces: dict[int, Pace]


@dataclass(slots=True)
class Run:
    """A whole run, and what it was made with. The conductor owns it until it has ended."""

    checkpoint: str
    model: dict[str, Any] = field(default_factory=dict)  # what tminus said of itself
    setups: dict[str, str] = field(default_factory=dict)  # contender -> how it was set up
    trials: dict[str, dict[str, float]] = field(default_factory=dict)  # contender -> row-steps/s of each way
    left_out: list[str] = field(default_factory=list)  # sentences
    capacity: dict[str, float] = field(default_factory=dict)  # row-steps/s of each contender, saturated
    own_rate: float = 0.0  # row-steps/s of the bare executor at its best batch, before the loads
    alone_s: dict[str, float] = field(default_factory=dict)  # IMAGESxSTEPS of the mix -> seconds on an idle tminus
    loads: list[Loaded] = field(default_factory=list)
    bare: list[Bare] = field(default_factory=list)
    lock_step: list[dict[str, dict[str, float]]] = field(default_factory=list)  # of each round: bench/lock_step.py

    @property
    def places(self) -> int:
        """How many rows tminus takes in a tick."""
        return int(self.model.get("limits", {}).get("max_batch", 16))
