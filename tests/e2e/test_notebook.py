"""The notebook of docs/examples, run as a reader runs it."""

import json
from collections.abc import Iterator
from typing import Any

from docs.site.notebook import NOTEBOOK, PICTURES, run
from tests.e2e.conftest import RunningServer


def shown(notebook: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What each cell shows: text, and of pictures the kind, as their pixels may differ by machine."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            kinds = [kind for kind in PICTURES if kind in output.get("data", ())]
            yield cell["id"], kinds[0] if kinds else "".join(output.get("text") or output["data"]["text/plain"])


def test_the_notebook_runs_and_shows_what_is_committed_with_it(bundled_server: RunningServer) -> None:
    made = run(NOTEBOOK, bundled_server.url)
    assert list(shown(made)) == list(shown(json.loads(NOTEBOOK.read_text("utf-8"))))
