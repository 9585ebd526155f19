"""How many bytes of what clients send are held at once. No asyncio, no threads of its own."""

MAX_HELD_BYTES = 256 * 2**20
