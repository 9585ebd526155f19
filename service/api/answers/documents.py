"""Pydantic models of the JSON documents that clients receive.

Internal values have separate classes, so internal names can change without changing the API.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.pixels import VALUE_RANGE
from tminus.service.api.request.specs import parameters_of, settings_of
from tminus.service.errors import InvalidField
from tminus.service.jobs.jobs import STATES, JobView
from tminus.service.jobs.webhooks.delivery_store import Delivery, DeliveryState
from tminus.service.jobs.webhooks.webhook import EVENTS, Webhook
from tminus.service.model_info import Limits, ModelInfo

JOB_EXAMPLE: dict[str, Any] = {  # no null members: FastAPI removes them from examples
    "id": "0d1f3c5e7a9b4c2d8e6f0a1b2c3d4e5f",
    "model": "fashion-mnist-32",
    "state": "running",
    "durable": True,
    "step": 57,
    "steps": 200,
    "n": 4,
    "sampler": "ddpm",
    "seed": 7,
    "position": 0,
    "eta_s": 3.25,
    "age_s": 1.2,
    "created": "2026-12-01T12:00:00.000Z",
    "parameters": {
        "n": 4,
        "steps": 200,
        "sampler": "ddpm",
        "seed": 7,
        "index": 0,
        "guidance": 1.0,
        "timestep_spacing": "leading",
        "clip": True,
        "class_label": [7, 7, 7, 7],
    },
}
FROM_ATTRIBUTES = ConfigDict(from_attributes=True)  # the internal objects have attributes of the same names


class DeliveryAnswer(BaseModel):
    """A webhook delivery of one job event."""

    model_config = FROM_ATTRIBUTES

    id: str = Field(description="The `webhook-id` of each attempt.")
    event: str = Field(json_schema_extra={"enum": list(EVENTS)})
    state: str = Field(json_schema_extra={"enum": list(get_args(DeliveryState))})
    attempts: int = Field(description="How many attempts were begun.")
    error: str | None = Field(description="Why the last attempt failed.")


class WebhookAnswer(BaseModel):
    """A job's webhook and its deliveries."""

    receiver: str = Field(description="Scheme, host and port of the URL. Its path and query may be secret.")
    events: list[str] = Field(description="The events that it is told.")
    deliveries: list[DeliveryAnswer] = Field(description="The events that have happened.")

    @classmethod
    def of(cls, webhook: Webhook, deliveries: Sequence[Delivery]) -> "WebhookAnswer":
        told = [DeliveryAnswer.model_validate(each) for each in deliveries]
        return cls(receiver=webhook.receiver, events=list(webhook.events), deliveries=told)


class JobAnswer(BaseModel):
    """A job, as returned by every call below /jobs. A member is null if its value is unknown or does not exist yet."""

    model_config = ConfigDict(
        json_schema_serialization_defaults_required=True, json_schema_extra={"examples": [JOB_EXAMPLE]}
    )

    id: str = Field(description="The id of the job, which is never given twice.")
    model: str = Field(description="The name of the model.")
    state: str = Field(json_schema_extra={"enum": list(STATES)})
    durable: bool = Field(description="Whether the job is finished even if the client or the server stops.")
    step: int | None = Field(description="How many steps the images have taken, on average, counted in passes.")
    steps: int = Field(description="How many passes each image takes.")
    n: int = Field(description="The number of images.")
    sampler: str
    seed: int
    position: int | None = Field(description="How many jobs go before it.")
    eta_s: float | None = Field(description="Seconds until the job should be done.")
    age_s: float = Field(description="Seconds since the job was accepted.")
    created: str = Field(description="When the job was accepted: ISO 8601, UTC.")
    finished: str | None = Field(description="When the job ended: ISO 8601, UTC.")
    fingerprint: str | None = Field(description="The fingerprint of the build that made the images.")
    parameters: dict[str, Any] = Field(description="The parameters of `POST /sample` that make the same images again.")
    problem: dict[str, Any] | None = Field(description="Why the job failed: the members of a problem document.")
    # Has a default because the JSON of another replica may lack this member.
    webhook: WebhookAnswer | None = Field(default=None, description="Who is told of the job.")

    @classmethod
    def of(cls, view: JobView) -> "JobAnswer":
        record = view.record
        return cls(
            id=record.id,
            model=view.model_name,
            state=view.state,
            durable=view.durable,
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
    """Return the JSON document of a job. Webhooks and GET /jobs/{id} use the same document."""
    return JobAnswer.of(view).model_dump()


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobAnswer]
    next: str | None = Field(description="The `before` of the next page. Null on the last page.")


class Fault(BaseModel):
    """One fault in a request's parameters."""

    code: str = Field(description="What programs go by: it stays the same.")
    detail: str = Field(description="What is wrong, for people.")
    field: str = Field(description="What has to be changed.")
    value: Any = Field(default=None, description="What was received, shortened.")
    bound: str | None = Field(default=None, description="What it must be.")


def _problem_example() -> dict[str, Any]:
    error = InvalidField.of("eta", "a number in 0..1", 2)
    error.others = (InvalidField.of("steps", "an integer in 1..1000", 0),)
    return error.problem()


class Problem(BaseModel):
    """A problem document (RFC 9457).

    `field`, `value` and `bound` say what to change, if there is a single thing to change. `errors` lists every fault
    in the parameters; the other members repeat the first one.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_problem_example()]})

    type: str = Field(description="`urn:tminus:problem:`, then the code.")
    title: str
    status: int
    code: str = Field(description="What programs go by: it stays the same.")
    detail: str = Field(description="What is wrong, for people.")
    field: str | None = Field(default=None, description="What has to be changed.")
    value: Any = Field(default=None, description="What was received, shortened.")
    bound: str | None = Field(default=None, description="What it must be.")
    cause: dict[str, Any] | None = Field(default=None, description="The problem that the job failed with.")
    errors: list[Fault] | None = Field(default=None, description="All that is wrong with the parameters.")


class ErrorText(BaseModel):
    """An error in the form that Hugging Face and KServe clients expect."""

    error: str = Field(description="What is wrong, for people.")
    code: str = Field(description="What programs go by: it stays the same.")
    field: str | None = Field(default=None, description="What has to be changed.")
    value: Any = Field(default=None, description="What was received, shortened.")
    bound: str | None = Field(default=None, description="What it must be.")


class LimitsAnswer(BaseModel):
    """The limits on requests."""

    model_config = FROM_ATTRIBUTES

    max_n: int = Field(description="The most images of a request.")
    max_batch: int = Field(description="Places in one forward pass.")
    max_rows: int = Field(description="The most images that wait and run at once.")
    max_jobs: int = Field(description="The most jobs that wait and run at once.")
    max_backlog_s: float = Field(description="The most seconds of work that may wait.")
    max_body_bytes: int = Field(description="The most bytes of a body, not counting its images.")
    max_image_bytes: int = Field(description="The most bytes of an uploaded image.")
    result_cache_bytes: int = Field(description="The size of the result cache.")
    keep_jobs_s: float = Field(description="Seconds for which a durable job is kept after its end.")
    keep_jobs_bytes: int = Field(description="The most bytes that ended jobs may take.")
    max_streams: int = Field(description="The most streams at once.")
    max_streams_per_address: int = Field(description="The most streams at once of one address.")


class RecommendedAnswer(BaseModel):
    """The sampling settings that the checkpoint recommends, or the usual settings if it recommends none."""

    model_config = FROM_ATTRIBUTES

    sampler: str
    steps: int
    guidance: float = Field(description="1 is off. Only images with a class can be guided.")


class RungAnswer(RecommendedAnswer):
    """One setting of the ladder."""

    passes: int = Field(description="The network passes for one image. A guided pass counts twice.")
    model: str | None = Field(description="The name of the model that has this setting. Null for this model.")
    distance: float | None = Field(
        description="The Fréchet distance from the data in the features of a classifier, as `tminus evaluate` "
        "measured it. Null where it is not known."
    )
    pixel_distance: float | None = Field(description="The Fréchet distance in pixels.")


class SamplerAnswer(BaseModel):
    """One of the model's samplers."""

    when: str = Field(description="When to take it.")
    source: str
    good_steps: int = Field(description="What a request gets that names this sampler alone.")
    max_steps: int
    passes_per_step: int = Field(
        description="Passes through the network for a step; twice as many with guidance. The last step takes one."
    )
    passes_to_start: int = Field(description="More passes, where there are more steps than `steps_to_start`.")
    steps_to_start: int = Field(description="The number of first steps that take `passes_to_start`.")

    @classmethod
    def of(cls, name: str, model: ModelInfo) -> "SamplerAnswer":
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
    """One of the checkpoint's sampler tables."""

    model_config = FROM_ATTRIBUTES

    sampler: str
    steps: int
    guidance: float
    timesteps: list[float]
    table: str = Field(validation_alias="hash", description="The hash of the table.")


class LatentAnswer(BaseModel):
    """The autoencoder of a latent model, and the shape and scaling of its latents."""

    model_config = FROM_ATTRIBUTES

    autoencoder: str = Field(description="The class of the autoencoder.")
    channels: int
    height: int
    width: int
    scaling_factor: float


class ModelAnswer(BaseModel):
    """A served model and how it runs."""

    name: str
    architecture: str
    num_parameters: int
    height_px: int
    width_px: int
    channels: int
    alpha: bool = Field(description="Whether the last of four channels is alpha.")
    shown_channels: int = Field(
        description="How many of the first channels pictures show: 1 is grey, 3 RGB, 4 RGBA; application/x-npy has all."
    )
    value_range: tuple[float, float] = Field(
        description="The values of black and of white in a channel of application/x-npy."
    )
    latent: LatentAnswer | None = Field(description="Null where the network sees pixels.")
    num_timesteps: int = Field(description="T, the number of timesteps.")
    beta_schedule: str
    prediction_type: str
    variance_type: str
    timestep_spacings: dict[str, str] = Field(description="By sampler, for requests that name none.")
    steps_offset: int
    clip: bool = Field(description="Whether x_0 is clipped, for requests that do not say.")
    samplers: list[str]
    sampler_details: dict[str, SamplerAnswer] = Field(description="By sampler.")
    tables: list[TableAnswer] = Field(description="The steps and guidance that tuned, or a student, has tables for.")
    refused_tables: list[str] = Field(description="Files of samplers/ that are not used, and why.")
    student: dict[str, Any] | None = Field(
        description="What a network made for few steps is, and the guidance folded into it."
    )
    folded_guidance: float = Field(
        description="The guidance in the weights. A request's own guidance multiplies it; 1 is none."
    )
    default_sampler: str
    recommended: RecommendedAnswer = Field(description="What a request gets that names neither sampler nor steps.")
    ladder: list[RungAnswer] = Field(
        description="What `quality=adaptive` chooses from, from the best setting to the fastest."
    )
    conditional: bool
    class_names: list[str]
    null_class: int | None
    weights_hash: str = Field(description="SHA-256 of the weights.")
    fingerprint: str = Field(description="The fingerprint of the build: the same one gives the same bytes.")
    device: str
    executor: str
    precision: str
    executor_details: str
    exact: bool = Field(description="Whether the same request gives the same bytes, whatever else runs.")
    limits: LimitsAnswer

    @classmethod
    def of(cls, model: ModelInfo, limits: Limits) -> "ModelAnswer":
        """Return the answer for a model. It omits the noise schedule, which ScheduleAnswer contains."""
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
        """Return the noise schedule of a model: beta_t = 1 - alpha_bar_t / alpha_bar_(t-1)."""
        alpha_bar = [model.alpha_bar(t) for t in range(model.num_timesteps)]
        before = [1.0, *alpha_bar[:-1]]
        beta = [1 - now / then if then else 1.0 for now, then in zip(alpha_bar, before, strict=True)]
        return cls(alpha_bar=alpha_bar, beta=beta)


class StatusAnswer(BaseModel):
    """The response to a successful probe. A failed probe gets a problem document."""

    status: str


def _iso(unix_us: int) -> str:
    return datetime.fromtimestamp(unix_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class SampledImage(BaseModel):
    """One image."""

    index: int
    class_label: int | None
    class_name: str | None
    png: str = Field(description="Base64.", json_schema_extra={"format": "byte"})


class PathFrame(BaseModel):
    """Contact sheets that show all images of a request after the same number of steps."""

    step: int = Field(description="How many steps the images have taken.")
    t: float = Field(description="The timestep of the next step.")
    x_t: str | None = Field(default=None, description="The noisy images: base64 of a PNG, if they were asked for.")
    x_0: str | None = Field(default=None, description="The network's estimate: base64 of a PNG, if it was asked for.")


class SampleAnswer(BaseModel):
    """The images, and the values needed to generate them again."""

    spec: dict[str, Any] = Field(description="The request as the server understood it.")
    weights: str = Field(description="SHA-256 of the weights.")
    fingerprint: str
    images: list[SampledImage]
    sheet: str | None = Field(
        default=None, description="With `every`: what image/png answers, base64.", json_schema_extra={"format": "byte"}
    )
    frames: list[PathFrame] | None = Field(default=None, description="With `every`: what came before.")
