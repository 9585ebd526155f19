"""Hugging Face's inference API for text-to-image and image-to-image: POST to the URL of the server or of a model.

Based on huggingface_hub: inference/_providers/hf_inference.py, and TextToImageParameters in its generated types. Its
InferenceClient posts to exactly the URL of a model, for both tasks, and reads the response body as an image. In a
text-to-image request, `inputs` is the prompt. In an image-to-image request, `inputs` is the picture, and the prompt is
one of the parameters.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from tminus.model.scheduler_kinds import CLASS_NAMES, FAMILY_OF, scheduler_kind
from tminus.service.api.answers.openapi import (
    BODY_ERRORS,
    IF_NONE_MATCH,
    IMAGES,
    WORK_ERRORS,
    Contract,
    Described,
    closed_object,
    failures,
    path_parameter,
)
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.classes import class_label_of, class_of_prompt
from tminus.service.api.request.reading import check_encoding, negotiate, no_parameters, parse_call, read_json
from tminus.service.api.request.schemas import (
    DIFFUSERS_NAMES,
    EDIT_PARAMETERS,
    SampleRequest,
    by_our_names,
    check_names,
    named_as_given,
)
from tminus.service.api.sample import respond, still
from tminus.service.api.submission import prepare_job
from tminus.service.errors import InvalidField, MalformedBody
from tminus.service.images.encoder import JSON, MEDIA_TYPES
from tminus.service.model_info import ModelInfo

PATH = "/"  # root of a model's API; at the root of the server, the default model's
BARE_PATH = "/models/{model}"  # path of a model, without the trailing slash
NAMES = {**DIFFUSERS_NAMES, "num_images_per_prompt": "n", "scheduler": "sampler"}  # Hugging Face's name: our name
# Our own parameters, which a request may also contain. class_label is not among them, because the prompt replaces it.
OURS = tuple(name for name in SampleRequest.model_fields if name not in EDIT_PARAMETERS | {"class_label"})
CHECKED = ("width", "height", "target_size", "negative_prompt")
KNOWN = (*NAMES, *CHECKED, *OURS)
# A request with either of these is image-to-image. `strength` is our own parameter, but Hugging Face's client can send
# any name.
OF_EDITS = ("prompt", "strength")


def hugging_face_routes(models: Models, contract: Contract, path: str = PATH) -> APIRouter:
    """Return a router with POST `path`."""
    router = APIRouter(tags=["hugging face"])
    of_path = [path_parameter("model")] if path == BARE_PATH else []
    router.post(
        path,
        **described("hugging_face_infer_model" if of_path else "hugging_face_infer"),
        response_class=Response,
        responses={
            200: IMAGES,
            **failures(406, 412, *BODY_ERRORS, *WORK_ERRORS, *([404] if of_path else [])),
        },
        openapi_extra={
            "parameters": [*of_path, IF_NONE_MATCH],
            "requestBody": {"required": True, "content": {JSON: {"schema": _described(contract)}}},
        },
    )(models.handler(text_to_image, "text_to_image"))
    return router


async def text_to_image(services: Services, request: Request) -> Response:
    """Respond as POST /sample does, with images for a prompt, or for a picture and a prompt."""
    media_type = negotiate(request, MEDIA_TYPES)
    await no_parameters(request)
    check_encoding(request)
    try:
        body = await read_json(request, services.limits.max_body_bytes, None)
    except MalformedBody as error:  # Hugging Face's client sends raw bytes for a picture without parameters
        raise MalformedBody(f"{error.detail}; a picture is its inputs, beside prompt and strength") from None
    parameters, given_as = parameters_of(body, services.model)
    del body  # frees the picture, if any
    with named_as_given(given_as):
        asked = await parse_call(SampleRequest, parameters, services.bounds)
        del parameters
        services, new = await prepare_job(services, caller_of(request), asked, request)
        return await respond(services, request, new, still(media_type, new.spec, services.model))


def parameters_of(body: Mapping[str, Any], model: ModelInfo) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert a request body to parameters of POST /sample.

    Returns the parameters, and the body's name for each parameter, keyed by our name. Raises InvalidField, UnknownField
    or ConflictingField.
    """
    check_names(body, ("inputs", "parameters"))
    given, inputs = body.get("parameters", {}), body.get("inputs")
    if not isinstance(given, dict):
        raise InvalidField.of("parameters", "a JSON object", given)
    is_edit = not given.keys().isdisjoint(OF_EDITS)
    field, prompt = ("prompt", given.get("prompt", "")) if is_edit else ("inputs", inputs)
    if not isinstance(prompt, str):
        raise InvalidField.of(field, "text: the name of a class, or empty", prompt)
    check_names(given, (*KNOWN, *OF_EDITS))
    parameters, given_as = by_our_names(given, NAMES)
    for name in CHECKED:
        if name in parameters:
            _check(name, parameters.pop(name), model)
    if "scheduler" in given:
        parameters["sampler"] = _sampler(given["scheduler"], model)
    if is_edit:
        parameters.pop("prompt", None)
        parameters["image"] = inputs
    label = class_label_of(class_of_prompt(prompt, model, field), model.class_names)
    return parameters if label is None else parameters | {"class_label": label}, given_as | {"image": "inputs"}


def _sampler(scheduler: object, model: ModelInfo) -> str:
    """Return the sampler for `scheduler`: the name of a sampler, or of a diffusers class (with default settings)."""
    known = _samplers(model)
    if not isinstance(scheduler, str) or scheduler not in known:
        raise InvalidField.of("scheduler", f"one of {', '.join(known)}", scheduler)
    return known[scheduler]


def _samplers(model: ModelInfo) -> dict[str, str]:
    """Return the model's samplers, keyed by their own names and by the names of diffusers classes."""
    known = {name: name for name in model.samplers}
    for name in CLASS_NAMES:
        try:
            kind = scheduler_kind(name, {})
        except ValueError:  # no sampler matches this class with its default settings
            continue
        # Classes for EDM or flow matching fit only models of that kind. All other classes fit every model.
        if kind.sampler in model.samplers and kind.family in ("betas", "consistency", FAMILY_OF[model.prediction_type]):
            known[name] = kind.sampler
    return known


def _check(name: str, value: object, model: ModelInfo) -> None:
    """Raise InvalidField if the request asks for another image size or for a class to avoid."""
    size = {"width": model.width_px, "height": model.height_px}
    if name == "negative_prompt":
        if value != "":
            raise InvalidField.of(name, "absent or empty: no class can be avoided", value)
    elif name == "target_size":
        if value != size:
            raise InvalidField.of(name, f"the model's own size, {size}", value)
    elif value != size[name] or isinstance(value, bool):  # in Python, True == 1
        raise InvalidField.of(name, f"{size[name]}, as all images of this model are", value)


def _described(contract: Contract) -> Described:
    model, fields = contract.model, contract.fields(SampleRequest)
    size = {
        name: {"type": "integer", "enum": [px]} for name, px in (("width", model.width_px), ("height", model.height_px))
    }
    parameters = {
        **{theirs: fields[ours] for theirs, ours in NAMES.items()},
        **size,
        "target_size": closed_object("The model's own size.", size) | {"required": list(size)},
        "negative_prompt": {"type": "string", "maxLength": 0},
        "scheduler": {"type": "string", "enum": list(_samplers(model))},
        **{name: fields[name] for name in OURS},
        "strength": fields["strength"],
    }
    prompt, words = {"type": "string"}, "A class by name or number; empty for no class."
    inputs = prompt | {"description": f"{words} Or the picture to edit, in base64."}
    parameters["prompt"] = prompt | {"description": "The prompt, where `inputs` is a picture."}
    inside = closed_object("Hugging Face's parameters, and those of `POST /sample`.", parameters)
    return closed_object("A prompt, or a picture.", {"inputs": inputs, "parameters": inside}) | {"required": ["inputs"]}
