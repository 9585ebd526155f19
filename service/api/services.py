"""The parts of the server that a request is answered with, as one value."""

import asyncio
from dataclasses import dataclass

from tminus.service.access.access import Access
from tminus.service.api.answers.caching import ResultCache
from tminus.service.api.edge.origin import Doors
from tminus.service.api.edge.stream_limits import Streams
from tminus.service.api.elsewhere import Elsewhere
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.views import JobStatuses
from tminus.service.jobs.webhooks.receivers import Allowed
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Services:
    """A model and what all models share. One is built for each model that is loaded; every handler takes one."""

    number: int  # of the model in this process; it is never given again
    model: ModelInfo
    limits: Limits  # of its requests
    doors: Doors
    access: Access
    metrics: Metrics
    worker: Worker
    jobs: Jobs
    new_jobs: NewJobs
    statuses: JobStatuses
    decoder: Decoder
    encoder: Encoder
    cache: ResultCache
    streams: Streams
    elsewhere: Elsewhere  # other servers with the same jobs
    recordings: RecordingRoom
    webhooks: Allowed | None  # who may be told of jobs beside public receivers; None: nobody
    loaded_s: int  # when the model was loaded, Unix time
    noise_turn: asyncio.Lock  # the worker gets one image of POST /noise at a time
