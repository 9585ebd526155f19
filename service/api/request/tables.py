"""Which table of the checkpoint a request takes, for the samplers that have tables. Pure."""

from tminus.model.sampler_tables import Table, nearest, steps_and_guidances
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo


def choose_table(
    model: ModelInfo,
    sampler: str,
    steps: int | None,
    guidance: float,
    *,
    take_nearest: bool = False,
    table_hash: str | None = None,
) -> Table:
    """Choose the table for these steps and this guidance, where 1 is off; steps None takes those recommended.

    take_nearest: of the tables that are guided, or not, as asked. Raises InvalidField, which lists what there is.
    """
    tables = [table for table in model.tables if table.sampler == sampler]
    there = steps_and_guidances(tables)
    of_kind = [table for table in tables if (table.guidance == 1) == (guidance == 1)]
    if steps is None:
        own = model.recommended
        steps = own.steps if own is not None and own.sampler == sampler else max(table.steps for table in tables)
    if not of_kind:
        raise InvalidField.of("guidance", f"one that {sampler} has a table for: {there}", guidance)
    if take_nearest:
        table = nearest(of_kind, steps, guidance)
    else:
        with_steps = [table for table in tables if table.steps == steps]
        fitting = [table for table in with_steps if table.guidance == guidance]
        if not fitting:
            field, value = ("guidance", guidance) if with_steps else ("steps", steps)
            raise InvalidField.of(field, f"one that {sampler} has a table for, or nearest=true: {there}", value)
        (table,) = fitting
    if table_hash not in (None, table.hash):
        raise InvalidField.of("table", f"that of the table taken, {table.hash}", table_hash)
    return table
