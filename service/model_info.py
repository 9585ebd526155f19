"""Facts about a loaded model, and the limits of requests. Frozen values; imports neither torch nor asyncio."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tminus.model.catalogue import Recommended
from tminus.model.pixels import shown_channels
from tminus.model.sampler_tables import Table
from tminus.model.timesteps import log_sigma_at

MAX_JOBS = 1024  # accepted jobs of a server; max_backlog_s is usually reached first
USUAL_MAX_N = 64  # images in one request, unless a setting overrides it


@dataclass(frozen=True, slots=True)
class LatentInfo:
    """Describes the latents of a latent model and the autoencoder that decodes them to pixels."""

    autoencoder: str  # class name
    channels: int
    height: int
    width: int
    scaling_factor: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The facts about a loaded model that the API needs."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    alpha: bool  # whether the last of four channels is alpha
    latent: "LatentInfo | None"  # None: the network works on pixels
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: Mapping[str, str]  # the default spacing, keyed by sampler
    steps_offset: int
    log_sigmas: tuple[float, ...]  # indexed by timestep
    fractional: bool  # whether the network accepts fractional timesteps
    continuous: bool  # whether noise levels are a formula of t; all samplers then use fractional timesteps
    clip: bool
    samplers: tuple[str, ...]
    tables: tuple[Table, ...]  # for the samplers that use tables
    refused_tables: tuple[str, ...]  # unused table files, each with the reason
    student: Mapping[str, Any] | None  # of a distilled network: its teacher and the guidance trained into its weights
    folded_guidance: float  # guidance scale trained into the weights; 1: none
    default_sampler: str
    recommended: Recommended  # the default for requests with neither sampler nor steps
    conditional: bool
    class_names: tuple[str, ...]
    null_class: int | None
    weights_hash: str
    fingerprint: str
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool  # whether a spec gives the same bytes regardless of other jobs

    @property
    def shown_channels(self) -> int:
        """Return the number of leading channels that a picture shows."""
        return shown_channels(self.channels, alpha=self.alpha)

    @property
    def fits_pictures(self) -> bool:
        """Return True if a picture shows all channels, so that an upload can be a whole image."""
        return self.shown_channels == self.channels

    def has_table(self, table_hash: str) -> bool:
        """Return True if the checkpoint still has the table with this hash."""
        return any(table.hash == table_hash for table in self.tables)

    def table(self, table_hash: str) -> Table:
        """Return the table with this hash. Raises ValueError if there is none, as after another `tminus tune`."""
        for table in self.tables:
            if table.hash == table_hash:
                return table
        raise ValueError(f"table must be that of one in the checkpoint's samplers/, got {table_hash}")

    def alpha_bar(self, t: float) -> float:
        """Return alpha_bar_t = 1 / (1 + sigma_t^2)."""
        log_sigma = log_sigma_at(t, self.log_sigmas)
        return 1 / (1 + math.exp(2 * log_sigma)) if log_sigma < 300 else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the server and of each request."""

    max_n: int
    max_batch: int  # places in one forward pass
    max_rows: int
    max_backlog_s: float
    max_body_bytes: int
    max_jobs: int = MAX_JOBS
    max_image_bytes: int = 8 * 2**20
    result_cache_bytes: int = 0
    keep_jobs_s: float = 86_400.0  # seconds that an ended durable job is kept
    keep_jobs_bytes: int = 2**30  # the most bytes of all ended jobs together
    max_streams: int = 2048
    max_streams_per_address: int = 64

    @property
    def max_edit_bytes(self) -> int:
        return max_edit_bytes(self.max_body_bytes, self.max_image_bytes)


def max_edit_bytes(max_body_bytes: int, max_image_bytes: int) -> int:
    """Return the limit of a body with an image and a mask in base64, which takes four bytes for three."""
    return max_body_bytes + 2 * 4 * (max_image_bytes // 3 + 1)
