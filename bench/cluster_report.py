"""What came of simulations of bench/cluster.py: the lines of its table, and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import quantile

if TYPE_CHECKING:
    from bench.cluster import Outcome

COLUMNS = (
    "replicas", "load", "jobs", "refused", "20 steps: median, 99 %", "1000 steps: median, 99 %", "moved",
    "statements a job", "and a second, of a replica",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """What came of one simulation."""

    replicas: int
    load: float  # that was asked for, or else that came
    refused: float
    outcome: "Outcome"

    @property
    def statements(self) -> tuple[float, float]:
        """Count the store's statements for a job, and in a second for a replica."""
        return (
            self.outcome.statements / max(1, len(self.outcome.jobs)),
            self.outcome.renewals / self.outcome.until_s / self.replicas,
        )

    def row(self) -> str:
        """The line, as in a table of Markdown."""
        short, long = (_spread(self.outcome.waits(steps)) for steps in (20, 1000))
        moved = sum(job.moves > 0 for job in self.outcome.jobs)
        for_job, a_second = self.statements
        return (
            f"| {self.replicas} | {self.load:.2f} | {len(self.outcome.jobs):,} | {self.refused:.1%} | {short} | {long} "
            f"| {moved:,} | {for_job:.1f} | {a_second:.2f} |"
        )


def plot(lines: Sequence[Line], path: Path) -> None:
    """How long short and long jobs take, over the number of replicas: the median, and dashed the 99th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "tminus", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = sorted({line.replicas for line in lines})
    for axes, steps in zip(panels, (20, 1000), strict=True):
        for number, load in enumerate(sorted({line.load for line in lines})):
            found = {line.replicas: line.outcome.waits(steps) for line in lines if line.load == load}
            known = [(counts.index(each), waits) for each, waits in found.items() if len(waits) > 1]
            for q, style in ((0.5, "o-"), (0.99, "o--")):
                values = [quantile(waits, q) for _, waits in known]
                label = f"load {load:g}" if q == 0.5 else None
                axes.plot([at for at, _ in known], values, style, color=f"C{number}", label=label, markersize=4)
        axes.set(title=f"Jobs of {steps} steps: median, and 99 % dashed", xlabel="servers", ylabel="seconds")
        axes.set_xticks(range(len(counts)), [str(each) for each in counts])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _spread(seconds: list[float]) -> str:
    return f"{quantile(seconds, 0.5):.2f} s, {quantile(seconds, 0.99):.1f} s" if len(seconds) > 1 else "none"
