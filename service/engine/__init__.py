"""Row state on the device, forward passes, and measurements before serving. Only this layer imports torch."""
