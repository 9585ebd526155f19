"""Generate the sync half of the client, service/client/_sync/, from the async half: `make client`.

Not the package `unasync` (0.6.0): it changes names in code only, and the docstrings that users read need it too.
Nothing formats the result, so that it depends on no tool: where a line of the async half has to be broken and the sync
one would fit, a trailing comma keeps `ruff format` content with both.
"""

import re
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "service" / "client"
HEADER = "# Generated from service/client/_async/{} by tests/unasync.py. Change that file and run `make client`.\n"
# A pattern, from the start of a word, and its replacement.
RULES = {
    r"async (?=def |with |for )": "",
    r"await ": "",
    r"websockets\.asyncio\b": "websockets.sync",
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


def generated() -> dict[str, str]:
    """The files of service/client/_sync/ as they should be, by name."""
    sources = sorted((CLIENT / "_async").glob("*.py"))
    return {file.name: HEADER.format(file.name) + sync_of(file.read_text("utf-8")) for file in sources}


def main() -> None:
    """Write the files, and remove those whose source is gone."""
    files = generated()
    for file in list((CLIENT / "_sync").glob("*.py")):
        if file.name not in files:
            file.unlink()
    for name, text in files.items():
        (CLIENT / "_sync" / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
