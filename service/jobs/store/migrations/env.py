"""What Alembic runs: the migrations, on the connection that postgres_database.py gives, in its schema."""

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table_schema=attributes["schema"],
    transactional_ddl=True,
)
context.run_migrations()
