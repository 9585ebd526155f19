"""Replicas of the server on a Ray cluster, by Ray Serve. Needs the extra `ray`; some modules here do not.

Ray starts the replicas, routes requests to them and ends them. Of jobs it knows nothing: those are in PostgreSQL.
"""
