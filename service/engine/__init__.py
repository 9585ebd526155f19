"""Row state on the device, executors of the forward pass, and measurements before serving. Only this imports torch."""
