"""Plans: compiled for specs, and laid on the device line after line."""

from functools import lru_cache

import torch
from torch import Tensor

from tminus.model.noise import NoiseConfig
from tminus.model.samplers import NUM_COEFFICIENTS, Plan, compile_plan, table_plan
from tminus.model.solvers import MAX_REGISTERS, NUM_INPUTS
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec

MAX_PLANS = 64  # that are kept compiled: 0.1 MB each of 1000 steps, 0.3 MB with registers
FIRST_LINES = 1024  # that there is room for at first; it doubles as jobs come


class PlanCompiler:
    """Compiles the samplers that specs ask for. Most ask for the same few, so the last ones are kept."""

    def __init__(self, model: ModelInfo, noise: NoiseConfig) -> None:
        self._model, self._noise, self._schedule = model, noise, noise.schedule()
        self._kept = lru_cache(MAX_PLANS)(self._compile)

    def plan(self, spec: SampleSpec) -> Plan:
        """Compile a spec's sampler. Raises ValueError for what this model's schedule cannot do."""
        return self._kept(spec.sampler, spec.steps, spec.start, spec.table, spec.eta, spec.clip, spec.timestep_spacing)

    def _compile(
        self, sampler: str, steps: int, start: int, table: str | None, eta: float, clip: bool, spacing: str
    ) -> Plan:
        noise, schedule = self._noise, self._schedule
        if table is not None:
            return table_plan(noise, schedule, self._model.table(table), clip=clip, start=start)
        fractional = self._model.fractional
        return compile_plan(
            noise, schedule, sampler, steps, eta=eta, clip=clip, spacing=spacing, start=start, fractional=fractional
        )


class PlanStore:
    """Owns the lines of all plans. A job's plan has a line for each of its passes until the job ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.timesteps = torch.zeros(FIRST_LINES, device=device)  # that the network is given
        self.scales: Tensor | None = None  # what x is multiplied by on its way in, made when the first such plan comes
        self.lines = torch.zeros(FIRST_LINES, NUM_COEFFICIENTS, device=device)
        self.known = torch.zeros(FIRST_LINES, 2, device=device)  # Plan.known
        self.matrices: Tensor | None = None  # [lines, 5, 8], made when the first plan with registers comes
        self._free = [(0, FIRST_LINES)]  # stretches (start, length) without a plan, ascending, none beside another

    def put(self, plan: Plan) -> int:
        """Store a plan; returns its first line."""
        start = self._take(len(plan))
        try:
            self._write(plan, slice(start, start + len(plan)))
        except BaseException:
            self.free(start, len(plan))
            raise
        return start

    def _write(self, plan: Plan, at: slice) -> None:
        self.timesteps[at] = (plan.timesteps if plan.inputs is None else plan.inputs[:, 1]).to(torch.float32)
        if plan.inputs is not None and self.scales is None:
            self.scales = torch.ones(len(self.lines), device=self._device)
        if self.scales is not None:
            self.scales[at] = 1 if plan.inputs is None else plan.inputs[:, 0].to(self.scales)
        self.lines[at] = plan.lines.to(torch.float32)
        self.known[at] = plan.known.to(torch.float32)
        if plan.matrices is not None:
            if self.matrices is None:
                self.matrices = torch.zeros(len(self.lines), 1 + MAX_REGISTERS, NUM_INPUTS, device=self._device)
            self.matrices[at] = 0
            rows, columns = plan.matrices.shape[1:]
            self.matrices[at, :rows, :columns] = plan.matrices.to(device=self._device, dtype=torch.float32)

    def free(self, start: int, length: int) -> None:
        """Give the lines of a plan back."""
        stretches: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (start, length)]):
            if stretches and sum(stretches[-1]) == begin:
                stretches[-1] = (stretches[-1][0], stretches[-1][1] + size)
            else:
                stretches.append((begin, size))
        self._free = stretches

    def _take(self, length: int) -> int:
        """Take the first free stretch that is long enough, or let the store grow."""
        for k, (start, size) in enumerate(self._free):
            if size >= length:
                self._free[k : k + 1] = [(start + length, size - length)] if size > length else []
                return start
        had = len(self.lines)
        more = max(had, length)
        for name in ("timesteps", "scales", "lines", "known", "matrices"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]))
        self.free(had, more)
        return self._take(length)
