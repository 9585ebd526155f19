"""Evaluation: the figures of a model card, and checks that other executors and precisions make no worse images."""
