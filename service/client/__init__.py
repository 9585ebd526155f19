"""A client of a tminus server, sync and async. Needs httpx, and `watch` websockets; nothing else of this project.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

All I/O is in _async/, which is written by hand, and in _sync/, which `make client` generates from it; the modules
beside them are shared by both and do no I/O. docs/clients.md shows the usual tasks.

It is imported as `tminus_client`, from the distribution tminus-client (the folder client/ of the repository), and as
`tminus.service.client` within tminus. Imports inside it are relative, so that neither name needs the other.
"""

from ._async.client import AsyncClient
from ._async.job import AsyncJob
from ._async.watching import AsyncWatching
from ._sync.client import Client
from ._sync.job import Job
from ._sync.watching import Watching
from .errors import ClientError, Problem, UnexpectedAnswer, Unreachable
from .messages import Accepted, Cancelled, Done, Ended, Frame, Progress, Waiting
from .results import JobState, ModelState, Noised, Sampled

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
