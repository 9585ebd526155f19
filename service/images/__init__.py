"""Pixels to bytes and bytes to pixels. No HTTP, no torch."""
