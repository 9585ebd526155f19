"""What the OpenAPI document says of calls whose handlers read parameters and bodies themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from tminus.model.timesteps import SPACINGS
from tminus.service.api.answers.documents import ErrorText, Problem, SampleAnswer
from tminus.service.api.answers.problems import PROBLEM_JSON, as_error_text, form_of
from tminus.service.api.request.classes import DIGITS
from tminus.service.api.request.multipart import BYTES, FORM
from tminus.service.api.request.schemas import (
    CHOSEN,
    NUMBER,
    PICTURES,
    AnimationRequest,
    FloatsRequest,
    NoiseRequest,
    RequestSchema,
    SampleRequest,
    TrajectoryRequest,
    WebhookRequest,
    bit_depths,
)
from tminus.service.images.encoder import JSON, MEDIA_TYPES, NPY, WEBP
from tminus.service.images.trajectory import TRAJECTORY
from tminus.service.jobs.webhooks.webhook import EVENTS, MAX_URL
from tminus.service.model_info import Limits, ModelInfo

Described = dict[str, Any]  # a part of an OpenAPI document

FILE: Described = {"type": "string", "format": "binary"}
# In JSON a number may be text too, as a seed above 2^53 has to be in JavaScript.
AS_TEXT: Mapping[str, Described] = {
    "integer": {"type": "string", "pattern": f"^{DIGITS.pattern}$"},
    "number": {"type": "string", "pattern": f"^{NUMBER.pattern}$"},
    "boolean": {"type": "string", "enum": ["true", "false"]},
}
FAILURES = {
    400: "The body cannot be parsed",
    401: "The key is missing or wrong",
    403: "The key has not the role admin, or the server has no such key",
    404: "There is no such job or model",
    406: "Accept allows no media type that there is",
    408: "The body came too slowly",
    409: "The job is not done yet, and Retry-After says when to look again; or the id is another job's; or the model "
    "cannot be changed now",
    410: "The job was cancelled or failed, and has no images",
    413: "The body is too large",
    415: "The body is compressed, or of no type that is taken",
    422: "A parameter is invalid, unknown or given twice",
    429: "Too much is asked for at once; Retry-After, where it is, says when there should be room",
    500: "The server failed",
    503: "The server is starting or shutting down",
    504: "deadline_s passed before the job was done",
    507: "The job store failed; Retry-After, where it is, says when to try again",
}
SCHEMES: Described = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "a key of this server"},
    "cookie": {"type": "apiKey", "in": "cookie", "name": "tminus_key", "description": "that POST /login sets"},
}
OF_BODY, OF_WORK = (400, 413, 415, 422, 429), (500, 503, 504)


def ref(component: str) -> Described:
    """Refer to a component."""
    return {"$ref": f"#/components/schemas/{component}"}


def failures(*statuses: int) -> dict[int | str, Described]:
    """Describe the problem documents of a call, by status."""
    content = {PROBLEM_JSON: {"schema": ref("Problem")}}
    return {status: {"description": FAILURES[status], "content": content} for status in statuses}


def answer(description: str, *media_types: str) -> Described:
    """Describe an answer that comes in one of these media types."""
    schemas = {JSON: ref("SampleAnswer")}
    return {"description": description, "content": {kind: {"schema": schemas.get(kind, FILE)} for kind in media_types}}


def path_parameter(name: str) -> Described:
    """Describe a part of a path that the handler reads itself."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _header(name: str, schema: Described, description: str) -> Described:
    return {"name": name, "in": "header", "schema": schema, "description": description}


# What a job's answer says that the request may have left out.
WHAT_WAS_TAKEN: Described = {
    "headers": {
        "X-Seed": {"schema": {"type": "integer"}, "description": "the seed, given or drawn"},
        "X-Sampler": {"schema": {"type": "string"}, "description": "the sampler that was taken"},
        "X-Steps": {"schema": {"type": "integer"}, "description": "how many steps were taken"},
        "X-Guidance": {"schema": {"type": "number"}, "description": "the guidance that was taken; 1.0 is off"},
    }
}
IMAGES = answer("The images", *MEDIA_TYPES) | WHAT_WAS_TAKEN
IMAGES_OR_FLOATS = answer("The images", *MEDIA_TYPES, NPY) | WHAT_WAS_TAKEN
IMAGES_OR_STEPS = answer("The images", *MEDIA_TYPES, NPY, TRAJECTORY, WEBP) | WHAT_WAS_TAKEN
NOT_MODIFIED: Described = {"description": "The client has it: If-None-Match names this answer's ETag"}
ACCEPTED: Described = {
    "description": "With Prefer: respond-async: a durable job; Location says where",
    "content": {JSON: {"schema": ref("JobAnswer")}},
    **WHAT_WAS_TAKEN,
}
ALREADY_HERE: Described = {
    "description": "The job that this request has made before, as it stands",
    "content": {JSON: {"schema": ref("JobAnswer")}},
}
CHOSEN_ID: Described = {
    "name": "job_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "format": "uuid", "pattern": f"^{CHOSEN.pattern}$"},
    "description": "a UUID; the same one with the same parameters is the same job",
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
LOGIN_BODY: Described = {
    "required": True,
    "content": {
        JSON: {
            "schema": {
                "type": "object",
                "properties": {"key": {"type": "string", "maxLength": 512}},
                "required": ["key"],
                "additionalProperties": False,
            }
        }
    },
}
IF_NONE_MATCH = _header("If-None-Match", {"type": "string"}, "ETags of answers that the client has")
PREFER = _header(
    "Prefer", {"type": "string"}, "respond-async: do as POST /jobs, Idempotency-Key and all, instead of waiting"
)
IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    {"type": "string", "minLength": 1, "maxLength": 257},  # two may be quotes around it
    "makes a retry safe: the same key and parameters are the same job",
)
WEBHOOKS: Described = {
    "job": {
        "post": {
            "summary": "What a job's webhook is sent, signed as Standard Webhooks has it",
            "parameters": [
                _header("webhook-id", {"type": "string"}, "the event and a UUID; the same in each attempt"),
                _header("webhook-timestamp", {"type": "string"}, "of this attempt: Unix time in seconds"),
                _header("webhook-signature", {"type": "string"}, "v1, and base64 of an HMAC-SHA256; or several"),
            ],
            "requestBody": {"required": True, "content": {JSON: {"schema": ref("JobAnswer")}}},
            "responses": {
                "2XX": {"description": "It is delivered"},
                "410": {"description": "It is given up"},
                "default": {"description": "It is sent again later"},
            },
        }
    }
}
LAST_EVENT_ID = _header("Last-Event-ID", {"type": "string"}, "what was received last; only what is newer is sent")


@dataclass(frozen=True, slots=True)
class Contract:
    """The schemas of requests, with the bounds that the model and the settings have."""

    model: ModelInfo
    limits: Limits

    def query(self, *schemas: type[RequestSchema]) -> list[Described]:
        """Describe the parameters that these schemas have in a query; pictures and secrets have no place there."""
        return [
            {"name": name, "in": "query", "schema": field, "description": field.pop("description")}
            for schema in schemas
            for name, field in self.fields(schema, as_text=True).items()
            if name not in (*PICTURES, "webhook")
        ]

    def components(self) -> dict[str, Described]:
        """Make the components that the rest refers to."""
        of_sample = (SampleRequest, AnimationRequest, TrajectoryRequest, FloatsRequest, WebhookRequest)
        _, answers = models_json_schema(
            [(each, "serialization") for each in (Problem, ErrorText, SampleAnswer)],
            ref_template="#/components/schemas/{model}",
        )
        return {
            **answers["$defs"],
            "Sampler": {"type": "string", "enum": list(self.model.samplers)},
            "TimestepSpacing": {"type": "string", "enum": list(SPACINGS)},
            "SampleRequest": self._body("What to sample.", *of_sample),
            "JobRequest": self._body("What a durable job is to sample.", SampleRequest, WebhookRequest),
            "SampleForm": self._form("The same, with images as files.", PICTURES, *of_sample),
            "JobForm": self._form("The same, with images as files.", PICTURES, SampleRequest, WebhookRequest),
            "NoiseForm": self._form("An image, and how much noise.", ("image",), NoiseRequest)
            | {"required": ["image"]},
        }

    def _body(self, description: str, *schemas: type[RequestSchema]) -> Described:
        fields = [self.fields(schema) for schema in schemas]
        return closed_object(description, {name: field for each in fields for name, field in each.items()})

    def _form(self, description: str, files: tuple[str, ...], *schemas: type[RequestSchema]) -> Described:
        fields = [self.fields(schema, as_text=True) for schema in schemas]
        properties = {name: field for each in fields for name, field in each.items()}
        described = {name: {"description": properties.get(name, {}).get("description", "the image")} for name in files}
        return closed_object(description, properties | {name: FILE | described[name] for name in files})

    def fields(
        self,
        schema: type[RequestSchema],
        *,
        as_text: bool = False,
        bounds: Mapping[str, dict[str, Described]] | None = None,
    ) -> dict[str, Described]:
        """Describe the fields of a schema, as text (of a query or a form) or as JSON.

        bounds: what narrows its fields where that is not as for POST /sample.
        """
        bounds, fields = {**self._bounds(), **(bounds or {})}, {}
        for name, field in schema.model_json_schema()["properties"].items():
            # Without its default, which a generated client would send, in the query beside the body.
            fields[name] = _field(field, bounds.get(name, {}), as_text=as_text) | {"description": field["description"]}
        return fields

    def _bounds(self) -> dict[str, dict[str, Described]]:
        """Say what narrows a field beside the bounds that it declares, by the type that it narrows."""
        last, classes = self.model.num_timesteps - 1, len(self.model.class_names)
        return {
            "n": {"integer": {"minimum": 1, "maximum": self.limits.max_n}},
            "steps": {"integer": {"minimum": 1, "maximum": self.model.num_timesteps}},
            "sampler": {"string": ref("Sampler")},
            "class_label": {
                "integer": {"minimum": 0, "maximum": max(0, classes - 1)},
                "array": {"minItems": 1, "maxItems": self.limits.max_n},
            },
            "bit_depth": {"integer": {"enum": list(bit_depths(self.model))}},
            "guidance_interval": {
                "integer": {"minimum": 0, "maximum": last},
                "array": {"minItems": 2, "maxItems": 2},
            },
            "keep": {
                "integer": {"minimum": 0, "maximum": last},
                "array": {"minItems": 1, "maxItems": last + 1, "uniqueItems": True},
            },
            "timestep_spacing": {"string": ref("TimestepSpacing")},
            "t": {"integer": {"minimum": 0, "maximum": last}},
            "webhook": {"string": {"format": "uri", "maxLength": MAX_URL}},
            "webhook_events_filter": {
                "string": {"enum": list(EVENTS)},
                "array": {"minItems": 1, "maxItems": len(EVENTS), "uniqueItems": True},
            },
            "show": {"array": {"minItems": 1, "maxItems": 2, "uniqueItems": True}},
        }


def closed_object(description: str, properties: dict[str, Described]) -> Described:
    """Describe a JSON object that has these members and no others."""
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


KEPT = ("type", "format", "pattern", "enum", "minimum", "maximum", "exclusiveMinimum")


def _field(field: Described, bounds: Mapping[str, Described], *, as_text: bool) -> Described:
    """Narrow each of a field's types. As text there is no null; as JSON numbers and truth values may be text."""
    kinds: list[Described] = []
    for kind in field.get("anyOf", [field]):
        name = kind["type"]
        if name == "null" and as_text:
            continue
        narrow = bounds.get(name, {})
        kept = {key: kind[key] for key in KEPT if key in kind}
        if name == "array":
            kept["items"] = _field(kind["items"], bounds, as_text=as_text)
        kinds.append(narrow if "$ref" in narrow else kept | narrow)
    if not as_text and not any(kind.get("type") == "string" for kind in kinds):
        kinds += [AS_TEXT[kind["type"]] for kind in kinds if kind.get("type") in AS_TEXT]
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _with_error_texts(responses: Mapping[str, Described]) -> dict[str, Described]:
    """Describe failures with the status and the schema that clients of Hugging Face and KServe read."""
    made = {status: described for status, described in responses.items() if int(status) < 400}
    for status in sorted(responses.keys() - made.keys()):
        seen, _ = as_error_text({"status": int(status), "detail": "", "code": ""})
        made[str(seen)] = {"description": FAILURES[seen], "content": {JSON: {"schema": ref("ErrorText")}}}
    return made


def document(
    app: FastAPI, contract: Contract, is_public: Callable[[str, str], bool], more: Mapping[str, Described]
) -> Described:
    """Make the document of an app whose routes refer to the contract's components, and to more.

    is_public: whether a path, and a method, is answered to anybody; others may be refused for want of a key, or by its
    quota.
    """
    made = app.openapi()
    made["components"]["schemas"] |= {**contract.components(), **more}
    made["components"]["securitySchemes"] = SCHEMES
    made["webhooks"] = WEBHOOKS
    made["security"] = [{}, *({name: []} for name in SCHEMES)]  # where the server is open, no key is needed
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            if not is_public(path, method.upper()):
                operation["responses"] |= {
                    str(status): described
                    for status, described in failures(401, 429).items()
                    if str(status) not in operation["responses"]
                }
            if form_of(method.upper(), path) is as_error_text:
                operation["responses"] = _with_error_texts(operation["responses"])
    return made
