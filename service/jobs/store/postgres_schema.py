"""The tables of the job store in PostgreSQL: made at the first start, and brought from version to version."""

import logging
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "migrations"


def prepare_schema(engine: sa.Engine, namespace: str) -> None:
    """Bring a namespace to this version, in one transaction; several replicas that start at once wait for each other.

    namespace: a schema of the database, so that several clusters can share it. Raises ValueError where the database
    cannot be reached or used, or is of a newer version.
    """
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    try:
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"tminus {namespace}"))))
            if not sa.inspect(connection).has_schema(namespace):
                connection.execute(sa.schema.CreateSchema(namespace))
            context = MigrationContext.configure(connection, opts={"version_table_schema": namespace})
            version = context.get_current_revision()
            if version is not None and version not in known:
                raise ValueError(
                    f"its tables are of version {version}, and this tminus knows version {scripts.get_current_head()}; "
                    "nothing was changed. Serve it with the tminus that made them, or name another --job-namespace"
                )
            if version != scripts.get_current_head():
                config.attributes.update(connection=connection, schema=namespace)
                command.upgrade(config, "head")
                log.info("the job store's tables are of version %s now", scripts.get_current_head())
    except sa.exc.SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise ValueError(f"it cannot be used: {reason}") from None
