"""The parts of the server that requests are answered with, as one value."""

import asyncio
from dataclasses import dataclass

from service.api.caching import ResultCache
from service.api.origin import Doors
from service.api.stream_limits import Streams
from service.images.decoder import Decoder
from service.images.encoder import Encoder
from service.jobs.jobs import Jobs
from service.jobs.standings import Standings
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.worker.recording import RecordingRoom
from service.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Services:
    """Built once, by create_app; every handler takes it."""

    model: ModelInfo
    limits: Limits
    doors: Doors
    metrics: Metrics
    worker: Worker
    jobs: Jobs
    standings: Standings
    decoder: Decoder
    encoder: Encoder
    cache: ResultCache
    streams: Streams
    recordings: RecordingRoom
    noise_turn: asyncio.Lock  # the worker gets one image of POST /noise at a time
