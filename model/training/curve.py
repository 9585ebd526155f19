"""The loss curve of a run: means over strides of steps, saved with the run and drawn as an SVG."""

import html
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

FIRST_STRIDE = 10  # steps per point; doubled each time the curve reaches MOST_POINTS
MOST_POINTS = 1000
SHOWN_STEPS = 100  # number of steps over which the displayed loss is averaged
SMOOTHED = 50  # The smooth line is a moving average over 1/50 of the points.
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 32, 40  # margins
Point = tuple[int, float]


class LossCurve:
    """The mean loss over strides of steps. The state includes the current stride, so resuming is exact."""

    def __init__(self) -> None:
        self.points: list[Point] = []  # last step of each stride, and the mean loss over it
        self._stride = FIRST_STRIDE
        self._sum: Tensor | float = 0.0  # kept on the device, so that most steps need not wait for it
        self._count = 0

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of a step, counted from 1. At the end of a stride, this waits for the device."""
        self._sum, self._count = self._sum + loss.detach(), self._count + 1
        if step % self._stride:
            return
        self.points.append((step, float(self._sum) / self._count))
        self._sum, self._count = 0.0, 0
        if len(self.points) >= MOST_POINTS:
            self._stride *= 2
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(step, (one + other) / 2) for (_, one), (step, other) in pairs]

    def recent(self) -> float:
        """Return the mean loss of about the last SHOWN_STEPS steps, or NaN without any. Waits for the device."""
        total, count = float(self._sum), self._count
        for _, mean in reversed(self.points):
            if count >= SHOWN_STEPS:
                break
            total, count = total + mean * self._stride, count + self._stride
        return total / count if count else math.nan

    def state(self) -> dict[str, Any]:
        rest = {"stride": self._stride, "sum": float(self._sum), "count": self._count}
        return {"points": [list(point) for point in self.points], **rest}

    def load(self, state: dict[str, Any]) -> None:
        """Load a saved state. Raises KeyError, TypeError or ValueError if it is malformed."""
        self.points = [(int(step), float(mean)) for step, mean in state["points"]]
        self._stride, self._count = int(state["stride"]), int(state["count"])
        self._sum = float(state["sum"])


def loss_svg(points: Sequence[Point], name: str) -> str:
    """Plot the loss on a logarithmic scale, with a smoothed line. `points` must not be empty."""
    last = points[-1][0]
    logs = [_log(mean) for _, mean in points]
    low, high = min(logs), max(logs)
    low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(log: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - log) / (high - low)

    def line(steps: Sequence[float], values: Sequence[float], style: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
        return f'<polyline points="{path}" fill="none" {style}/>'

    steps = [step for step, _ in points]
    window = max(1, len(logs) // SMOOTHED)
    smooth = [sum(part) / len(part) for k in range(len(logs)) if (part := logs[max(0, k + 1 - window) : k + 1])]
    bottom = HEIGHT - BOTTOM
    drawn = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20">{html.escape(name)}: loss {points[-1][1]:.4g} at step {last}</text>',
        *(f'<path d="M{LEFT} {y(_log(tick)):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
          f'<text x="{LEFT - 8}" y="{y(_log(tick)) + 4:.1f}" text-anchor="end">{tick:g}</text>'
          for tick in _log_ticks(low, high)),
        *(f'<path d="M{x(tick):.1f} {bottom}v5" stroke="#888"/>'
          f'<text x="{x(tick):.1f}" y="{bottom + 20}" text-anchor="middle">{tick}</text>'
          for tick in _ticks(last)),
        f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        line(steps, logs, 'stroke="#1b6ca8" stroke-opacity=".3"'),
        line(steps, smooth, 'stroke="#1b6ca8" stroke-width="2"'),
    ]  # fmt: skip
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12" fill="#333">', *drawn, "</svg>", ""])


def _log(value: float) -> float:
    return math.log10(max(value, 1e-12))


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose ticks from 10**low to 10**high: powers of ten, or finer steps if there are fewer than three."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((10,), (10, 20, 50), (10, 15, 20, 30, 50, 70), range(10, 100)):
        values = [digit * 10.0 ** (power - 1) for power in powers for digit in digits]
        ticks = [value for value in values if low <= _log(value) <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 8)] if ticks else [10 ** ((low + high) / 2)]


def _ticks(last: int) -> list[int]:
    """Choose at most nine round step numbers from 0 to `last`."""
    size = 10 ** max(0, len(str(last)) - 1)
    stride = next(each for each in (size // 10, size // 5, size // 2, size, 2 * size) if each and last // each <= 8)
    return list(range(0, last + 1, stride))
