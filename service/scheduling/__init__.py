"""Which rows step next, which jobs are accepted, when they will end. Pure: no torch, no asyncio, no clock."""
