"""What surrounds every request: connections, callers, origins and bounds."""
