"""How networks are trained, distilled and folded."""
