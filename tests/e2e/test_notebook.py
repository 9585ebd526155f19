"""The notebook of docs/examples, run as a reader runs it.

Beside `make serve`, `jupyter nbconvert --to notebook --execute --inplace` writes anew what its cells show.
"""

from collections.abc import Iterator

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents import ROOT
from tests.e2e.conftest import RunningServer

NOTEBOOK = ROOT / "docs" / "examples" / "first_images.ipynb"


def shown(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """What each cell shows: text, and of pictures the kind, as their pixels may differ by machine."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            picture = next((kind for kind in output.get("data", ()) if kind.startswith("image/")), None)
            yield cell.id, picture or output.get("text") or output.data["text/plain"]


@pytest.mark.long
def test_the_notebook_runs_and_shows_what_is_committed_with_it(bundled_server: RunningServer) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = list(shown(notebook))
    for cell in notebook.cells:
        cell.source = cell.source.replace("http://localhost:8000", bundled_server.url)
    NotebookClient(notebook, timeout=240).execute()
    assert list(shown(notebook)) == committed
