"""Evaluation of checkpoints, and of the executors and precisions that run them."""
