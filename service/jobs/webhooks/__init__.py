"""Webhooks of durable jobs: who may be told, what is owed, and how it is signed and sent."""
