"""HTTP and WebSocket: requests become specs, and results become responses. Nothing is computed here."""
