"""What a request gets that leaves its sampler, steps or guidance out: one rule for requests of every kind. Pure.

LEFT_OUT in api/answers/operations.py has it as a table.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tminus.model.catalogue import TABLE_SAMPLERS, Recommended, usual_settings
from tminus.model.sampler_tables import Table, nearest
from tminus.service.model_info import ModelInfo

SETTINGS = ("sampler", "steps", "guidance")
# Parameters of POST /sample that decide what the settings are where those are left out.
DECISIVE = (*SETTINGS, "table", "nearest", "timestep_spacing")


def settings_of(given: Mapping[str, Any], model: ModelInfo, *, can_guide: bool) -> Recommended:
    """Return the sampler, steps and guidance that a request takes. Whether there are such is for others to check.

    given: its parameters by name, without those that it leaves out. can_guide: whether each of its images has a class,
    and the model a null class.
    """
    return replace(_left_out(given, model, can_guide), **{name: given[name] for name in SETTINGS if name in given})


def _left_out(given: Mapping[str, Any], model: ModelInfo, can_guide: bool) -> Recommended:
    own = model.recommended
    if "table" in given and model.tables:  # of another hash it is refused, whichever table stands here
        named = [table for table in model.tables if table.hash == given["table"]]
        return _settings_of_table((named or model.tables)[0])
    sampler = given.get("sampler", model.default_sampler if "steps" in given else own.sampler)
    if "steps" in given or sampler != own.sampler:
        usual = usual_settings(model.num_timesteps, sampler)
        settings = replace(usual, steps=given.get("steps", usual.steps))
        return _as_a_table(settings, given, model, can_guide) if sampler in TABLE_SAMPLERS else settings
    own = replace(own, guidance=given.get("guidance", own.guidance if can_guide else 1.0))
    if sampler not in TABLE_SAMPLERS:
        return own
    if tables := tables_for(given, model, sampler, own.guidance):
        return _settings_of_table(nearest(tables, own.steps, own.guidance))
    usual = usual_settings(model.num_timesteps)
    if given.keys() & {"sampler", "nearest"} or usual.sampler not in model.samplers:
        return own  # which is refused, or the nearest table is taken
    return replace(usual, guidance=own.guidance)


def _as_a_table(settings: Recommended, given: Mapping[str, Any], model: ModelInfo, can_guide: bool) -> Recommended:
    """Return the settings with the guidance that there is a table for, and its steps where none are named."""
    tables = [table for table in model.tables if table.sampler == settings.sampler]
    if "steps" in given and not given.get("nearest"):
        tables = [table for table in tables if table.steps == settings.steps]
    fitting = [table for table in tables if table.guidance == given.get("guidance", 1.0)]
    if not fitting and can_guide and "guidance" not in given:
        fitting = tables
    if not fitting:
        return settings  # which is refused
    table = nearest(fitting, settings.steps, settings.guidance)
    return replace(settings, steps=given.get("steps", table.steps), guidance=table.guidance)


def tables_for(given: Mapping[str, Any], model: ModelInfo, sampler: str, guidance: float) -> list[Table]:
    """Return the tables of a sampler for this guidance, where what else a request asks for can be had of a table."""
    if "timestep_spacing" in given:  # a table has its own timesteps
        return []
    return [table for table in model.tables if (table.sampler, table.guidance) == (sampler, guidance)]


def _settings_of_table(table: Table) -> Recommended:
    return Recommended(table.sampler, table.steps, table.guidance)


def named_by(given: Mapping[str, Any]) -> str:
    """Say which settings a request names itself, for the metric: table, both, sampler, steps or none."""
    if "table" in given:
        return "table"
    if given.keys() >= {"sampler", "steps"}:
        return "both"
    return next((name for name in ("sampler", "steps") if name in given), "none")
