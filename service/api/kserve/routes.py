"""KServe's routes: metadata, health and inference."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, StrictBool
from pydantic.json_schema import models_json_schema

from tminus.service.api.admin import Loader
from tminus.service.api.answers import problems
from tminus.service.api.answers.headers import NAMED, OF_FORECAST, OF_JOB, with_headers
from tminus.service.api.answers.openapi import (
    BODY_ERRORS,
    FILE,
    IF_NONE_MATCH,
    WORK_ERRORS,
    Described,
    failures,
    path_parameter,
    ref,
)
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.kserve.infer import (
    BINARY,
    HEADER_LENGTH,
    InferCall,
    InferRequest,
    InferResponse,
    TensorMetadata,
    Tensors,
    inputs_of,
    outputs_of,
    outputs_wanted,
    read_request,
    version_of,
)
from tminus.service.api.models import Models, Services
from tminus.service.api.request.reading import (
    BARE,
    check_encoding,
    off_loop,
    parse_call,
    read_body,
    read_json,
)
from tminus.service.api.request.schemas import RequestSchema, in_words
from tminus.service.api.sample import Answer, respond
from tminus.service.api.submission import prepare_job
from tminus.service.api.system import fatal_error, why_unready
from tminus.service.errors import ModelNotFound, ServiceError
from tminus.service.images.encoder import JSON
from tminus.service.jobs.jobs import Jobs
from tminus.service.worker.worker import Worker

# model_repository is not offered: models are loaded and unloaded with POST /models/NAME/load and /unload instead.
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
PLATFORM = "tminus_unet"
MODEL, VERSION = "/v2/models/{model}", "/versions/{version}"


class ServerMetadata(BaseModel):
    """The name, version and extensions of this server."""

    name: str
    version: str
    extensions: list[str] = Field(description="The extensions of the protocol that are served.")


class LiveAnswer(BaseModel):
    """Liveness: the process answers and its worker is running."""

    live: bool


class ReadyAnswer(BaseModel):
    """Readiness: the server accepts work."""

    live: bool
    ready: bool


class ModelReady(BaseModel):
    """The name and the readiness of a model."""

    name: str
    ready: bool


class ModelMetadata(BaseModel):
    """The inputs and outputs of a model. All inputs are optional."""

    name: str
    versions: list[str] = Field(description="The one that is loaded: the first 16 digits of the hash of its weights.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelInIndex(BaseModel):
    """A model of this server, whether loaded or not."""

    name: str
    version: str | None = Field(default=None, description="The version that is loaded.")
    state: str = Field(json_schema_extra={"enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]})
    reason: str = Field(description="Why the model is not ready. Empty where it is.")


class IndexCall(RequestSchema):
    """Which models to list."""

    ready: Annotated[StrictBool, in_words("false")] = False
    """Only models that are ready."""


class TensorConfig(BaseModel):
    """An input or output tensor of a model, as in Triton's model_config.proto."""

    name: str
    data_type: str
    dims: list[int] = Field(description="The lengths. -1 is any length.")

    @classmethod
    def of(cls, tensor: TensorMetadata) -> Self:
        return cls(name=tensor.name, data_type=f"TYPE_{tensor.datatype}", dims=tensor.shape)


class InputConfig(TensorConfig):
    """An optional input tensor."""

    optional: bool = True


class ModelConfig(BaseModel):
    """The fields of Triton's ModelConfig message that make sense without a model file of some framework."""

    name: str
    platform: str
    backend: str
    max_batch_size: int = Field(default=0, description="0: the shapes are whole, and n is their first length.")
    input: list[InputConfig]
    output: list[TensorConfig]


def kserve_routes(models: Models, loader: Loader, worker: Worker, jobs: Jobs, version: str) -> APIRouter:
    """Return a router with KServe's routes. version: the server's version."""
    router = APIRouter(tags=["kserve"])

    @router.get("/v2", **described("kserve_get_server"), dependencies=BARE, responses=failures(422))
    async def get_server() -> ServerMetadata:
        return ServerMetadata(name="tminus", version=version, extensions=EXTENSIONS)

    @router.get(
        "/v2/health/live", **described("kserve_get_liveness"), response_model=LiveAnswer, responses=failures(500, 503)
    )
    async def get_live(request: Request) -> LiveAnswer | Response:
        reason = fatal_error(worker)
        return LiveAnswer(live=True) if reason is None else problems.render(reason, request.scope)

    @router.get(
        "/v2/health/ready",
        **described("kserve_get_readiness"),
        response_model=ReadyAnswer,
        responses=failures(500, 503, 507),
    )
    async def get_ready(request: Request) -> ReadyAnswer | Response:
        reason = why_unready(worker, jobs)
        return ReadyAnswer(live=True, ready=True) if reason is None else problems.render(reason, request.scope)

    @router.post(
        "/v2/repository/index", **described("kserve_list_models"), response_model=list[ModelInIndex],
        response_model_exclude_none=True, dependencies=BARE, responses=failures(*BODY_ERRORS),
        openapi_extra={"requestBody": INDEX_BODY},
    )  # fmt: skip
    async def get_index(request: Request) -> list[ModelInIndex]:
        check_encoding(request)
        call = IndexCall.parse(await read_json(request, models.default.limits.max_body_bytes, None))
        reason = why_unready(worker, jobs)
        state, why = ("READY", "") if reason is None else ("UNAVAILABLE", reason.detail)
        found = [
            ModelInIndex(name=each.model.name, version=version_of(each.model), state=state, reason=why)
            for each in models
        ]
        for name, going_on in (await loader.unloaded_models()).items():
            unloaded = "UNAVAILABLE" if going_on == "unloaded" else going_on.upper()
            found.append(ModelInIndex(name=name, state=unloaded, reason=going_on))
        return [each for each in found if each.state == "READY" or not call.ready]

    async def get_config(request: Request) -> ModelConfig:
        model = _of_version(models.of(request), request).model
        return ModelConfig(
            name=model.name,
            platform=PLATFORM,
            backend="tminus",
            input=[InputConfig.of(each) for each in inputs_of(model)],
            output=[TensorConfig.of(each) for each in outputs_of(model)],
        )

    async def get_metadata(request: Request) -> ModelMetadata:
        model = _of_version(models.of(request), request).model
        return ModelMetadata(
            name=model.name,
            versions=[version_of(model)],
            platform=PLATFORM,
            inputs=inputs_of(model),
            outputs=outputs_of(model),
        )

    async def get_model_ready(request: Request) -> ModelReady | Response:
        name, reason = _of_version(models.of(request), request).model.name, why_unready(worker, jobs)
        return ModelReady(name=name, ready=True) if reason is None else problems.render(reason, request.scope)

    for path, of_version in ((MODEL, ""), (MODEL + VERSION, "_version")):
        in_path = {"parameters": [path_parameter(name) for name in ("model", "version") if f"{{{name}}}" in path]}
        router.get(
            path, **described(f"kserve_get_model{of_version}"), dependencies=BARE, responses=failures(404, 422),
            openapi_extra=in_path,
        )(get_metadata)  # fmt: skip
        router.get(
            f"{path}/ready", **described(f"kserve_get_model{of_version}_readiness"), dependencies=BARE,
            response_model=ModelReady, responses=failures(404, 422, 500, 503, 507), openapi_extra=in_path,
        )(get_model_ready)  # fmt: skip
        router.get(
            f"{path}/config", **described(f"kserve_get_model{of_version}_config"), dependencies=BARE,
            responses=failures(404, 422), openapi_extra=in_path,
        )(get_config)  # fmt: skip
        router.post(
            f"{path}/infer", **described(f"kserve_infer{of_version}"), dependencies=BARE, response_class=Response,
            responses={200: ANSWER, **failures(404, 412, *BODY_ERRORS, *WORK_ERRORS)},
            openapi_extra={"parameters": [*in_path["parameters"], IF_NONE_MATCH], "requestBody": BODY},
        )(models.handler(infer, "infer"))  # fmt: skip
    return router


async def infer(services: Services, request: Request) -> Response:
    """Respond with images as tensors. The pixels are the same as from POST /sample."""
    _of_version(services, request)
    check_encoding(request)
    body, header = await read_body(request), request.headers.get(HEADER_LENGTH)
    asked, parameters = await off_loop(len(body), read_request, body, header, services.model, services.limits)
    call = await parse_call(InferCall, parameters, services.bounds)
    outputs = outputs_wanted(asked, call)
    if call.timeout is not None:
        call.deadline_s = call.timeout / 1e6
    services, new = await prepare_job(services, caller_of(request), call, request)
    made = Tensors(new.spec, services.model, outputs)
    try:
        response = await respond(services, request, new, Answer(made.media_type, made.etag_form, "tensors", made.body))
    except ServiceError as error:
        raise call.in_its_words(error) from None
    del response.headers["Vary"]  # the request body, not Accept, determines the format
    if asked.id is not None and (etag := response.headers.get("ETag")) is not None:  # weak, because the id differs
        response.headers["ETag"] = f"W/{etag}"
    if response.status_code != 200:
        return response
    beginning = b"{" if asked.id is None else f'{{"id": {json.dumps(asked.id)}, '.encode()
    length = len(beginning) + len(response.body)
    response.headers["Content-Length"] = str(length)
    if made.binary_bytes:
        response.headers[HEADER_LENGTH] = str(length - made.binary_bytes)
    # The rest of the body may be in the cache. Sending it without a copy makes its bytes count only once.
    return StreamingResponse(_parts(beginning, response.body), headers=response.headers)


async def _parts(*parts: bytes | memoryview) -> AsyncIterator[bytes | memoryview]:
    for part in parts:
        yield part


def _of_version(services: Services, request: Request) -> Services:
    """Raise ModelNotFound if the path names a version other than the model's own."""
    wanted, there = request.path_params.get("version"), version_of(services.model)
    if wanted not in (None, there):
        detail = f"model {services.model.name} is loaded in version {there}, and in no other"
        raise ModelNotFound(detail, field="version", value=wanted, bound=there)
    return services


def components() -> dict[str, Described]:
    """Return the schema components that these routes refer to."""
    shown: list[Any] = [(InferRequest, "validation"), (InferResponse, "serialization")]
    _, made = models_json_schema(shown, ref_template="#/components/schemas/{model}")
    found: dict[str, Described] = made["$defs"]
    return found


BODY: Described = {"required": True, "content": {JSON: {"schema": ref("InferRequest")}}}
INDEX_BODY: Described = {
    "content": {JSON: {"schema": {"type": "object", "additionalProperties": False, "properties": {
        "ready": {"type": "boolean", "description": "Only models that are ready. Default: false."},
    }}}},
}  # fmt: skip
ANSWER: Described = {
    "description": "The images, and the seed",
    "content": {JSON: {"schema": ref("InferResponse")}, BINARY: {"schema": FILE}},
    **with_headers(*OF_JOB, *OF_FORECAST, *NAMED, "Cache-Status", HEADER_LENGTH),
}
