"""Webhooks of durable jobs: allowed receivers, pending events, signatures and delivery."""
