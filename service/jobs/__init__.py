"""Durable jobs: stored on disk, resumed after restarts, and shown to clients."""
