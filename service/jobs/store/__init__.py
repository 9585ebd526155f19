"""Stores of durable jobs: SQLite, PostgreSQL, and an object store for large results."""
