"""What `quality` means for a checkpoint: a sampler, its steps and its guidance. Pure.

More steps come nearer to the sampler's exact solution, which need not be what looks best. So `medium` is what the
checkpoint recommends, `low` half of its steps, or the checkpoint's own table of few steps, and `high` twice as many.
"""

from collections.abc import Mapping
from typing import Any, Literal

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS
from tminus.model.recommended import Recommended
from tminus.model.tables import Table, nearest
from tminus.service.model_info import ModelInfo

Quality = Literal["low", "medium", "high"]
SHARE_OF_STEPS: Mapping[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 2.0}
WITHOUT_ADVICE = "dpmpp_2m"  # for a checkpoint that recommends nothing: the sampler to begin with, see the catalogue
TUNED = "tuned"
# A request that has one of these is not given a tuned table in place of the recommended sampler.
OF_A_SAMPLER = {"sampler", "steps", "guidance", "guidance_interval", "guidance_rescale", "timestep_spacing", "eta"}


def settings_of(quality: Quality, given: Mapping[str, Any], model: ModelInfo, *, has_class: bool) -> dict[str, Any]:
    """Fill in the sampler, steps and guidance that a request leaves out.

    given: the request's parameters of POST /sample, not yet checked; what is wrong in them is left for others to say.
    has_class: whether its images have a class, without which none is guided.
    """
    own = _recommended(model)
    wanted = _share(quality, own.steps)
    guidance = own.guidance if has_class and model.null_class is not None else 1.0
    if quality == "low" and not given.keys() & OF_A_SAMPLER:
        tables = [table for table in model.tables if table.sampler == TUNED and table.steps < own.steps]
        if tables and own.sampler not in TABLE_SAMPLERS:
            return _of_table(_best(tables, wanted, guidance))
    sampler = given.get("sampler", own.sampler)
    if sampler not in model.samplers:
        return {}
    facts = SAMPLER_FACTS[sampler]
    if sampler != own.sampler:
        wanted = _share(quality, facts.good_steps)
    if sampler in TABLE_SAMPLERS:
        if given.keys() & {"steps", "guidance", "table"}:
            return {"sampler": sampler}
        return _of_table(_best([table for table in model.tables if table.sampler == sampler], wanted, guidance))
    return {"sampler": sampler, "steps": min(wanted, facts.max_steps(model.num_timesteps)), "guidance": guidance}


def _recommended(model: ModelInfo) -> Recommended:
    own = model.recommended
    if own is not None and own.sampler in model.samplers:
        return own
    sampler = WITHOUT_ADVICE if WITHOUT_ADVICE in model.samplers else model.default_sampler
    facts = SAMPLER_FACTS[sampler]
    return Recommended(sampler, min(facts.good_steps, facts.max_steps(model.num_timesteps)))


def _share(quality: Quality, steps: int) -> int:
    return max(1, round(steps * SHARE_OF_STEPS[quality]))


def _best(tables: list[Table], steps: int, guidance: float) -> Table:
    """The table of about so many steps; of this guidance if there is one, else of none."""
    with_guidance = [table for table in tables if table.guidance == guidance]
    return nearest(with_guidance or [table for table in tables if table.guidance == 1] or tables, steps, guidance)


def _of_table(table: Table) -> dict[str, Any]:
    return {"sampler": table.sampler, "steps": table.steps, "guidance": table.guidance}
