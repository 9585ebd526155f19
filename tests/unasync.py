"""Generate the sync half of the client, service/client/_sync.py, from the async half: `make client`.

Not the package `unasync` (0.6.0): it changes names in code only, and the docstrings that users read need it too.
Nothing formats the result, so that it depends on no tool: where a line of the async half has to be broken and the sync
one would fit, a trailing comma keeps `ruff format` content with both.
"""

import re
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "service" / "client"
ASYNC, SYNC = CLIENT / "_async.py", CLIENT / "_sync.py"
HEADER = "# Generated from service/client/_async.py by tests/unasync.py. Change that file and run `make client`.\n"
# A pattern, from the start of a word, and its replacement.
RULES = {
    r"async (?=def |with |for )": "",
    r"await ": "",
    r"websockets\.asyncio\b": "websockets.sync",
    r"for asyncio; `make client` generates _sync\.py from it\.": "for threads.",
    r"asyncio\b": "time",  # for sleep, which is all that is used of it
    r"__a(?=enter__|exit__|iter__)": "__",
    r"a(?=close\b|iter_bytes\b)": "",
    r"asynccontextmanager\b": "contextmanager",
    r"Async(?=[A-Z])": "",
    r"task\b": "thread",
    r"Tasks\b": "Threads",
}


def sync_of(text: str) -> str:
    """Make sync code and docstrings of async ones."""
    for pattern, replacement in RULES.items():
        text = re.sub(r"\b" + pattern, replacement, text)
    return text


def generated() -> str:
    """The text that service/client/_sync.py should have."""
    return HEADER + sync_of(ASYNC.read_text("utf-8"))


if __name__ == "__main__":
    SYNC.write_text(generated(), "utf-8")
