"""A client of a tminus server, sync and async. Needs httpx, websockets and nothing else of this project.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

All I/O is in _async/, which is written by hand, and in _sync/, which `make client` generates from it; the modules
beside them are shared by both and do no I/O. docs/clients.md shows the usual tasks.
"""

from tminus.service.client._async.client import AsyncClient
from tminus.service.client._async.job import AsyncJob
from tminus.service.client._async.watching import AsyncWatching
from tminus.service.client._sync.client import Client
from tminus.service.client._sync.job import Job
from tminus.service.client._sync.watching import Watching
from tminus.service.client.errors import ClientError, Problem, UnexpectedAnswer, Unreachable
from tminus.service.client.messages import Accepted, Cancelled, Done, Ended, Frame, Progress, Waiting
from tminus.service.client.models import ModelState
from tminus.service.client.results import JobState, Noised, Sampled

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
