"""The choice of each tick's rows, the admission of jobs, and forecasts. Pure: no torch, no asyncio, no clock."""
