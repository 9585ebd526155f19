"""Training of networks and autoencoders, including distillation and guidance folded into weights."""
