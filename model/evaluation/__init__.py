"""Evaluation of checkpoints: figures for a model card, and checks that an executor or a precision does no harm."""
