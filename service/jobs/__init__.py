"""Durable jobs: what was accepted is kept, finished and told, over restarts."""
