"""HTTP and WebSocket: a request to a spec, a result to a response. Nothing is computed here."""
