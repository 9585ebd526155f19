"""What `quality` means for a checkpoint: a sampler, its steps and its guidance. Pure.

More steps come nearer to the sampler's exact solution, which need not be what looks best. So `medium` is what the
checkpoint recommends, `low` half of its steps, or the checkpoint's own table of few steps, and `high` twice as many.
"""

from collections.abc import Mapping
from typing import Any, Literal

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS, Recommended
from tminus.model.sampler_tables import Table, nearest
from tminus.service.model_info import ModelInfo

Quality = Literal["low", "medium", "high"]
SHARE_OF_STEPS: Mapping[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 2.0}
WITHOUT_ADVICE = "dpmpp_2m"  # for a checkpoint that recommends nothing: the sampler to begin with, see the catalogue
TUNED = "tuned"
OF_NO_TABLE = {"timestep_spacing", "eta"}  # a table has its timesteps and its noise
OF_GUIDANCE = {"guidance_interval", "guidance_rescale"}


def settings_of(quality: Quality, given: Mapping[str, Any], model: ModelInfo, *, has_class: bool) -> dict[str, Any]:
    """Fill in the sampler, steps and guidance that a request leaves out.

    given: the request's parameters of POST /sample, of the right types; what is wrong in them is left for others to
    say. has_class: whether its images have a class, without which none is guided.
    """
    own = _recommended(model)
    can_guide = has_class and model.null_class is not None
    guidance = own.guidance if can_guide else 1.0
    tables = [table for table in model.tables if _agrees(table, given)]
    if "table" in given and tables:
        return _of_table(tables[0])
    tables = [table for table in tables if can_guide or table.guidance == 1]
    few = [table for table in tables if table.sampler == TUNED and table.steps < own.steps]
    if quality == "low" and own.sampler not in TABLE_SAMPLERS and few:
        return _of_table(_best(few, _share(quality, own.steps), guidance))
    if own.sampler in TABLE_SAMPLERS and not any(table.sampler == own.sampler for table in tables):
        own = _plain(model)  # no table is as asked for, and any steps and guidance are possible
    # A table that there is not is refused as such, and not for the recommended sampler, which has none.
    sampler = given.get("sampler", TUNED if "table" in given and TUNED in model.samplers else own.sampler)
    if sampler not in model.samplers:
        return {}
    facts = SAMPLER_FACTS[sampler]
    wanted = _share(quality, own.steps if sampler == own.sampler else facts.good_steps)
    if sampler in TABLE_SAMPLERS:
        own_tables = [table for table in tables if table.sampler == sampler]
        return _of_table(_best(own_tables, wanted, guidance)) if own_tables else {"sampler": sampler}
    return {"sampler": sampler, "steps": min(wanted, facts.max_steps(model.num_timesteps)), "guidance": guidance}


def _agrees(table: Table, given: Mapping[str, Any]) -> bool:
    """Whether a table is what a request asks for, as far as it does."""
    if given.keys() & (OF_NO_TABLE if table.guidance != 1 else OF_NO_TABLE | OF_GUIDANCE):
        return False
    own = {"sampler": table.sampler, "steps": table.steps, "guidance": table.guidance, "table": table.hash}
    return all(given.get(name, value) == value for name, value in own.items())


def _recommended(model: ModelInfo) -> Recommended:
    own = model.recommended
    if own is not None and own.sampler in model.samplers:
        return own
    return _plain(model)


def _plain(model: ModelInfo) -> Recommended:
    """Usual settings of a sampler that needs no table, unless the model has no such one."""
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
