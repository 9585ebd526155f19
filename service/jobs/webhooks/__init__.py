"""Webhooks of durable jobs: allowed receivers, owed events, signatures and delivery."""
