"""Durable jobs: kept on disk, finished over restarts, and shown to clients."""
