"""Code around every request: connections, authentication, origins and bounds."""
