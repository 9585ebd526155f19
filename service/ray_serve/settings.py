"""Settings of `tminus ray serve`: the settings of `tminus serve`, and those of Ray's replicas."""

import re
from collections.abc import Sequence

from pydantic import Field, ValidationInfo, field_validator

from tminus.service.startup.settings import Settings

MOST_PORT = 65_535


class RaySettings(Settings):
    """Settings of replicas on Ray. In a Serve config file, these settings are the arguments of the application."""

    ray_address: str | None = Field(
        None,
        description="Address of a running Ray cluster. Default: RAY_ADDRESS, or the cluster that runs on this machine, "
        "or a new one that ends with the command.",
    )
    min_replicas: int = Field(1, ge=1, le=1000, description="Minimum number of replicas, which always run.")
    max_replicas: int | None = Field(
        None,
        ge=1,
        le=1000,
        validate_default=True,
        description="Maximum number of replicas, which run when there is much work. More than one needs `--job-store`. "
        "Default: the number of `--min-replicas`.",
    )
    target_backlog_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds of predicted work for each replica. When there is more, another replica starts. The work "
        "that replicas hold counts, as a mean of half a minute, and so do jobs in the database that no replica holds.",
    )
    upscale_delay_s: float = Field(
        10.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which more replicas must be needed before one is added.",
    )
    downscale_delay_s: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which fewer replicas must be needed before one drains.",
    )
    replica_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPUs of each replica. With 0.5 two replicas share one. Default: 1 with `--device cuda`, which "
        "waits for a node with a GPU; 1 with `--device auto` if the cluster has GPUs; else 0.",
    )
    replica_cpus: float | None = Field(
        None,
        gt=0,
        le=1024,
        description="Cores of each replica, and its `--threads`. Default: 1 on a GPU, else as many as let "
        "`--max-replicas` fit on the cluster.",
    )

    replica_ports: str | None = Field(
        None,
        description="Ports where replicas listen for each other and for Prometheus, as FROM-TO, such as `9200-9215`. "
        "Each replica takes the first free one of its node. Give as many as replicas may run on one node, together "
        "with those that drain. Default: any free port.",
    )

    @field_validator("metrics_port", "job_address")
    @classmethod
    def _has_one_each(cls, value: object) -> object:
        if value is not None:
            raise ValueError(
                "cannot be set on Ray: each replica has its own, where it also answers /metrics; its log says which"
            )
        return value

    @field_validator("replica_ports")
    @classmethod
    def _are_ports(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", value, re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]) <= MOST_PORT:
            raise ValueError(f"must be FROM-TO, two ports of 1..{MOST_PORT}, the first at most the second")
        return value

    @field_validator("replica_gpus")
    @classmethod
    def _has_one_for_cuda(cls, value: float | None, info: ValidationInfo) -> float | None:
        device = info.data.get("device", "")
        if value == 0 and device.startswith("cuda"):
            raise ValueError(f"must be above 0 with --device {device}")
        return value

    @field_validator("max_replicas")
    @classmethod
    def _is_possible(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_replicas", 1)
        most = least if value is None else value
        if most < least:
            raise ValueError(f"must be at least --min-replicas, which is {least}")
        if most > 1 and "job_store" in info.data and info.data["job_store"] is None:
            raise ValueError(
                f"{most} replicas need --job-store (TMINUS_JOB_STORE), a PostgreSQL, as a durable job must be known at "
                "each of them"
            )
        return value

    @property
    def own_ports(self) -> Sequence[int]:
        """The ports from which a replica chooses its own port; 0 means any port."""
        if self.replica_ports is None:
            return (0,)
        first, last = map(int, self.replica_ports.split("-"))
        return range(first, last + 1)

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.min_replicas
