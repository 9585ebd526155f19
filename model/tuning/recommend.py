"""Choose the table that a checkpoint recommends: the smallest one that is as exact as the plain sampler.

The distance to the teacher's images cannot judge a table, since it is fitted to them. The judge is the exact solution:
the teacher in twice as many steps, from noise that no table was fitted to. A table is good enough if its images are no
further from it than those of the plain sampler that it would replace.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from tminus.model.catalogue import SAMPLER_FACTS, Recommended, usual_settings
from tminus.model.checkpoint import Checkpoint
from tminus.model.guidance import Forward
from tminus.model.sampler_tables import Table
from tminus.model.samplers import Plan, table_plan
from tminus.model.tuning.fit import Fitter, Rows

TUNED = "tuned"


class Verdict(NamedTuple):
    """The table to recommend, or None to keep the recommendation, and a phrase that says why."""

    recommended: Recommended | None
    why: str


class Trial:
    """Compares the tables of one guidance with the plain sampler whose place they would take."""

    def __init__(self, checkpoint: Checkpoint, tables: Iterable[Table]) -> None:
        """Keep the tables that have the recommended guidance, and take fewer passes than the plain sampler."""
        own = checkpoint.settings
        usual = replace(usual_settings(checkpoint.noise.num_train_timesteps), guidance=own.guidance)
        self.plain = usual if own.sampler == TUNED else own
        self._passes = SAMPLER_FACTS[self.plain.sampler].num_passes(self.plain.steps)
        rivals = [table for table in tables if (table.sampler, table.guidance) == (TUNED, own.guidance)]
        rivals = [table for table in rivals if SAMPLER_FACTS[TUNED].num_passes(table.steps) < self._passes]
        self.tables = sorted(rivals, key=lambda table: table.steps)
        self._checkpoint = checkpoint

    @property
    def hindrance(self) -> str | None:
        """Say why nothing can be compared; None where something can."""
        if SAMPLER_FACTS[self.plain.sampler].noise == "always":
            return f"{self.plain} adds fresh noise, so its images are no solution's"
        if not self.tables:
            return f"no table has the guidance of {self.plain}, and fewer than its {self._passes} passes"
        return None

    def run(self, teacher: str, forward: Forward, rows: Rows, batch_size: int) -> Verdict:
        """Judge the tables, from the fewest steps on, until one is good enough.

        teacher: SAMPLER:STEPS, a plain solver. `forward` runs the checkpoint's network.
        """
        if self.hindrance is not None:
            return Verdict(None, self.hindrance)
        checkpoint, plain = self._checkpoint, self.plain
        noise, (sampler, _, steps) = checkpoint.noise, teacher.partition(":")
        finer = min(noise.num_train_timesteps, 2 * max(plain.steps, int(steps)))

        judge = Fitter(
            checkpoint, forward, rows, plain.guidance, held_out=len(rows.noise), batch_size=batch_size
        )  # it fits nothing here
        judge.solve(checkpoint.plan(sampler, finer, guidance=plain.guidance))

        def error(plan: Plan) -> float:
            return math.sqrt(judge.error(plan))

        plain_error = error(checkpoint.plan(plain.sampler, plain.steps, guidance=plain.guidance))
        figures = f"root mean square error from {finer} steps of {sampler}: {plain_error:.4f} by {plain}"
        for table in self.tables:
            table_error = error(table_plan(noise, noise.schedule(), table, clip=None))
            figures += f", {table_error:.4f} by {table.steps} of {TUNED}"
            if table_error <= plain_error:
                return Verdict(Recommended(TUNED, table.steps, table.guidance), figures)
        return Verdict(None, figures)
