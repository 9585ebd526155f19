"""The tables of the job store in PostgreSQL, version by version. postgres_database.py runs them."""
