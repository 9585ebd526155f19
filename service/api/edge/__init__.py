"""What every request passes through: connections, authentication, origin checks and limits."""
