"""Chooses the rows of each tick, accepts jobs, and predicts their ends. Pure: no torch, no asyncio, no clock."""
