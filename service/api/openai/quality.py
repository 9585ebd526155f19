"""What `quality` means: a number of steps, relative to the default. Pure.

More steps come nearer to the sampler's exact solution, which need not be what looks best. So `medium` is the default of
every request (`settings_of`), `low` half of its steps, or the checkpoint's own table of few steps, and `high` twice as
many.
"""

from collections.abc import Mapping
from typing import Any, Literal

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS
from tminus.model.sampler_tables import Table, nearest
from tminus.service.api.request.specs import settings_of, tables_for
from tminus.service.model_info import ModelInfo

Quality = Literal["low", "medium", "high"]
SHARE_OF_STEPS: Mapping[Quality, float] = {"low": 0.5, "medium": 1.0, "high": 2.0}
TUNED = "tuned"
OF_GUIDANCE = {"guidance", "guidance_interval", "guidance_rescale"}


def settings_of_quality(
    quality: Quality, given: Mapping[str, Any], model: ModelInfo, *, can_guide: bool
) -> dict[str, Any]:
    """Return the sampler, steps and guidance that a quality other than medium stands for.

    given, can_guide: see `settings_of`. Nothing is returned for medium, nor where the request says how many steps it
    takes, nor for what is refused.
    """
    if quality == "medium" or given.keys() & {"steps", "table"} or given.get("sampler") not in (None, *model.samplers):
        return {}
    own = settings_of(given, model, can_guide=can_guide)
    steps = max(1, round(own.steps * SHARE_OF_STEPS[quality]))
    if own.sampler in TABLE_SAMPLERS:
        tables = tables_for(given, model, own.sampler, own.guidance)
        return _of_table(nearest(tables, steps, own.guidance)) if tables else {}
    if quality == "low" and "sampler" not in given:
        tables = tables_for(given, model, TUNED, own.guidance)
        if not (tables or given.keys() & OF_GUIDANCE):
            tables = tables_for(given, model, TUNED, 1.0)
        if few := [table for table in tables if table.steps < own.steps]:
            return _of_table(nearest(few, steps, own.guidance))
    most = SAMPLER_FACTS[own.sampler].max_steps(model.num_timesteps)
    return {"sampler": own.sampler, "steps": min(steps, most), "guidance": own.guidance}


def _of_table(table: Table) -> dict[str, Any]:
    return {"sampler": table.sampler, "steps": table.steps, "guidance": table.guidance}
