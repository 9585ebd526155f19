"""Replicas of the server on a Ray cluster, by Ray Serve. Some modules of this package need the extra `ray`.

Ray starts the replicas, routes requests to them and ends them. Ray knows nothing of jobs: the jobs are in PostgreSQL.
"""
