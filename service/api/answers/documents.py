"""The JSON documents that clients get, as pydantic models, apart from the values inside: those may be renamed."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.pixels import VALUE_RANGE
from tminus.service.api.request.defaults import settings_of
from tminus.service.api.request.schemas import parameters_of
from tminus.service.jobs.views import STATES, JobView
from tminus.service.jobs.webhooks.delivery_store import Delivery, DeliveryState
from tminus.service.jobs.webhooks.webhook import EVENTS, Webhook
from tminus.service.model_info import Limits, ModelInfo

FROM_ATTRIBUTES = ConfigDict(from_attributes=True)  # the values of our own have the same names


class DeliveryAnswer(BaseModel):
    """An event of a job that its webhook is told."""

    model_config = FROM_ATTRIBUTES

    id: str = Field(description="the webhook-id of each attempt")
    event: str = Field(json_schema_extra={"enum": list(EVENTS)})
    state: str = Field(json_schema_extra={"enum": list(get_args(DeliveryState))})
    attempts: int = Field(description="how many were begun")
    error: str | None = Field(description="why the last one failed")


class WebhookAnswer(BaseModel):
    """Who is told of a job, and how far that has come."""

    receiver: str = Field(description="scheme, host and port; path and query may be secret")
    events: list[str] = Field(description="those that it is told")
    deliveries: list[DeliveryAnswer] = Field(description="those that have happened")

    @classmethod
    def of(cls, webhook: Webhook, deliveries: Sequence[Delivery]) -> "WebhookAnswer":
        """Say what is known of it now."""
        told = [DeliveryAnswer.model_validate(each) for each in deliveries]
        return cls(receiver=webhook.receiver, events=list(webhook.events), deliveries=told)


class JobAnswer(BaseModel):
    """A job, as all of /jobs tells of it. What is not known, or has not happened yet, is null."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    id: str
    model: str = Field(description="its name")
    state: str = Field(json_schema_extra={"enum": list(STATES)})
    durable: bool = Field(description="whether it is finished whatever happens to client and server")
    background: bool = Field(default=False, description="whether it lets all others go first")
    step: int | None = Field(description="how many steps its images have taken, on average")
    steps: int = Field(description="how many steps each image takes")
    n: int = Field(description="how many images")
    sampler: str
    seed: int
    position: int | None = Field(description="how many jobs go before it")
    eta_s: float | None = Field(description="seconds until it should be done")
    age_s: float = Field(description="seconds since it was accepted")
    created: str = Field(description="when it was accepted: ISO 8601, UTC")
    finished: str | None = Field(description="when it ended: ISO 8601, UTC")
    fingerprint: str | None = Field(description="of the build that made its images")
    parameters: dict[str, Any] = Field(description="those of POST /sample that make the same images again")
    problem: dict[str, Any] | None = Field(description="why it failed: the members of a problem document")
    webhook: WebhookAnswer | None = Field(default=None, description="who is told of it")  # another server may know none

    @classmethod
    def of(cls, view: JobView) -> "JobAnswer":
        """Say what is known of a job now."""
        record = view.record
        return cls(
            id=record.id,
            model=view.model_name,
            state=view.state,
            durable=view.durable,
            background=record.background,
            step=view.step,
            steps=record.spec.num_passes,
            n=record.spec.n,
            sampler=record.spec.sampler,
            seed=record.spec.seed,
            position=view.position,
            eta_s=None if view.eta_s is None else round(view.eta_s, 3),
            age_s=round(record.age_s, 3),
            created=_iso(record.created_us),
            finished=None if record.finished_us is None else _iso(record.finished_us),
            fingerprint=record.fingerprint,
            parameters=parameters_of(record.spec),
            problem=None if record.problem is None else dict(record.problem),
            webhook=None if record.webhook is None else WebhookAnswer.of(record.webhook, view.deliveries),
        )


def document(view: JobView) -> dict[str, Any]:
    """A job as a webhook is told of it, and as GET /jobs/{id} tells of it."""
    return JobAnswer.of(view).model_dump()


class JobPage(BaseModel):
    """Some jobs, the newest first."""

    jobs: list[JobAnswer]
    next: str | None = Field(description="`before` of the next page; null on the last one")


class Problem(BaseModel):
    """What is wrong (RFC 9457). `field`, `value` and `bound` are here if a single thing has to be changed."""

    type: str = Field(description="urn:tminus:problem:, then the code")
    title: str
    status: int
    code: str = Field(description="stable: what programs go by")
    detail: str = Field(description="for people")
    field: str | None = Field(default=None, description="what has to be changed")
    value: Any = Field(default=None, description="what was received, shortened")
    bound: str | None = Field(default=None, description="what it must be")
    cause: dict[str, Any] | None = Field(default=None, description="the problem that a job failed with")


class ErrorText(BaseModel):
    """What is wrong, as the clients of Hugging Face and KServe read it."""

    error: str = Field(description="for people")
    code: str = Field(description="stable: what programs go by")
    field: str | None = Field(default=None, description="what has to be changed")
    value: Any = Field(default=None, description="what was received, shortened")
    bound: str | None = Field(default=None, description="what it must be")


class LimitsAnswer(BaseModel):
    """The bounds that requests are held to."""

    model_config = FROM_ATTRIBUTES

    max_n: int = Field(description="images of a request")
    max_batch: int = Field(description="places in one forward pass")
    max_rows: int = Field(description="images held at once, waiting and running")
    max_jobs: int
    max_backlog_s: float = Field(description="seconds of work that may wait")
    max_background_rows: int = Field(description="images of background jobs held at once, beside max_rows")
    max_background_jobs: int = Field(description="background jobs held at once, beside max_jobs")
    background_max_wait_s: float = Field(description="seconds for which a background job lets all others go first")
    max_body_bytes: int = Field(description="of a body, images in it apart")
    max_image_bytes: int
    result_cache_bytes: int
    keep_jobs_s: float = Field(description="how long an ended durable job is kept")
    keep_jobs_bytes: int
    max_streams: int
    max_streams_per_address: int


class RecommendedAnswer(BaseModel):
    """What the checkpoint recommends to sample with, or else the usual settings."""

    model_config = FROM_ATTRIBUTES

    sampler: str
    steps: int
    guidance: float = Field(description="1 is off; only images with a class can be guided")


class SamplerAnswer(BaseModel):
    """One sampler."""

    when: str = Field(description="to take it")
    source: str
    good_steps: int = Field(description="what a request gets that names this sampler alone")
    max_steps: int
    passes_per_step: int = Field(
        description="through the network: what a step costs, twice that where it is guided; the last step takes one"
    )
    passes_to_start: int = Field(description="beyond those, where there are more steps than steps_to_start")
    steps_to_start: int = Field(description="the first steps, which passes_to_start are for")

    @classmethod
    def of(cls, name: str, model: ModelInfo) -> "SamplerAnswer":
        """Say what it is."""
        facts, own = SAMPLER_FACTS[name], [table for table in model.tables if table.sampler == name]
        most = max((table.steps for table in own), default=facts.max_steps(model.num_timesteps))
        alone = settings_of({"sampler": name}, model, can_guide=model.null_class is not None)
        return cls(
            when=facts.when,
            source=facts.source,
            good_steps=alone.steps,
            max_steps=most,
            passes_per_step=facts.passes_per_step,
            passes_to_start=facts.passes_to_start,
            steps_to_start=facts.steps_to_start,
        )


class TableAnswer(BaseModel):
    """A table of the checkpoint."""

    model_config = FROM_ATTRIBUTES

    sampler: str
    steps: int
    guidance: float
    timesteps: list[float]
    table: str = Field(validation_alias="hash", description="its hash")


class LatentAnswer(BaseModel):
    """What the network of a latent model sees in place of pixels."""

    model_config = FROM_ATTRIBUTES

    autoencoder: str = Field(description="its class")
    channels: int
    height: int
    width: int
    scaling_factor: float


class ModelAnswer(BaseModel):
    """What is loaded, and how it runs."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    alpha: bool = Field(description="whether the last of four channels is alpha")
    shown_channels: int = Field(
        description="how many of the first channels pictures show: 1 is grey, 3 RGB, 4 RGBA; application/x-npy has all"
    )
    value_range: tuple[float, float] = Field(
        description="of a channel, in application/x-npy: what is black, and what is white"
    )
    latent: LatentAnswer | None = Field(description="null where the network sees pixels")
    num_timesteps: int = Field(description="T")
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: dict[str, str] = Field(description="by sampler, for requests that name none")
    steps_offset: int
    clip: bool = Field(description="whether x_0 is clipped, for requests that do not say")
    samplers: list[str]
    sampler_details: dict[str, SamplerAnswer] = Field(description="by sampler")
    tables: list[TableAnswer] = Field(description="the steps and guidance that tuned, or a student, has tables for")
    refused_tables: list[str] = Field(description="files of samplers/ that are not used, and why")
    student: dict[str, Any] | None = Field(
        description="of a network made for few steps: what it is, and the guidance folded in"
    )
    folded_guidance: float = Field(
        description="guidance in the weights, a student's too; a request's own multiplies it, and 1 is none"
    )
    default_sampler: str
    recommended: RecommendedAnswer = Field(description="what a request gets that names neither sampler nor steps")
    conditional: bool
    class_names: list[str]
    null_class: int | None
    weights_hash: str = Field(description="SHA-256 of the weights")
    fingerprint: str = Field(description="of the build: the same one gives the same bytes")
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool = Field(description="whether the same request gives the same bytes, whatever else runs")
    limits: LimitsAnswer

    @classmethod
    def of(cls, model: ModelInfo, limits: Limits) -> "ModelAnswer":
        """Say what is loaded; the noise schedule's T numbers are a ScheduleAnswer."""
        made: dict[str, Any] = {
            "sampler_details": {name: SamplerAnswer.of(name, model) for name in model.samplers},
            "tables": model.tables,
            "limits": limits,
            "value_range": VALUE_RANGE,
        }
        return cls(**{name: getattr(model, name) for name in cls.model_fields.keys() - made.keys()}, **made)


class ScheduleAnswer(BaseModel):
    """The noise schedule, for t = 0..T-1."""

    alpha_bar: list[float]
    beta: list[float]

    @classmethod
    def of(cls, model: ModelInfo) -> "ScheduleAnswer":
        """Take it from the model: beta_t = 1 - alpha_bar_t / alpha_bar_(t-1)."""
        alpha_bar = [model.alpha_bar(t) for t in range(model.num_timesteps)]
        before = [1.0, *alpha_bar[:-1]]
        beta = [1 - now / then if then else 1.0 for now, then in zip(alpha_bar, before, strict=True)]
        return cls(alpha_bar=alpha_bar, beta=beta)


class StatusAnswer(BaseModel):
    """What a probe is told when all is well; otherwise it gets a problem document."""

    status: str


def _iso(unix_us: int) -> str:
    return datetime.fromtimestamp(unix_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class SampledImage(BaseModel):
    """One image."""

    index: int
    class_label: int | None
    class_name: str | None
    png: str = Field(description="base64", json_schema_extra={"format": "byte"})


class PathFrame(BaseModel):
    """The images of a request after the same number of steps, as contact sheets."""

    step: int = Field(description="how many steps they have taken")
    t: float = Field(description="the timestep of the next step")
    x_t: str | None = Field(default=None, description="the noisy images: base64 of a PNG, if they were asked for")
    x_0: str | None = Field(default=None, description="the network's estimate: base64 of a PNG, if it was asked for")


class SampleAnswer(BaseModel):
    """Images as JSON, and what is needed to make them again."""

    spec: dict[str, Any] = Field(description="the request as the server understood it")
    weights: str = Field(description="SHA-256 of the weights")
    fingerprint: str
    images: list[SampledImage]
    sheet: str | None = Field(
        default=None, description="with `every`: what image/png answers, base64", json_schema_extra={"format": "byte"}
    )
    frames: list[PathFrame] | None = Field(default=None, description="with `every`: what came before")
