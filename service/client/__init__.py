"""Sync and async clients of a tminus server.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

The client requires httpx, and `watch` also requires websockets. It imports nothing else from tminus.

_async.py does all network I/O; `make client` generates _sync.py from it. The other modules do no network I/O, and are
shared by both clients. docs/clients.md shows common tasks.

The distribution tminus-client (the folder client/ of the repository) installs this package as `tminus_client`. In the
distribution tminus, the package is `tminus.service.client`. Its imports are relative, so they work under both names.
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
