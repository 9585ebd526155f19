"""Chooses the rows of each tick, admits jobs, and makes forecasts. No torch, no asyncio, no clock."""
