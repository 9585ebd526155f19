"""Which rows step next, who may enter, what is foreseen. Pure: no torch, no asyncio, no clock."""
