"""Row state on the device, executors of the forward pass, and the measurements before serving. Only here is
torch used.
"""
