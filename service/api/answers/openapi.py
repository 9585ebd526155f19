"""The parts of the OpenAPI document that FastAPI cannot derive, because handlers read parameters and bodies themselves.

The texts are in other modules: calls in operations.py, headers in headers.py, WebSocket messages and events in
messages.py, and parameters in the request schemas. A field's default is stated twice: in the last sentence of its
description, and in the extension `x-default`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from tminus.model.timesteps import SPACINGS
from tminus.service.api.answers import headers as of_headers
from tminus.service.api.answers.documents import ErrorText, Problem, SampleAnswer
from tminus.service.api.answers.headers import (
    NAMED,
    OF_ANY,
    OF_FLOATS,
    OF_FORECAST,
    OF_JOB,
    OF_OTHERS,
    OF_PICTURES,
    OF_QUOTA,
    OF_REFUSALS,
    TAKEN,
    with_headers,
)
from tminus.service.api.answers.messages import WEBSOCKETS
from tminus.service.api.answers.operations import API_VERSION, TAGS
from tminus.service.api.answers.problems import PROBLEM_JSON, Form, as_error_text, as_openai, error_form
from tminus.service.api.edge.origin import PROBES
from tminus.service.api.request.classes import DIGITS
from tminus.service.api.request.multipart import BYTES, FORM
from tminus.service.api.request.schemas import (
    BOUND,
    DEFAULT,
    NUMBER,
    PICTURES,
    Bound,
    Bounds,
    JobCall,
    NoiseCall,
    RequestSchema,
    SampleCall,
    StreamCall,
    bounds_of,
)
from tminus.service.images.encoder import JSON, MEDIA_TYPES, NPY, WEBP
from tminus.service.images.trajectory import TRAJECTORY
from tminus.service.model_info import Limits, ModelInfo

Described = dict[str, Any]  # part of an OpenAPI document

FILE: Described = {"type": "string", "format": "binary"}
# JSON bodies may contain numbers as text, because a JavaScript number cannot hold every seed above 2^53.
AS_TEXT: Mapping[str, Described] = {
    "integer": {"type": "string", "pattern": f"^{DIGITS.pattern}$"},
    "number": {"type": "string", "pattern": f"^{NUMBER.pattern}$"},
    "boolean": {"type": "string", "enum": ["true", "false"]},
}
FAILURES = {
    400: "The body cannot be parsed, or the server does not have the version that `API-Version` names",
    401: "The key is missing or wrong",
    403: "The server does not know the name in `Host`, or a page of another origin asks, or the call needs a key of "
    "the role admin",
    404: "There is no such job or model",
    406: "`Accept` allows none of the media types of this call",
    408: "The body came too slowly",
    409: "The job is not done yet, or the model cannot be changed now",
    410: "The job was cancelled or failed, and has no images",
    412: "The client has the answer already: `If-None-Match` names its `ETag`. Nothing was run",
    413: "The body is too large",
    415: "The body is compressed, or this call does not take its `Content-Type`",
    422: "A parameter is invalid, unknown or given twice. `errors` lists all that is wrong",
    429: "Too much is asked for at once, or the quota of the key is used up",
    500: "The server failed",
    503: "The server is starting or shutting down, or the model is being loaded",
    504: "`deadline_s` passed before the job was done",
    507: "The job store failed",
}
IN_PATHS = {
    "model": "The name of a model that `GET /models` lists.",
    "version": "The first 16 digits of the hash of the weights.",
    "job_id": "The id of the job.",
    "name": "The name of a file.",
}
FORMS: Mapping[Form, str] = {as_openai: "ErrorAnswer", as_error_text: "ErrorText"}  # component names
BAD_REQUEST = "A member is invalid, unknown or given twice, or the body cannot be parsed"
SCHEMES: Described = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of this server. Without keys the server is open.",
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "tminus_key",
        "description": "The key, as `POST /login` keeps it for a page.",
    },
}
BODY_ERRORS, WORK_ERRORS = (408, 413, 415, 422, 429), (500, 503, 504)


def ref(component: str) -> Described:
    """Return a reference to a schema component."""
    return {"$ref": f"#/components/schemas/{component}"}


def failures(*statuses: int) -> dict[int | str, Described]:
    """Return the error responses of a call, keyed by status code."""
    content = {PROBLEM_JSON: {"schema": ref("Problem")}}
    return {
        status: {"description": FAILURES[status], "content": content, **with_headers(*OF_REFUSALS.get(status, ()))}
        for status in statuses
    }


def answer(description: str, *media_types: str) -> Described:
    """Return a response with any of these media types."""
    schemas = {JSON: ref("SampleAnswer")}
    return {"description": description, "content": {kind: {"schema": schemas.get(kind, FILE)} for kind in media_types}}


def path_parameter(name: str) -> Described:
    """Return a path parameter for a handler that reads the parameter itself."""
    schema = {"type": "string"}
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": IN_PATHS[name]}


def _header(name: str, schema: Described, description: str) -> Described:
    return {"name": name, "in": "header", "schema": schema, "description": description}


OF_IMAGES = (*OF_JOB, *OF_FORECAST, *NAMED, "Cache-Status", *OF_PICTURES)
IMAGES = answer("The images", *MEDIA_TYPES) | with_headers(*OF_IMAGES)
IMAGES_OF_JOB = answer("The images", *MEDIA_TYPES, NPY) | with_headers(*OF_JOB, *NAMED, *OF_FLOATS, *OF_PICTURES)
IMAGES_OR_STEPS = answer("The images", *MEDIA_TYPES, NPY, TRAJECTORY, WEBP) | with_headers(*OF_IMAGES, *OF_FLOATS)
NOISED = answer("x_t", "image/png") | with_headers("X-Seed", "X-Alpha-Bar", "X-Fingerprint", *NAMED)
NOT_MODIFIED: Described = {
    "description": "The client has the answer already: `If-None-Match` names its `ETag`. Nothing was run",
    **with_headers(*OF_JOB, *NAMED, *OF_FLOATS, *OF_PICTURES),
}
OF_ACCEPTED = ("Location", "X-Job-ID", *TAKEN, "Cache-Control", "Idempotent-Replayed")
SUBMITTED: Described = {
    "description": "The job is on disk, and will be finished",
    "content": {JSON: {"schema": ref("JobAnswer")}},
    **with_headers(*OF_ACCEPTED),
}
SAMPLE_BODY: Described = {"content": {JSON: {"schema": ref("SampleRequest")}, FORM: {"schema": ref("SampleForm")}}}
JOB_BODY: Described = {"content": {JSON: {"schema": ref("JobRequest")}, FORM: {"schema": ref("JobForm")}}}
NOISE_BODY: Described = {
    "required": True,
    "content": {
        **{kind: {"schema": FILE} for kind in ("image/png", "image/jpeg", "image/webp", BYTES)},
        FORM: {"schema": ref("NoiseForm")},
    },
}
VERSION_ASKED = _header(
    "API-Version",
    {"type": "string", "enum": [API_VERSION]},
    f"The version of the API that the request was written for. Default: {API_VERSION}.",
) | {DEFAULT: API_VERSION}
IF_NONE_MATCH = _header("If-None-Match", {"type": "string"}, "ETags of answers that the client has.")
CACHE_CONTROL = _header(
    "Cache-Control",
    {"type": "string"},
    "`no-cache`, or `Pragma: no-cache` without this header: run the job again, though the result cache has the answer. "
    "`no-store`: keep the answer out of the cache.",
)
IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    {"type": "string", "minLength": 1, "maxLength": 257},  # 255 characters and two quotes
    "Makes a retry safe: the same key and parameters are the same job. Printable ASCII.",
)
WEBHOOKS: Described = {
    "job": {
        "post": {
            "summary": "What the server sends to the webhook of a job, signed as Standard Webhooks says",
            "parameters": [
                _header("webhook-id", {"type": "string"}, "The event and a UUID. The same in each attempt."),
                _header("webhook-timestamp", {"type": "string"}, "When this attempt was made: Unix time in seconds."),
                _header(
                    "webhook-signature",
                    {"type": "string"},
                    "`v1,` and base64 of an HMAC-SHA256; or several, separated by spaces.",
                ),
            ],
            "requestBody": {"required": True, "content": {JSON: {"schema": ref("JobAnswer")}}},
            "responses": {
                "2XX": {"description": "The event is delivered"},
                "410": {"description": "The webhook is given up"},
                "default": {"description": "The event is sent again later"},
            },
        }
    }
}
LAST_EVENT_ID = _header(
    "Last-Event-ID", {"type": "string"}, "The id of the last event that was received. Only what is newer is sent."
)


REFS = {"sampler": ref("Sampler"), "timestep_spacing": ref("TimestepSpacing")}


@dataclass(frozen=True, slots=True)
class Contract:
    """The request schemas, narrowed to what the model and the server's settings allow."""

    model: ModelInfo
    limits: Limits

    def query(self, kind: type[RequestSchema]) -> list[Described]:
        """Return the query parameters of one type of call. Images and webhook URLs must be in the body."""
        return [
            {"name": name, "in": "query", "schema": field, **{key: field.pop(key) for key in TOLD if key in field}}
            for name, field in self.fields(kind, as_text=True).items()
            if name not in (*PICTURES, "webhook")
        ]

    def components(self) -> dict[str, Described]:
        """Return the shared schema components, keyed by name."""
        examples = {"examples": [self._example()]}
        _, answers = models_json_schema(
            [(each, "serialization") for each in (Problem, ErrorText, SampleAnswer)],
            ref_template="#/components/schemas/{model}",
        )
        return {
            **answers["$defs"],
            "Sampler": {"type": "string", "enum": list(self.model.samplers)},
            "TimestepSpacing": {"type": "string", "enum": list(SPACINGS)},
            "SampleRequest": closed_object("What to sample.", self.fields(SampleCall)) | examples,
            "JobRequest": closed_object("What a durable job is to sample.", self.fields(JobCall)) | examples,
            "StreamRequest": closed_object("What to sample, and what to show on the way.", self.fields(StreamCall)),
            "SampleForm": self._form("The same, with images as files.", PICTURES, SampleCall),
            "JobForm": self._form("The same, with images as files.", PICTURES, JobCall),
            "NoiseForm": self._form("An image, and how much noise.", ("image",), NoiseCall) | {"required": ["image"]},
        }

    def _example(self) -> Described:
        names, own = self.model.class_names, self.model.recommended
        of_class = {"class_label": names[min(7, len(names) - 1)]} if names else {}
        return {"n": min(4, self.limits.max_n), "sampler": own.sampler, "steps": own.steps, "seed": 7} | of_class

    def _form(self, description: str, files: tuple[str, ...], kind: type[RequestSchema]) -> Described:
        properties = self.fields(kind, as_text=True)
        described = {name: {"description": properties.get(name, {}).get("description", "The image.")} for name in files}
        return closed_object(description, properties | {name: FILE | described[name] for name in files})

    def fields(
        self, kind: type[RequestSchema], *, as_text: bool = False, bounds: Bounds | None = None
    ) -> dict[str, Described]:
        """Return the schemas of a call's fields: as text for a query or a form, otherwise as JSON.

        bounds: override the bounds of POST /sample.
        """
        return fields_of(kind, {**bounds_of(self.model, self.limits), **(bounds or {})}, as_text=as_text)


def fields_of(kind: type[RequestSchema], bounds: Bounds, *, as_text: bool = False) -> dict[str, Described]:
    """Return the schemas of a call's fields, narrowed by the bounds."""
    return {
        name: _field(field, bounds.get(name, Bound()), REFS.get(name), as_text=as_text) | _described(field)
        for name, field in kind.model_json_schema()["properties"].items()
    }


def closed_object(description: str, properties: dict[str, Described]) -> Described:
    """Return the schema of a JSON object that allows only these members."""
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


TOLD = ("description", DEFAULT)
OF_FIELDS = ("title", "default", "anyOf", BOUND, *TOLD)  # members that say nothing about the type of the values


def _described(field: Described) -> Described:
    description = field["description"].replace("\n", " ")
    if DEFAULT not in field:
        return {"description": description}
    return {"description": f"{description} Default: {field[DEFAULT]}.", DEFAULT: field[DEFAULT]}


def _field(field: Described, bound: Bound, component: Described | None = None, *, as_text: bool) -> Described:
    """Narrow each type of a field by the bound.

    Text values cannot be null. In JSON, numbers and booleans may also be sent as text.
    """
    kinds: list[Described] = []
    for kind in field.get("anyOf", [field]):
        name = kind["type"]
        if name == "null" and as_text:
            continue
        kept = {key: value for key, value in kind.items() if key not in OF_FIELDS} | bound.of_kind(name)
        if name == "array":
            kept["items"] = _field(kind["items"], bound, as_text=as_text)
        kinds.append(component if component is not None and name == "string" else kept)
    if not as_text and not any(kind.get("type", "string") == "string" for kind in kinds):
        kinds += [AS_TEXT[kind["type"]] for kind in kinds if kind.get("type") in AS_TEXT]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _in_form(form: Form, responses: Mapping[str, Described]) -> dict[str, Described]:
    """Give the error responses the status codes and schema of another vendor's API."""
    made = {status: described for status, described in responses.items() if int(status) < 400}
    for status in sorted(responses.keys() - made.keys()):
        seen, _ = form({"status": int(status), "detail": "", "code": ""})
        failure = {
            "description": FAILURES[seen] if seen != 400 else BAD_REQUEST,
            "content": {JSON: {"schema": ref(FORMS[form])}},
        }
        made[str(seen)] = failure | with_headers(*OF_REFUSALS.get(seen, ()))
    return made


def _add(responses: dict[str, Described], *statuses: int) -> None:
    """Add error responses, unless the call already describes them."""
    for status, described in failures(*statuses).items():
        responses.setdefault(str(status), described)


def _complete(method: str, path: str, operation: Described, *, is_public: bool) -> None:
    """Add what all operations share: keys, origins, the API version and headers."""
    responses, form = operation["responses"], error_form(method, path)
    common = OF_ANY if form is None else OF_OTHERS
    if form is None and path not in PROBES:
        operation["parameters"] = [*operation.get("parameters", ()), {"$ref": "#/components/parameters/API-Version"}]
        _add(responses, 400)
    if path not in PROBES:
        _add(responses, 403)
    if is_public:
        operation["security"] = []
    else:
        _add(responses, 401, 429)
        common = (*common, *OF_QUOTA)
    if form is not None:
        responses = _in_form(form, responses)
    for described in responses.values():
        described["headers"] = described.get("headers", {}) | with_headers(*common)["headers"]
    for parameter in operation.get("parameters", ()):
        if parameter.get("in") == "path":
            parameter.setdefault("description", IN_PATHS[parameter["name"]])
    operation["responses"] = dict(sorted(responses.items()))


def document(
    app: FastAPI, contract: Contract, is_public: Callable[[str, str], bool], more: Mapping[str, Described]
) -> Described:
    """Return the OpenAPI document of an app, with the schemas of the contract and of `more`.

    is_public: returns True for a path and method that need no key. Every other call may also fail because the key is
    missing or its quota is used up.
    """
    made = app.openapi()
    made["components"]["schemas"] |= {**contract.components(), **more}
    made["components"]["securitySchemes"] = SCHEMES
    made["components"]["headers"] = of_headers.components()
    made["components"]["parameters"] = {"API-Version": VERSION_ASKED}
    made["tags"] = [{"name": name, "description": description} for name, description in TAGS.items()]
    made["webhooks"] = WEBHOOKS
    made["x-websockets"] = WEBSOCKETS
    made["security"] = [{}, *({name: []} for name in SCHEMES)]  # {} allows requests without a key
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(method.upper(), path, operation, is_public=is_public(path, method.upper()))
    return made
