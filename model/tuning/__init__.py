"""Tables fitted to a checkpoint: `tminus tune`."""
