"""Readers for the checkpoints of other projects."""
