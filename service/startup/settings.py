"""The settings of `tminus serve`, each by flag or by TMINUS_ variable, and the values that the parts are built with.

Built once, in the entry point. The parts get values, never Settings. docs/settings.md explains each setting.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tminus.model.hub import HubId, path_or_id
from tminus.service.access.access import Access
from tminus.service.access.keys import KeyRing
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.engine.protocol import BUNDLED, LoadOptions
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.model_info import USUAL_MAX_N, Limits
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import Sharing, TickTimes

if TYPE_CHECKING:
    from tminus.service.engine.loading import Loaded, Unmeasured

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a model: it stands in addresses, and names a folder
UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]+")
# Secrets, which other users of the machine might see in a flag, and what is set in trials only.
NO_FLAG = frozenset({"keys", "webhook_secret", "policy", "short_batch", "max_jobs", "metrics_host"})
TIME, UNITS_S = re.compile(r"(\d+(?:\.\d+)?)([smh]?)", re.ASCII), {"": 1, "s": 1, "m": 60, "h": 3600}
HOST = re.compile(r"[A-Za-z0-9_.-]+")
NAMESPACE = re.compile(r"[a-z_][a-z0-9_]{0,47}")
ORIGIN = re.compile(r"https?://[!-+.0-~-]+", re.IGNORECASE | re.ASCII)  # no comma, no slash, no space


def asked_by(setting: str) -> str:
    """The flag and the variable by which a setting is given, as messages name them."""
    variable = f"TMINUS_{setting.upper()}"
    return variable if setting in NO_FLAG else f"--{setting.replace('_', '-')} ({variable})"


def seconds_of(time: str) -> float:
    """Read a time: a number with a unit, without one of seconds; NaN for what is none."""
    found = TIME.fullmatch(time.strip())
    return float(found[1]) * UNITS_S[found[2]] if found is not None else math.nan


def name_of(text: str) -> str:
    """Make a name that may stand in addresses of what a checkpoint calls itself."""
    return UNNAMEABLE.sub("-", text).strip("-._")[:64] or "model"


@dataclass(frozen=True, slots=True)
class Library:
    """Where the models are that may be loaded, by name. No request names a path."""

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None  # each of its folders is a model of that name

    def folders(self) -> dict[str, Path]:
        """The folder of each model, as they are now."""
        found = dict(self.named)
        try:
            paths = sorted(self.folder.iterdir()) if self.folder is not None else []
        except OSError as error:
            log.warning("the folder of models cannot be read: %s", error)
            return found
        for path in paths:
            try:
                if path.is_dir() and NAME.fullmatch(path.name):
                    found.setdefault(path.name, path)
            except OSError as error:  # a link into a folder that may not be entered
                log.warning("%s in the folder of models cannot be read: %s", path.name, error)
        return found


# A group of settings, for --help and the docs, begins with the setting that its heading is keyed by.
GROUPS = {
    "checkpoint": "Models and device",
    "max_batch": "Batching and scheduling",
    "max_n": "What is accepted",
    "host": "Connections",
    "keys_file": "Access",
    "state_dir": "Durable jobs",
    "webhook_secret": "Webhooks",
    "open_browser": "Running the server",
    "ray_address": "Replicas on Ray",
}


class Settings(BaseSettings):
    """One field is one variable (TMINUS_MAX_BATCH) and, unless it is in NO_FLAG, one flag (--max-batch), which wins."""

    model_config = SettingsConfigDict(env_prefix="TMINUS_", frozen=True, extra="ignore")

    checkpoint: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="checkpoint to serve, a folder or an id of the Hugging Face hub, owner/name[@revision], by its own "
        "name or as NAME=FOLDER; may be given several times, in the variable by commas; the first is the default "
        "model; default: the one that comes with tminus",
    )
    models: Path | None = Field(None, description="folder whose folders are models, all of which are served")
    models_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GiB that all models may take together, by their configurations; of --models, those beyond it are "
        "not loaded at the start; default: what is free",
    )
    idle_unload: str | None = Field(
        None,
        description="time without a request or a job after which a model is unloaded, as 15m (s, m, h); models "
        "are then loaded when they are asked for, and those used last are kept within --models-memory-gb",
    )
    keys_file: Path | None = Field(
        None, description="file of API keys, as `tminus key` writes them; what is changed in it holds within a second"
    )
    keys: SecretStr | None = Field(None, description="the same lines as a text; they hold until the server ends")
    open: bool = Field(
        False, description="whoever has no key may sample; needed to listen to other machines without any keys"
    )
    device: str = Field(
        "auto", description="auto, cpu or cuda; auto takes a GPU if there is one; choose which by CUDA_VISIBLE_DEVICES"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    open_browser: bool = Field(
        False, description="open the page in a browser when the server is ready, where there is a display"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; default: one a core")
    executor: str = Field(
        "auto",
        pattern="^(auto|eager|compile|openvino)$",
        description="auto (the fastest by measurement), eager, compile or openvino",
    )
    precision: str = Field(
        "auto",
        pattern="^(auto|float32|tf32|bfloat16)$",
        description="auto (bfloat16 only where the checkpoint says it was checked), float32, tf32 (CUDA) or bfloat16",
    )
    approve_when_idle: bool = Field(
        False,
        description="find out while no job runs whether bfloat16 harms the images, as `tminus approve` does; if not, "
        "it is used from the next start on",
    )
    exact: bool | None = Field(
        None, description="the same bytes whatever else runs; default: yes on a CPU, no on a GPU, where it costs speed"
    )
    policy: Literal["srpt", "fcfs"] = Field("srpt", description="srpt (shortest remaining work first) or fcfs")
    cache_dir: Path | None = Field(None, description="where measurements are kept; default: ~/.cache/tminus")
    max_n: int = Field(USUAL_MAX_N, ge=1, le=1024, description="images in one request")
    max_batch: int | None = Field(
        None,
        ge=4,
        le=4096,
        description="places in one forward pass; a guided row takes two; default: the fewest with 95 % of the best "
        "throughput, as measured",
    )
    short_batch: int | None = Field(
        None,
        ge=4,
        le=4096,
        description="places that much longer jobs may fill in a pass that they share with a short one; default: the "
        "fewest with 85 % of the best throughput, as measured",
    )
    max_jobs: int = Field(1024, ge=1, le=10_000, description="jobs held at once, waiting and running")
    max_connections: int = Field(
        4096,
        ge=8,
        le=65_536,
        description="connections open at once, at most half of them WebSockets and event streams; further ones are "
        "answered 503 in plain text",
    )
    max_connections_per_address: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="connections open at once from one address, without WebSockets; all clients of a proxy count as "
        "one address; further ones are answered 503 in plain text",
    )
    max_streams_per_address: int = Field(
        64,
        ge=1,
        le=65_536,
        description="WebSockets and event streams open at once from one address; all clients of a proxy count as one "
        "address unless it sends X-Forwarded-For",
    )
    allowed_hosts: str = Field(
        "",
        description="names, joined by commas, by which the server may be addressed, beside localhost and IP addresses; "
        "* is any",
    )
    allowed_origins: str = Field(
        "", description="origins, joined by commas, whose pages may use the server beside its own; * is any"
    )
    max_rows: int | None = Field(
        None, ge=4, le=1_000_000, description="images held at once; default: what 512 MiB of latents hold, up to 4096"
    )
    max_backlog_s: float = Field(600, gt=0, allow_inf_nan=False, description="seconds of predicted work that may wait")
    background_max_wait_s: float = Field(
        3600,
        ge=0,
        le=604_800,
        description="seconds for which a background job lets all others go first; then it goes on as one of them",
    )
    result_cache_mb: int = Field(
        64,
        ge=0,
        le=65_536,
        description="MiB of memory for finished answers with a given seed, to answer repeats; 0: none",
    )
    state_dir: str = Field(
        "", description="folder of the durable jobs; :memory: loses them at a restart; default: ~/.local/state/tminus"
    )
    job_store: SecretStr | None = Field(
        None,
        description="postgresql://user:password@host/database for durable jobs that several servers share; "
        "default: a file in --state-dir, for this server alone",
    )
    job_namespace: str = Field(
        "tminus", description="schema of that database: servers of one namespace share their jobs"
    )
    job_lease_s: float = Field(
        15.0, ge=1, le=600, description="seconds after which another server takes over the jobs of one that is gone"
    )
    job_address: str | None = Field(
        None,
        description="URL by which the other servers reach this one, to pass on its events and frames; default: by the "
        "address that this machine has towards the database",
    )
    job_results: str | None = Field(
        None,
        description="s3://bucket/prefix for the results of durable jobs that are large, which needs the extra s3; AWS_ "
        "variables say the endpoint and the credentials; default: all results are kept where the jobs are",
    )
    job_results_above_kb: int = Field(
        256, ge=0, le=1_048_576, description="KiB of pixels up to which a result is small, and stays where the jobs are"
    )
    keep_jobs_s: float = Field(
        86_400, gt=0, allow_inf_nan=False, description="seconds that a durable job is kept after it ended"
    )
    keep_jobs_mb: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="MiB that ended jobs may take, with their objects; beyond it the oldest are deleted",
    )
    webhook_secret: SecretStr | None = Field(
        None,
        description="secret that signs webhooks, whsec_ and base64 of 24 to 64 bytes; without any no webhooks are sent",
    )
    webhook_secret_file: Path | None = Field(
        None, description="file of such secrets, one a line, which all sign: the newest, and those that it replaces"
    )
    webhook_allow: str = Field(
        "",
        description="names, addresses and networks, joined by commas, of receivers of webhooks that need not be "
        "public, and may speak plain HTTP",
    )
    webhook_retry_s: float = Field(
        86_400, ge=0, le=604_800, description="seconds for which it is tried again to deliver a webhook"
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="bytes in a request's body")
    max_image_bytes: int = Field(8 << 20, ge=1024, le=1 << 28, description="bytes in an uploaded image")
    metrics: bool = Field(True, description="answer /metrics")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="answer /metrics on this port instead, and there without a key; /healthz too"
    )
    metrics_host: str | None = Field(
        None, description="address to listen on for --metrics-port; default: that of --host"
    )
    docs: bool = Field(True, description="answer /docs and /openapi.json")
    grace_s: float = Field(
        30, ge=0, allow_inf_nan=False, description="seconds that running work gets to finish after SIGTERM"
    )
    log_format: Literal["text", "json"] = Field("text", description="text, or json: one object a line")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error")

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _by_commas(cls, value: object) -> object:
        return tuple(each for each in value.split(",") if each) if isinstance(value, str) else value

    @field_validator("idle_unload")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value) > 0:
            raise ValueError("must be a time above 0, as 90s, 15m or 1h")
        return value

    @field_validator("job_namespace")
    @classmethod
    def _is_schema(cls, value: str) -> str:
        if not NAMESPACE.fullmatch(value):
            raise ValueError("must be up to 48 of a-z, 0-9 and _, and begin with no digit")
        return value

    @field_validator("job_address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not ORIGIN.fullmatch(value):
            raise ValueError("must be a URL without a path, such as http://10.0.0.5:8000")
        return value

    @field_validator("webhook_allow")
    @classmethod
    def _are_receivers(cls, value: str) -> str:
        AllowedReceivers.parse(value)
        return value

    @field_validator("allowed_hosts", "allowed_origins")
    @classmethod
    def _are_hosts_or_origins(cls, value: str, info: ValidationInfo) -> str:
        form, what = HOST, "names such as diffusion.example"
        if info.field_name == "allowed_origins":
            form, what = ORIGIN, "origins such as https://studio.example"
        if value != "*" and not all(form.fullmatch(each.strip()) for each in value.split(",") if each.strip()):
            raise ValueError(f"must be {what}, by commas, or *")
        return value

    def checkpoints(self) -> list[tuple[str | None, Path | HubId]]:
        """The checkpoints that are served, in order, with the names that were given to them.

        Raises ValueError for a folder of models without any, and for two models of one name.
        """
        found: list[tuple[str | None, Path | HubId]] = []
        for each in self.checkpoint:
            name, equals, folder = each.partition("=")
            is_named = equals and NAME.fullmatch(name) and not Path(each).exists()
            found.append((name, path_or_id(folder)) if is_named else (None, path_or_id(each)))
        if self.models is not None:
            if not (inside := Library(folder=self.models).folders()):
                raise ValueError(
                    f"--models (TMINUS_MODELS): {self.models} has no folders whose names can be those of models"
                )
            found += inside.items()
        for name, number in Counter(name for name, _ in found if name is not None).items():
            if number > 1:
                raise ValueError(f"two models are named {name}; give one another name: --checkpoint NAME=FOLDER")
        return found or [(None, BUNDLED)]

    def load_options(self, checkpoint: Path) -> LoadOptions:
        """Options for loading a model."""
        return LoadOptions(
            checkpoint=checkpoint,
            device=self.device,
            executor=self.executor,
            precision=self.precision,
            exact=self.exact,
            threads=self.threads,
            max_batch=self.max_batch,
            short_batch=self.short_batch,
            max_rows=self.max_rows,
            max_jobs=self.max_jobs,
            cache_dir=self.cache_dir,
            approve_when_idle=self.approve_when_idle,
        )

    @property
    def idle_unload_s(self) -> float | None:
        """The seconds after which an idle model is unloaded; None where none is."""
        return None if self.idle_unload is None else seconds_of(self.idle_unload)

    def limits(self, max_rows: int, max_batch: int) -> Limits:
        """The bounds of requests; those that were left to the machine are what loading found."""
        return Limits(
            max_n=min(self.max_n, max_rows),
            max_batch=max_batch,
            max_rows=max_rows,
            max_jobs=self.max_jobs,
            max_backlog_s=self.max_backlog_s,
            max_body_bytes=self.max_body_bytes,
            max_image_bytes=self.max_image_bytes,
            result_cache_bytes=self.result_cache_mb * 2**20,
            max_streams=self.max_connections // 2,
            max_streams_per_address=self.max_streams_per_address,
            keep_jobs_s=self.keep_jobs_s,
            keep_jobs_bytes=self.keep_jobs_mb * 2**20,
            webhook_retry_s=self.webhook_retry_s,
            background_max_wait_s=self.background_max_wait_s,
        )

    def speed(self, loaded: "Loaded | Unmeasured", max_rows: int) -> Speed:
        """How fast a model is, and how the scheduler gives out the places of its ticks."""
        sharing = Sharing.of(loaded.max_batch, self.policy, loaded.short_batch, TickTimes(loaded.tick_times))
        return Speed(sharing, max_rows, *loaded.coding_s)

    def access(self, address: str) -> Access:
        """Who may ask a server that listens on this address.

        Raises ValueError for keys with a mistake, and for other machines' requests without keys.
        """
        if self.keys_file is None and self.keys is None and not self.open and not ip_address(address).is_loopback:
            raise ValueError(
                f"--host (TMINUS_HOST): {self.host} can be reached from other machines, and there are no keys: give "
                "some by --keys-file (see `tminus key --help`), or let anybody in by --open"
            )
        if self.keys_file is not None and self.keys is not None:
            raise ValueError(f"{asked_by('keys')} and {asked_by('keys_file')} exclude each other")
        try:
            ring = KeyRing(None if self.keys is None else self.keys.get_secret_value(), self.keys_file)
        except ValueError as error:
            raise ValueError(f"{asked_by('keys' if self.keys is not None else 'keys_file')}: {error}") from None
        return Access(ring, is_open=self.open or not ring.keys)

    def allowed_sites(self) -> AllowedSites:
        """Who may ask: allowed_hosts with the names to listen on, and allowed_origins, in lower case as browsers do."""
        hosts, origins = (
            frozenset(each.strip().lower() for each in given.split(",") if each.strip())
            for given in (f"{self.allowed_hosts},{self.host},{self.metrics_host or ''}", self.allowed_origins)
        )
        return AllowedSites(hosts, origins)
