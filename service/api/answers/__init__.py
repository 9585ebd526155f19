"""From what happened to what a client is sent."""
