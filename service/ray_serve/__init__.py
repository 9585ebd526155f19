"""Replicas of the server on a Ray cluster, run by Ray Serve.

Some modules of this package need the extra `ray`. Ray starts and stops the replicas, and routes requests to them. Ray
knows nothing about jobs, which are in PostgreSQL.
"""
