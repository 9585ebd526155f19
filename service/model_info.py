"""What is loaded, and the bounds that requests are held to. Pure frozen values; no torch, no asyncio."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tminus.model.catalogue import Recommended
from tminus.model.pixels import shown_channels
from tminus.model.sampler_tables import Table
from tminus.model.timesteps import log_sigma_at

MAX_JOBS = 1024  # accepted jobs of a server; the backlog in seconds is nearly always full first
USUAL_MAX_N = 64  # images in one request, unless a setting says otherwise


@dataclass(frozen=True, slots=True)
class LatentInfo:
    """What the network of a latent model sees in place of pixels, and what makes pixels of it."""

    autoencoder: str  # its class
    channels: int
    height: int
    width: int
    scaling_factor: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded, as the API needs it."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    alpha: bool  # whether the last of four channels is alpha
    latent: "LatentInfo | None"  # of a latent model; None where the network sees pixels
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: Mapping[str, str]  # by sampler, what a request gets that names none
    steps_offset: int
    log_sigmas: tuple[float, ...]  # of the noise schedule, by timestep
    fractional: bool  # whether the network takes timesteps between whole ones
    continuous: bool  # whether noise levels are a formula of t: every sampler takes such timesteps then
    clip: bool
    samplers: tuple[str, ...]
    tables: tuple[Table, ...]  # of the samplers that have some
    refused_tables: tuple[str, ...]  # files that are not used, and why
    student: Mapping[str, Any] | None  # of a network made for few steps: its teacher, and the guidance folded in
    folded_guidance: float  # guidance that was trained into the weights; 1: none
    default_sampler: str
    recommended: Recommended  # what a request gets that names neither sampler nor steps
    conditional: bool
    class_names: tuple[str, ...]
    null_class: int | None
    weights_hash: str
    fingerprint: str
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool  # whether the same spec gives the same bytes whatever else runs

    @property
    def shown_channels(self) -> int:
        """How many of an image's first channels a picture of it shows."""
        return shown_channels(self.channels, alpha=self.alpha)

    @property
    def fits_pictures(self) -> bool:
        """Whether a picture shows all of an image, so that an upload can be one."""
        return self.shown_channels == self.channels

    def has_table(self, table_hash: str) -> bool:
        """Whether the checkpoint has the table with this hash, still."""
        return any(table.hash == table_hash for table in self.tables)

    def table(self, table_hash: str) -> Table:
        """The table with this hash. Raises ValueError if the model has none, as after another `tminus tune`."""
        for table in self.tables:
            if table.hash == table_hash:
                return table
        raise ValueError(f"table must be that of one in the checkpoint's samplers/, got {table_hash}")

    def alpha_bar(self, t: float) -> float:
        """alpha_bar_t = 1 / (1 + sigma_t^2)."""
        log_sigma = log_sigma_at(t, self.log_sigmas)
        return 1 / (1 + math.exp(2 * log_sigma)) if log_sigma < 300 else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds a request is held to."""

    max_n: int
    max_batch: int  # places in one forward pass
    max_rows: int
    max_backlog_s: float
    max_body_bytes: int
    max_jobs: int = MAX_JOBS
    max_image_bytes: int = 8 * 2**20
    result_cache_bytes: int = 0
    keep_jobs_s: float = 86_400.0  # how long a durable job is kept that has ended
    keep_jobs_bytes: int = 2**30  # the most bytes of all jobs that ended
    max_streams: int = 2048
    max_streams_per_address: int = 64

    @property
    def max_edit_bytes(self) -> int:
        """The bound of a body with an image and a mask."""
        return max_edit_bytes(self.max_body_bytes, self.max_image_bytes)


def max_edit_bytes(max_body_bytes: int, max_image_bytes: int) -> int:
    """Bound a body with an image and a mask in base64, which takes four bytes for three."""
    return max_body_bytes + 2 * 4 * (max_image_bytes // 3 + 1)
