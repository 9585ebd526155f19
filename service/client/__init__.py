"""Sync and async clients of a tminus server.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

The client requires httpx. `watch` also requires websockets. Nothing else of tminus is imported.

_async.py does all network I/O; `make client` generates _sync.py from _async.py. Both clients share the other modules,
which do no network I/O. docs/clients.md shows the usual tasks.

The distribution tminus-client (the folder client/ of the repository) installs this package as `tminus_client`. Within
tminus, the package is `tminus.service.client`. Imports inside the package are relative and work under both names.
"""

from ._async import AsyncClient, AsyncJob, AsyncWatching
from ._sync import Client, Job, Watching
from .errors import ClientError, Problem, UnexpectedAnswer, Unreachable
from .results import (
    Accepted,
    Cancelled,
    Done,
    Ended,
    Frame,
    JobState,
    ModelState,
    Noised,
    Progress,
    Sampled,
    Waiting,
)

__all__ = [
    "Accepted",
    "AsyncClient",
    "AsyncJob",
    "AsyncWatching",
    "Cancelled",
    "Client",
    "ClientError",
    "Done",
    "Ended",
    "Frame",
    "Job",
    "JobState",
    "ModelState",
    "Noised",
    "Problem",
    "Progress",
    "Sampled",
    "UnexpectedAnswer",
    "Unreachable",
    "Waiting",
    "Watching",
]
