"""The HTTP and WebSocket API: converts requests to specs and results to responses, and computes no images."""
