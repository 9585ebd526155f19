"""The engine: row state on the device, forward passes, and measurements before serving.

Only this layer of the server imports torch.
"""
