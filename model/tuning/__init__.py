"""Fits sampler tables to a checkpoint, for `tminus tune`."""
