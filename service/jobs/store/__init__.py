"""Where durable jobs are kept: SQLite, PostgreSQL, and large results in an object store."""
