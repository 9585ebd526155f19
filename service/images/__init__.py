"""Encodes and decodes images. Uses neither HTTP nor torch."""
