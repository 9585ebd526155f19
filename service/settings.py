"""The settings of `tminus serve`, each by flag or by TMINUS_ variable. Built once, in the entry point."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One field is one flag (--max-batch) and one variable (TMINUS_MAX_BATCH); the flag wins."""

    model_config = SettingsConfigDict(env_prefix="TMINUS_", frozen=True, extra="ignore")

    checkpoint: Path = Field(Path("checkpoints/fashion-mnist-32"), description="checkpoint folder to serve")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of a forward pass; default: torch's own")
    max_n: int = Field(64, ge=1, le=1024, description="images in one request")
    max_batch: int = Field(16, ge=4, le=4096, description="places in one forward pass; a guided row takes two")
    max_jobs: int = Field(1024, ge=1, le=10_000, description="jobs held at once, waiting and running")
    max_rows: int | None = Field(
        None, ge=4, le=1_000_000, description="images held at once; default: what 512 MiB of latents hold, up to 4096"
    )
    max_backlog_s: float = Field(600, gt=0, allow_inf_nan=False, description="seconds of predicted work that may wait")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="size of a request's body")
    grace_s: float = Field(
        30, ge=0, allow_inf_nan=False, description="seconds that running work gets to finish after SIGTERM"
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error")
