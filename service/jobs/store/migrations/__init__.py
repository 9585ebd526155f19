"""The tables of the job store in PostgreSQL, version by version. postgres_schema.py runs them."""
