"""The HTTP and WebSocket API. It turns requests into specs and results into responses, but computes no images."""
