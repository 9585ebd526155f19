"""A notebook as a page: its text, its code, and what the cells have shown. And running it, which writes that anew.

    python -m docs.site.notebook http://localhost:8000

runs docs/examples/first_images.ipynb against a server, and keeps the outputs in it. It needs the extra `test`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_images.ipynb"
SERVER = "http://localhost:8000"  # as the notebook has it
PICTURES = ("image/png", "image/webp", "image/jpeg", "image/gif")


def as_page(name: str, text: str, address: str) -> str:
    """Return a notebook as Markdown, with its pictures inside.

    name: of the notebook. text: its JSON. address: where the notebook itself is.
    """
    heading, *parts = _parts(json.loads(text))
    first, _, rest = heading.partition("\n")
    return "\n\n".join([first, f"*This page shows the notebook [{name}]({address}).*", rest, *parts]) + "\n"


def _parts(notebook: Mapping[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data: Mapping[str, Any] = output.get("data", {"text/plain": output.get("text", "")})
            kind = next((kind for kind in PICTURES if kind in data), None)
            if kind is None:
                yield f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
            else:
                width = output["metadata"].get(kind, {}).get("width", "")
                picture = "".join("".join(data[kind]).split())
                yield f'<img src="data:{kind};base64,{picture}" alt="What the cell shows" width="{width}">'


def run(notebook: Path, url: str) -> dict[str, Any]:
    """Run a notebook against a server; return it with its outputs. Raises nbclient's CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    loaded = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    for cell in loaded.cells:
        cell.source = cell.source.replace(SERVER, url)
    NotebookClient(loaded, timeout=240, record_timing=False).execute()
    for cell in loaded.cells:
        cell.source = cell.source.replace(url, SERVER)
    loaded.metadata.language_info = {"name": "python"}  # and not which Python this was
    made: dict[str, Any] = json.loads(nbformat.writes(loaded))  # type: ignore[no-untyped-call]
    return made


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(run(NOTEBOOK, sys.argv[1]), indent=1, ensure_ascii=False) + "\n", "utf-8")
