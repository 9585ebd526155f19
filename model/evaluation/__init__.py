"""The figures of a model card, and whether another way of running the network is no worse."""
