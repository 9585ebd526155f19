"""What is known about a loaded model, and the limits of requests. Frozen dataclasses; no torch, no asyncio."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tminus.model.catalogue import Recommended, Rung
from tminus.model.pixels import shown_channels
from tminus.model.sampler_tables import Table
from tminus.model.timesteps import log_sigma_at

MAX_JOBS = 1024  # most jobs that a server accepts at once; usually max_backlog_s is reached first
USUAL_MAX_N = 64  # default limit of images in one request


@dataclass(frozen=True, slots=True)
class LatentInfo:
    """The latents of a latent model, and the autoencoder that decodes them to pixels."""

    autoencoder: str  # class name
    channels: int
    height: int
    width: int
    scaling_factor: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the API needs to know about a loaded model."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    alpha: bool  # whether the fourth channel is alpha
    latent: "LatentInfo | None"  # None if the network works on pixels
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: Mapping[str, str]  # the default spacing, keyed by sampler
    steps_offset: int
    log_sigmas: tuple[float, ...]  # indexed by timestep
    fractional: bool  # whether the network accepts fractional timesteps
    continuous: bool  # whether noise levels are a formula of t; if so, all samplers use fractional timesteps
    clip: bool
    samplers: tuple[str, ...]
    tables: tuple[Table, ...]  # tuned tables, for the samplers that use them
    refused_tables: tuple[str, ...]  # table files that are not used, each with the reason
    student: Mapping[str, Any] | None  # for a distilled network: its teacher, and the guidance trained into its weights
    folded_guidance: float  # guidance scale trained into the weights; 1 if there is none
    default_sampler: str
    recommended: Recommended  # defaults for requests that set neither sampler nor steps
    ladder: tuple[Rung, ...]  # the settings that `quality=adaptive` chooses from, from the best to the fastest
    conditional: bool
    class_names: tuple[str, ...]
    null_class: int | None
    weights_hash: str
    fingerprint: str
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool  # whether the same spec always gives the same bytes, whatever other jobs run

    @property
    def shown_channels(self) -> int:
        """Return the number of leading channels that a picture shows."""
        return shown_channels(self.channels, alpha=self.alpha)

    @property
    def fits_pictures(self) -> bool:
        """Return True if a picture shows all channels. An upload can then be a whole image."""
        return self.shown_channels == self.channels

    def makes_images_of(self, other: "ModelInfo") -> bool:
        """Return True if the images have the shape and the classes of another model's."""
        ours, theirs = (
            (each.height_px, each.width_px, each.channels, each.alpha, each.class_names) for each in (self, other)
        )
        return ours == theirs

    def has_table(self, table_hash: str) -> bool:
        """Return True if the checkpoint has a table with this hash."""
        return any(table.hash == table_hash for table in self.tables)

    def table(self, table_hash: str) -> Table:
        """Return the table with this hash. Raises ValueError if it is gone, for example after another `tminus tune`."""
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
    """The limits of a server and of single requests."""

    max_n: int
    max_batch: int  # largest forward pass, in places: a row takes one, a guided row two
    max_rows: int
    max_backlog_s: float
    max_body_bytes: int
    max_jobs: int = MAX_JOBS
    max_image_bytes: int = 8 * 2**20
    result_cache_bytes: int = 0
    keep_jobs_s: float = 86_400.0  # seconds that a durable job is kept after its end
    keep_jobs_bytes: int = 2**30  # maximum size of the ended jobs of one model's weights
    max_streams: int = 2048
    max_streams_per_address: int = 64

    @property
    def max_edit_bytes(self) -> int:
        return max_edit_bytes(self.max_body_bytes, self.max_image_bytes)


def max_edit_bytes(max_body_bytes: int, max_image_bytes: int) -> int:
    """Return the size limit of a body with an image and a mask in base64.

    Base64 takes four characters for three bytes.
    """
    return max_body_bytes + 2 * 4 * (max_image_bytes // 3 + 1)
