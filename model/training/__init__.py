"""Training of networks and autoencoders, distillation, and folding of guidance into weights."""
