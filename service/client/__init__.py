"""A client of a tminus server, sync and async. Needs httpx, and `watch` websockets; nothing else of this project.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

All I/O is in _async.py, which is written by hand, and in _sync.py, which `make client` generates from it. The modules
beside them are shared by both and do no I/O. docs/clients.md shows the usual tasks.

It is imported as `tminus_client`, from the distribution tminus-client (the folder client/ of the repository), and as
`tminus.service.client` within tminus. Imports inside it are relative, so that neither name needs the other.
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
