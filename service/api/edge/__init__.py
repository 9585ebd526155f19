"""Processing around every request: connections, authentication, origin checks and limits."""
