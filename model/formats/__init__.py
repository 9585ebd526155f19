"""Checkpoints of other projects, read and rewritten in the names of model/unet.py."""
