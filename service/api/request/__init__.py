"""From what a client sends to checked values."""
