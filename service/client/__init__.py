"""A client of a tminus server, sync and async. Needs httpx, websockets and nothing else of this project.

    with Client("http://localhost:8000") as tminus:
        Path("out.png").write_bytes(tminus.sample(n=4, steps=50, class_label="sneaker").data)

Calls are generators without I/O (calls.py, watching.py, following.py); line.py and async_line.py run them.
docs/clients.md has the usual tasks.
"""

from service.client.async_client import AsyncClient, AsyncJob, AsyncWatching
from service.client.client import Client, Job, Watching
from service.client.errors import ClientError, Problem, UnexpectedAnswer, Unreachable
from service.client.messages import Accepted, Cancelled, Done, Ended, Frame, Progress, Waiting
from service.client.results import JobState, Noised, Sampled

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
    "Noised",
    "Problem",
    "Progress",
    "Sampled",
    "UnexpectedAnswer",
    "Unreachable",
    "Waiting",
    "Watching",
]
