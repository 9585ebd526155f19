"""Starts a server from its settings."""
