"""Stores of durable jobs: SQLite, PostgreSQL, and large results in an object store."""
