"""The models that may be loaded while the server runs, by name. No request names a path."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a model: it stands in addresses, and names a folder
UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]+")


def name_of(text: str) -> str:
    """Make a name that may stand in addresses of what a checkpoint calls itself."""
    return UNNAMEABLE.sub("-", text).strip("-._")[:64] or "model"


@dataclass(frozen=True, slots=True)
class Library:
    """Where they are."""

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None  # each of its folders is a model of that name

    def folders(self) -> dict[str, Path]:
        """The folder of each model, as they are now."""
        found = dict(self.named)
        try:
            paths = sorted(self.folder.iterdir()) if self.folder is not None else []
        except OSError as error:
            log.warning("the folder of models cannot be read: %s", error)
            return found
        for path in paths:
            try:
                if path.is_dir() and NAME.fullmatch(path.name):
                    found.setdefault(path.name, path)
            except OSError as error:  # a link into a folder that may not be entered
                log.warning("%s in the folder of models cannot be read: %s", path.name, error)
        return found
