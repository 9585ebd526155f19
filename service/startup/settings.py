"""The settings of `tminus serve`.

The entry point creates the settings once. Lower layers receive single values, never a Settings object.

A setting's description is Markdown for the docs, with links relative to docs/. `--help` prints its first sentence. If
the default is not a plain value, the last sentence describes it, as in "Default: one for each core."
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from tminus.model.hub import HubId, path_or_id
from tminus.service.access.access import Access
from tminus.service.access.keys import KeyRing
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.engine.protocol import BUNDLED, LoadOptions
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.model_info import MAX_JOBS, USUAL_MAX_N, Limits

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a model's name, used in URLs and as a folder's name
UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]+")
# Secrets have no flag, because other users of the machine can see flags.
NO_FLAG = frozenset({"keys", "webhook_secret"})
TIME, UNITS_S = re.compile(r"(\d+(?:\.\d+)?)([smh]?)", re.ASCII), {"": 1, "s": 1, "m": 60, "h": 3600}
HOST = re.compile(r"[A-Za-z0-9_.-]+")
NAMESPACE = re.compile(r"[a-z_][a-z0-9_]{0,47}")
LEAST_BODY_BYTES = 2**20
ORIGIN = re.compile(r"https?://[!-+.0-~-]+", re.IGNORECASE | re.ASCII)  # the host has no comma, slash or space


def flag_of(setting: str) -> str:
    """Return the command-line flag of a setting."""
    return f"--{setting.replace('_', '-')}"


def variable_of(setting: str) -> str:
    """Return the environment variable of a setting."""
    return f"TMINUS_{setting.upper()}"


def named(setting: str) -> str:
    """Return the flag and the environment variable of a setting, as shown in messages."""
    return variable_of(setting) if setting in NO_FLAG else f"{flag_of(setting)} ({variable_of(setting)})"


def seconds_of(time: str) -> float:
    """Parse a time in seconds, or with a unit (s, m or h). Return NaN for any other text."""
    found = TIME.fullmatch(time.strip())
    return float(found[1]) * UNITS_S[found[2]] if found is not None else math.nan


def name_of(text: str) -> str:
    """Turn the name in a checkpoint into a name that can be used in URLs."""
    return UNNAMEABLE.sub("-", text).strip("-._")[:64] or "model"


@dataclass(frozen=True, slots=True)
class Library:
    """The folders of the models that can be loaded. A request names a model, never a path."""

    named: Mapping[str, Path] = field(default_factory=dict)
    folder: Path | None = None  # each subfolder is a model with the subfolder's name

    def folders(self) -> dict[str, Path]:
        """Return the folder of each model, keyed by name. Reads the disk each time."""
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
            except OSError as error:  # for example, a link into a folder without read permission
                log.warning("%s in the folder of models cannot be read: %s", path.name, error)
        return found


# Headings in --help and the docs, keyed by the first setting of each group.
GROUPS = {
    "checkpoint": "Models and device",
    "max_batch": "Batching and scheduling",
    "max_n": "What is accepted",
    "host": "Connections",
    "keys_file": "Access",
    "state_dir": "Durable jobs",
    "webhook_secret": "Webhooks",
    "grace_s": "Running the server",
    "ray_address": "Replicas on Ray",
}


class Settings(BaseSettings):
    """The settings of `tminus serve`.

    Each field has an environment variable, such as TMINUS_MAX_BATCH. Each field that is not in NO_FLAG also has a flag,
    such as --max-batch, which overrides the variable.
    """

    model_config = SettingsConfigDict(env_prefix="TMINUS_", frozen=True, extra="ignore")

    checkpoint: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Checkpoint to serve: a folder, or an id of the Hugging Face hub, `owner/name[@revision]`. The "
        "folder has diffusers' layout, see [checkpoints](checkpoints.md). To serve [several models](models.md), repeat "
        "the flag, or separate the paths in the variable by commas. The first is the default model. `NAME=PATH` gives "
        "the model a name; otherwise it has the name that the checkpoint gives itself. Default: the bundled "
        "fashion-mnist-32.",
    )
    models: Path | None = Field(
        None,
        description="Folder of models: each folder in it is served as a model, under its own name. They are served "
        "beside those of `--checkpoint`.",
    )
    models_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Memory in GiB that all loaded models may take together. The server computes the need of a model "
        "from [its configuration](models.md). Models of `--models` that do not fit are not loaded at the start. "
        "Default: the free memory.",
    )
    idle_unload: str | None = Field(
        None,
        description="Time after which an unused model leaves memory, such as `90s`, `15m` or `1h`. A model is unused "
        "while it has no request and no job. With this setting, models are [loaded on demand](models.md), and the "
        "most recently used ones stay within `--models-memory-gb`. Default: models stay in memory.",
    )
    device: str = Field(
        "auto",
        description="Where the network runs: `auto`, `cpu` or `cuda`. `auto` takes a GPU if there is one. A server "
        "uses one GPU, the first that is visible; choose another with `CUDA_VISIBLE_DEVICES`.",
    )
    executor: Literal["auto", "eager", "compile", "openvino"] = Field(
        "auto",
        description="What runs the network: PyTorch (`eager`), torch.compile (`compile`), or OpenVINO (`openvino`). "
        "`auto` measures the executors that work on this machine, and takes the fastest. Name one to compare "
        "executors, or to skip the measurement of the others.",
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="Number format of the forward pass. `auto` takes bfloat16 only if the checkpoint was "
        "[checked](checkpoints.md) with it, by `tminus approve` for example. `tf32` needs CUDA.",
    )
    approve_when_idle: bool = Field(
        False,
        description="While the server is idle, check whether bfloat16 harms the images, as "
        "[`tminus approve`](reference/command-line.md#tminus-approve) does. If it does not, the server uses bfloat16 "
        "from its next start or reload on; the bytes of images and the fingerprint change then. During the check, a "
        "new job waits for one pass at most, and the weights are in memory a second time, in bfloat16.",
    )
    exact: bool | None = Field(
        None,
        description="Make the same request give the same bytes, whatever else runs at the same time. It costs speed "
        "on a GPU. Turn it on there if others must be able to reproduce results, or if durable jobs must end in the "
        "same bytes after a crash; see [determinism](determinism.md). Default: yes on a CPU, no on a GPU.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the network. Set it in a container with a CPU quota, since otherwise the cores of "
        "the host count, or if other programs need the cores. Default: one for each core; in PyTorch, one for "
        "each that other programs leave free when the network is first measured.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder where measurements and converted networks are kept for the next start. It also keeps "
        "approvals of bfloat16 for checkpoints in folders that are read-only. Put it on a volume if containers come "
        "and go. Delete it to measure again. A start that finds no measurement of its own takes one from the folder "
        "`given` inside it, which may be read-only, such as a ConfigMap. Default: ~/.cache/tminus, or tminus in "
        "XDG_CACHE_HOME.",
    )
    max_batch: int | None = Field(
        None,
        ge=4,
        le=4096,
        description="Maximum number of places in one forward pass. A row takes one place, a row with guidance two. "
        "More places raise the throughput of a large GPU, but each tick takes longer, and a new request waits for the "
        "tick that is running. Default: the fewest places that reach 95 % of the best measured throughput; on a CPU "
        "where two ticks may run at a time 85 %, and twice as many under full load.",
    )
    max_n: int = Field(
        USUAL_MAX_N,
        ge=1,
        le=1024,
        description="Maximum number of images in one request. It is never above `--max-rows`.",
    )
    max_rows: int | None = Field(
        None,
        ge=4,
        le=1_000_000,
        description="Maximum number of images of accepted jobs, waiting and running together. Raise it for many small "
        "images; lower it if memory is short. A grey image of 32 x 32 takes 8 KiB or more, a colour image of 256 x 256 "
        "takes 1.5 MiB or more; see [memory](operations.md#memory). Default: as many as fit into 512 MiB, at most "
        "4096.",
    )
    max_backlog_s: float = Field(
        600,
        gt=0,
        allow_inf_nan=False,
        description="Maximum seconds of predicted work that may wait. Further requests are refused with 429 and the "
        "time after which to try again. Lower it to refuse earlier. One key may hold three quarters of what the other "
        "keys leave free, of this, of `--max-rows`, and of the 1024 jobs that a server accepts; see "
        "[security](security.md).",
    )
    max_image_bytes: int = Field(
        8 << 20,
        ge=1024,
        le=1 << 28,
        description="Maximum size of an uploaded image in bytes. Raise it to edit large pictures. The rest of a body "
        "may have 1 MiB, or an eighth of this if it is more.",
    )
    result_cache_mb: int = Field(
        64,
        ge=0,
        le=65_536,
        description="Memory in MiB for finished answers, to answer repeats. A repeated request with the same seed is "
        "then answered without work. 0 keeps no answers.",
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. `0.0.0.0` accepts requests from other machines; it needs [keys or "
        "`--open`](security.md), and a proxy with [TLS](production.md#proxy) in front of it.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0 takes a free one.")
    max_connections: int = Field(
        4096,
        ge=8,
        le=65_536,
        description="Maximum number of open connections. At most half of them may be WebSockets and event streams. "
        "When all are open, a new one replaces the one that has been idle for longest; if none is idle, it is answered "
        "with 503 in plain text. If the hard limit of open files (`ulimit -Hn`) is "
        "below this number plus 384, the server allows fewer, and its log says how many.",
    )
    max_connections_per_address: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="Maximum number of open connections from one address, without WebSockets. An IPv6 address counts "
        "with its /64 network. Further connections replace idle ones or are answered with 503, as with "
        "`--max-connections`. All clients of a proxy count as one address: raise it if your proxy keeps more "
        "connections open.",
    )
    max_streams_per_address: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Maximum number of open WebSockets and event streams from one address. An IPv6 address counts with "
        "its /64 network. All clients of a proxy that does not send `X-Forwarded-For` count as one address: raise it "
        "there.",
    )
    allowed_hosts: str = Field(
        "",
        description="Names by which clients may address the server, separated by commas, such as `diffusion.example`. "
        "localhost, IP addresses and the name in `--host` are always allowed. A request with another `Host` header is "
        "answered with 403, so that no web page can reach the server by DNS rebinding. Set it if clients use a name, "
        "or if a proxy passes the name on. `*` allows every name. `/healthz`, `/readyz`, `/health`, `/metrics`, "
        "`/v2/health/live` and `/v2/health/ready` answer under every name; `/metrics` at `--metrics-port` does not.",
    )
    allowed_origins: str = Field(
        "",
        description="Origins whose web pages may use the server and read its answers (CORS), separated by commas, "
        "such as `https://studio.example,http://localhost:3000`. The server's own origin is always allowed. Set it if "
        "a page comes from another address than the server. Write names in ASCII, as browsers send them "
        "(`https://xn--bcher-kva.example`). `*` allows every origin.",
    )
    keys_file: Path | None = Field(
        None,
        description="File of API keys, one a line, as [`tminus key`](reference/command-line.md#tminus-key) writes "
        "them. A change of the file takes effect within a second. Each server counts [quotas](security.md#quotas) for "
        "itself. See [security](security.md).",
    )
    keys: SecretStr | None = Field(
        None,
        description="API keys as text, in the format of the file, for places where you cannot mount a file. They hold "
        "until the server ends. Each server counts [quotas](security.md#quotas) for itself. Do not use it together "
        "with `--keys-file`. It has no flag, since other users of the machine could see a flag.",
    )
    open: bool = Field(
        False,
        description="Let clients without a key sample. A server that has no keys is open to its own machine anyway; to "
        "listen on any other address it needs this flag or keys.",
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Answer `/metrics` on this port of `--host` instead, without a key. Use it for a Prometheus that "
        "has no key. Clients must ask by an IP address or a name in `--allowed-hosts`. The port also answers "
        "`/healthz`, even while all connections of the main port are taken.",
    )
    state_dir: str = Field(
        "",
        description="Folder of the durable jobs, with one file for each checkpoint. `:memory:` keeps them until the "
        "process ends, for a read-only file system. With `--job-store` it only holds the record of [jobs that end a "
        "server](jobs.md). Default: ~/.local/state/tminus, or tminus in XDG_STATE_HOME.",
    )
    job_store: SecretStr | None = Field(
        None,
        description="PostgreSQL database for durable jobs that several servers share: "
        "`postgresql://user:password@host/database`. It needs the extra `postgres`; see "
        "[production](production.md). Parameters in the URL, such as `?application_name=…`, win over "
        "the server's own. The URL has a password, so give it by the variable. Default: a file in `--state-dir`, for "
        "this server alone.",
    )
    job_namespace: str = Field(
        "tminus",
        description="Schema in the database of `--job-store`. The server creates it if it is not there. Servers share "
        "jobs only with servers of the same namespace. Objects of `--job-results` have it in their keys. It has up to "
        "48 of a-z, 0-9 and `_`, and does not begin with a digit.",
    )
    job_lease_s: float = Field(
        15.0,
        ge=1,
        le=600,
        description="Seconds after which other servers take over the jobs of a server that is gone. A shorter lease "
        "takes over sooner, but tolerates shorter failures of the database.",
    )
    job_address: str | None = Field(
        None,
        description="URL by which the other servers reach this one, such as `http://10.0.0.5:8000`. They ask it for "
        "events, frames and remaining times of its jobs. Set it if they cannot use the default. Default: the address "
        "that this machine has towards the database.",
    )
    job_results: str | None = Field(
        None,
        description="Object store for results of durable jobs with more than 256 KiB of pixels: `s3://bucket/prefix`. "
        "64 grey images of 32 x 32 have 64 KiB, one colour image of 256 x 256 has 192 KiB. It needs the extra `s3`; "
        "see [results in an object store](operations.md#results-in-an-object-store). The endpoint is "
        "`AWS_ENDPOINT_URL`, or Amazon's for `AWS_REGION`. Credentials are `AWS_ACCESS_KEY_ID` and "
        "`AWS_SECRET_ACCESS_KEY`, else a web identity (EKS), or the role of the container (ECS) or machine (EC2). "
        "Profiles in `~/.aws` are not read. [obstore](https://developmentseed.org/obstore/latest/api/store/aws/) has "
        "more variables, such as for encryption. After SIGTERM the server waits for an upload in progress, up to a "
        "minute and a second for each megabyte; allow your supervisor that time. A job whose object is missing or "
        "damaged answers 507; you can delete it. The right `s3:ListBucket` is not needed; with it the log can tell a "
        "missing object from a forbidden one. Default: all results are kept where the jobs are.",
    )
    keep_jobs_s: float = Field(
        86_400,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for which a durable job and its images are kept after it ended.",
    )
    keep_jobs_mb: int = Field(
        1024,
        ge=1,
        le=1_048_576,
        description="Maximum space in MiB for the ended jobs of one model's weights, on disk and in objects. When they "
        "take more, the oldest are deleted early.",
    )
    webhook_secret: SecretStr | None = Field(
        None,
        description="Secret that signs webhooks: `whsec_` and base64 of 24 to 64 bytes. Do not use it together with "
        "`--webhook-secret-file`. It has no flag, since other users of the machine could see a flag. See "
        "[webhooks](webhooks.md). Default: none, and no webhooks are sent.",
    )
    webhook_secret_file: Path | None = Field(
        None,
        description="File of secrets that sign webhooks, one a line, at most eight. All of them sign, so that you can "
        "replace one while receivers still know the other. The file is read at the start.",
    )
    webhook_allow: str = Field(
        "",
        description="Receivers of webhooks in your own network: names, addresses and networks, separated by commas, "
        "such as `hooks.internal,10.1.0.0/16`. Other receivers must have public addresses. A URL may use "
        "plain HTTP if its host is listed by name, or is an address in a listed network.",
    )
    grace_s: float = Field(
        30,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that running work gets to finish after SIGTERM. Keep it below the time after which your "
        "supervisor kills the process.",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Format of the log. `json` writes one object a line, for a log collector, with `time`, `level`, "
        "`logger` and `message`. Where they apply it adds `request_id`, `client`, `key` (the name), `method`, "
        "`target`, `status`, `seconds`, `code`, `job_id`, `trace_id`, `span_id` and `traceback`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe lines that are logged. The log goes to stderr."
    )

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _by_commas(cls, value: object) -> object:
        return tuple(each for each in value.split(",") if each) if isinstance(value, str) else value

    @field_validator("idle_unload")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value) > 0:
            raise ValueError("must be a time above 0, such as 90s, 15m or 1h")
        return value

    @field_validator("job_namespace")
    @classmethod
    def _is_schema(cls, value: str) -> str:
        if not NAMESPACE.fullmatch(value):
            raise ValueError("must be up to 48 of a-z, 0-9 and _, and not begin with a digit")
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
            raise ValueError(f"must be {what}, separated by commas, or *")
        return value

    def checkpoints(self) -> list[tuple[str | None, Path | HubId]]:
        """Return the checkpoints to serve, in order.

        Each comes with the name that the settings give it, or None. Raises ValueError if a folder of models is empty,
        or two models have the same name.
        """
        found: list[tuple[str | None, Path | HubId]] = []
        for each in self.checkpoint:
            name, equals, folder = each.partition("=")
            is_named = equals and NAME.fullmatch(name) and not Path(each).exists()
            found.append((name, path_or_id(folder)) if is_named else (None, path_or_id(each)))
        if self.models is not None:
            if not (inside := Library(folder=self.models).folders()):
                raise ValueError(
                    f"--models (TMINUS_MODELS): {self.models} has no folder whose name can be the name of a model"
                )
            found += inside.items()
        for name, number in Counter(name for name, _ in found if name is not None).items():
            if number > 1:
                raise ValueError(f"two models are named {name}; give one another name: --checkpoint NAME=FOLDER")
        return found or [(None, BUNDLED)]

    def load_options(self, checkpoint: Path) -> LoadOptions:
        return LoadOptions(
            checkpoint=checkpoint,
            device=self.device,
            executor=self.executor,
            precision=self.precision,
            exact=self.exact,
            threads=self.threads,
            max_batch=self.max_batch,
            max_rows=self.max_rows,
            max_jobs=MAX_JOBS,
            cache_dir=self.cache_dir,
            approve_when_idle=self.approve_when_idle,
        )

    @property
    def max_body_bytes(self) -> int:
        """Maximum size in bytes of a request body, not counting its images."""
        return max(LEAST_BODY_BYTES, self.max_image_bytes // 8)

    @property
    def idle_unload_s(self) -> float | None:
        """Idle seconds after which a model is unloaded; None for never."""
        return None if self.idle_unload is None else seconds_of(self.idle_unload)

    def limits(self, max_rows: int, max_batch: int) -> Limits:
        """Return the limits of requests. max_rows, max_batch: the loaded model's values."""
        return Limits(
            max_n=min(self.max_n, max_rows),
            max_batch=max_batch,
            max_rows=max_rows,
            max_backlog_s=self.max_backlog_s,
            max_body_bytes=self.max_body_bytes,
            max_image_bytes=self.max_image_bytes,
            result_cache_bytes=self.result_cache_mb * 2**20,
            max_streams=self.max_connections // 2,
            max_streams_per_address=self.max_streams_per_address,
            keep_jobs_s=self.keep_jobs_s,
            keep_jobs_bytes=self.keep_jobs_mb * 2**20,
        )

    def access(self, address: str) -> Access:
        """Return the keys of a server that listens on this address.

        Without keys, or with --open, anyone has access. Raises ValueError for invalid keys. Also raises ValueError if
        other machines can reach the address, there are no keys, and --open is not set.
        """
        if self.keys_file is None and self.keys is None and not self.open and not ip_address(address).is_loopback:
            raise ValueError(
                f"--host (TMINUS_HOST): {self.host} can be reached from other machines, and there are no keys: give "
                "some by --keys-file (see `tminus key --help`), or let anybody in by --open"
            )
        if self.keys_file is not None and self.keys is not None:
            raise ValueError(f"{named('keys')} and {named('keys_file')} exclude each other")
        try:
            ring = KeyRing(None if self.keys is None else self.keys.get_secret_value(), self.keys_file)
        except ValueError as error:
            raise ValueError(f"{named('keys' if self.keys is not None else 'keys_file')}: {error}") from None
        return Access(ring, is_open=self.open or not ring.keys)

    def allowed_sites(self) -> AllowedSites:
        """Return the hosts and origins that requests may name. They are in lower case, as browsers send them."""
        hosts, origins = (
            frozenset(each.strip().lower() for each in names.split(",") if each.strip())
            for names in (f"{self.allowed_hosts},{self.host}", self.allowed_origins)
        )
        return AllowedSites(hosts, origins)
