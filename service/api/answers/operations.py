"""The names and descriptions of the calls in the OpenAPI document.

Routes get them from `described`, and the API reference page is generated from the document, so each text is written
only once. The descriptions of parameters are next to their checks, in api/request/schemas.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

API_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Operation:
    """The summary (one line) and the description of a call."""

    summary: str
    description: str = ""


def described(operation_id: str) -> dict[str, Any]:
    """Return the arguments that name and describe a route. Generated clients use the operation id as a name."""
    operation = OPERATIONS[operation_id]
    return {
        "operation_id": operation_id,
        "summary": operation.summary,
        "description": operation.description or f"{operation.summary}.",
    }


ABOUT = f"""\
Every error is a problem document (`application/problem+json`, RFC 9457) with a stable `code`. Calls below `/v1` and \
`/v2`, and the calls of Hugging Face's clients, answer errors in the form that their clients read.

**Models.** Each call below works on the server's default model. The same calls exist below `/models/NAME` for each \
model of the server, except those that are about the whole server: `/v1`, `/v2`, `/models`, `/batch`, `/key`, \
`/login`, `/logout`, `/health`, `/healthz`, `/readyz` and `/metrics`. \
`/models/NAME/openapi.json` has the bounds of that model.

**Version.** Native answers have `API-Version: {API_VERSION}`. A request may name the version that it was written \
for in the same header; a version that the server does not have is refused with 400, `unsupported_api_version`.

**HEAD** is answered for every GET, with the same headers and no body. `HEAD /sample` checks the request and runs \
nothing, so it has no headers of a job.

**Values** have one spelling. An integer is decimal digits (`50`; not `+50`, `5_0` or `50.0`). A number is written \
as in JSON (`0.5`, `1e-3`; not `.5`, `nan` or `inf`). A boolean is `true` or `false`. In JSON each may also be \
text, and up to 2^53 `50.0` counts as an integer. Where a list is allowed, a query or a form repeats the name; no \
other name may come twice. A parameter may be both in the query and in the body only with the same value. Unknown \
parameters are refused, except by the probes, `/metrics`, `/docs`, `/openapi.json` and the page, which ignore their \
query.

**Bodies.** A body of JSON has `Content-Type: application/json`, or none. A `Content-Encoding` other than `identity` \
is refused. `--max-image-bytes` bounds each image. The rest of a body may have 1 MiB, \
or an eighth of that if it is more.
"""

TAGS: Mapping[str, str] = {
    "sample": "Sample images from noise, or edit an image, and wait for the answer. `WS /sample/stream` does the same "
    "with live previews. `x-websockets` of the OpenAPI document has its messages.",
    "jobs": "Durable jobs finish even if the client disconnects or the server is killed.",
    "noise": "The forward process: from an image towards noise.",
    "models": "The models of the server, and how they are loaded and unloaded.",
    "keys": "Who the caller is, and how a page keeps a key. A key goes into `Authorization: Bearer KEY`.",
    "system": "How the server is doing.",
    "page": "The web page. `GET /openapi.json` is the OpenAPI document. `GET /docs` shows it, with forms to try "
    "the calls.",
    "openai": "OpenAI's Images API, for OpenAI's clients. Errors have OpenAI's form, and errors that are 422 elsewhere "
    "are 400 here.",
    "hugging face": "Hugging Face's inference API, for `InferenceClient`. Errors that are 422 elsewhere are 400 here.",
    "kserve": "KServe's open inference protocol, version 2. Errors that are 422 elsewhere are 400 here.",
}

MEDIA = """\
`Accept` chooses the form of the answer:

| media type | answer |
|---|---|
| `image/png` | the default: the image; for several one contact sheet, left to right, top to bottom, without gaps |
| `application/zip` | one PNG for each image, named by its index: `00000.png`, `00001.png`, … |
| `application/json` | one PNG for each image as base64, with its metadata; with `every` also the frames |
| `application/x-npy` | float32 [n, C, H, W], which NumPy's `load` reads |
| `application/vnd.tminus.trajectory` | x_t of every pass, or of those in `keep`, and log p of the steps that add \
noise, as safetensors |
| `image/webp` | only with `every`: an animation of the reverse process |
"""

LEFT_OUT = """\
What a request gets that leaves the sampler, the steps or the guidance out:

| given | sampler | steps | guidance |
|---|---|---|---|
| none of these | recommended | recommended | recommended |
| `sampler`, the recommended one | that one | recommended | recommended |
| `sampler`, another one | that one | its `good_steps` in `GET /model` | 1 |
| `steps` | `default_sampler` in `GET /model` | those | 1 |
| `sampler` and `steps` | that one | those | 1 |
| `table` | that of the table | those of the table | that of the table |

`recommended` in `GET /model` says what is recommended. Recommended guidance counts only where each image has a class \
and the model has a null class; otherwise it is 1. The answer says what was taken in `X-Sampler`, `X-Steps` and \
`X-Guidance`.
"""

OPERATIONS: Mapping[str, Operation] = {
    # --- sample ---
    "sample_images": Operation(
        "Sample, and answer when the images are done",
        "Put the parameters into the query, a JSON body or a form. With an image in the body it edits that image. If "
        "the connection breaks, the job is cancelled. An answer with `X-Warning` may not be what you want: with "
        "`steps=1`, `ddpm` and `ddim` in `leading` or `linspace` spacing visit timestep 0 alone, as in diffusers, and "
        "return noise. A job that another request deletes is answered 499, `cancelled`.\n\n"
        f"{MEDIA}\n{LEFT_OUT}",
    ),
    "sample_images_by_get": Operation(
        "Sample, with the parameters in the query",
        "The same as `POST /sample` without images in the request, for an `<img>`. With a given `seed` the answer has "
        "an `ETag`, and `If-None-Match` is answered 304 before any step runs.",
    ),
    "stream_samples": Operation(
        "Sample over a WebSocket, with live previews",
        "Runs a job as `POST /sample` does. The parameters are in a JSON object in a text message; the address takes "
        "none. A slow reader gets the newest frame, and older ones are dropped. If the client disconnects, its rows "
        "are free before the next step. A handshake that is refused is answered as over HTTP.",
    ),
    # --- noise ---
    "add_noise": Operation(
        "Bring an image to timestep t of the forward process",
        "The image is the body, or the file `image` of a form. The answer is x_t as a PNG.",
    ),
    # --- jobs ---
    "submit_job": Operation(
        "Submit a durable job",
        "Takes the parameters of `POST /sample`. The answer comes at once, when the job is on disk. Uploaded images "
        "are kept until the job ends. An `Idempotency-Key` makes a retry safe: the same key with the same parameters "
        "is the same job; with other parameters, or for another model, it is refused with 422. A key is kept as long "
        "as its job.",
    ),
    "list_jobs": Operation(
        "List the jobs, newest first",
        "Jobs of `POST /sample` and of streams are listed while they wait or run, with `durable` false. Below "
        "`/models/NAME` only jobs of that model are listed.",
    ),
    "get_job": Operation(
        "Get one job: its state, step, queue position and ETA",
        "A job that is not durable is found while it waits or runs. A job has two ids where the client chose one; both "
        "lead to it in every call.",
    ),
    "get_job_images": Operation(
        "Get the images of a durable job that is done, or one of them",
        "The bytes are the same as from `POST /sample`. `Accept` chooses PNG, zip or JSON, or `application/x-npy` "
        "where the job was submitted with `bit_depth=32`.",
    ),
    "watch_job": Operation(
        "Watch a durable job by server-sent events",
        "In the OpenAPI document, `x-events` of the answer lists the events. The last event of a step has the step as "
        "its id, and the final event has `end`. A client that reconnects with `Last-Event-ID`, as an `EventSource` "
        "does, gets only what is newer. Frames from the time between are not sent again; the final event is never "
        "missed. A comment every 15 s keeps proxies from closing the connection.",
    ),
    "cancel_job": Operation(
        "Cancel a durable job that has not ended",
        "Its rows are free before the next step. The answer is the job as it ended. A job that has ended stays as it "
        "is.",
    ),
    "delete_job": Operation(
        "Delete a job; one that has not ended is cancelled first",
        "One call frees the rows and everything that is kept of the job. A webhook is told nothing more; to have it "
        "told of the end, use `POST /jobs/{job_id}/cancel`.",
    ),
    "get_batch": Operation(
        "List what waits and runs now, with the timestep of each job",
        "For jobs that the caller may not see, `id` and `seed` are null. `number` tells such jobs apart.",
    ),
    # --- models ---
    "get_model": Operation(
        "Get what is loaded: architecture, T, samplers, classes, limits, hashes",
        "Read from it the bounds and defaults that depend on the model and on the server's settings.",
    ),
    "get_noise_schedule": Operation("Get alpha_bar_t and beta_t of every timestep"),
    "list_models": Operation(
        "List the models of the server", "The `url` of a model that can be loaded but is not served is null."
    ),
    "get_model_by_name": Operation("Get what `GET /model` says, of one model"),
    "load_model": Operation(
        "Load a model", "Needs a key of the role admin. The answer comes when the model is served."
    ),
    "reload_model": Operation(
        "Read a model's folder again",
        "Needs a key of the role admin. The answer comes when what is in the folder now is served.",
    ),
    "unload_model": Operation(
        "Unload a model",
        "Needs a key of the role admin. The jobs of the model are finished first. Where models are loaded on demand, "
        "the model is served again at its next request.",
    ),
    # --- keys ---
    "get_key": Operation("Get the name, role and limits of the key that was sent, and what is left of its quota"),
    "login": Operation("Keep a key in a cookie, for the page"),
    "logout": Operation("Forget the key in the cookie"),
    # --- system ---
    "get_liveness": Operation("Liveness: the process answers, and its worker runs"),
    "get_readiness": Operation(
        "Readiness: the server takes work",
        "A step has run, jobs can be stored (not asked of a PostgreSQL that servers share), the worker does not hang, "
        "and the server is not shutting down.",
    ),
    "get_health": Operation("Readiness, as `GET /readyz`", "Other inference servers have this path."),
    "get_metrics": Operation(
        "Get the metrics, for Prometheus",
        "Plain text, or OpenMetrics where `Accept` prefers it.",
    ),
    "get_page": Operation("Get the web page"),
    # --- Hugging Face ---
    "hugging_face_infer": Operation(
        "Sample a prompt that names a class, or edit a picture",
        "With `prompt` or `strength` among the parameters, `inputs` is a picture in base64, which is edited. Otherwise "
        "`inputs` is the prompt.",
    ),
    "hugging_face_infer_model": Operation("Do what `POST /` does, with one model"),
    # --- OpenAI ---
    "openai_generate_images": Operation("Sample, as OpenAI's clients ask for images"),
    "openai_edit_image": Operation("Edit an image, as OpenAI's clients ask for it"),
    "openai_list_models": Operation("List the models that are served, in OpenAI's form"),
    "openai_get_model": Operation("Get one model, in OpenAI's form"),
    # --- KServe ---
    "kserve_get_server": Operation("Get the name, version and extensions of the server"),
    "kserve_get_liveness": Operation("Liveness, in KServe's protocol"),
    "kserve_get_readiness": Operation("Readiness, in KServe's protocol"),
    "kserve_list_models": Operation("List the models, loaded or not"),
    "kserve_get_model": Operation("Get the tensors that a model takes and gives"),
    "kserve_get_model_readiness": Operation("Tell whether a model can be asked"),
    "kserve_get_model_config": Operation("Get a model in the terms of Triton's `model_config.proto`"),
    "kserve_infer": Operation("Sample, from tensors to tensors"),
    "kserve_get_model_version": Operation("Get the tensors of a model, if these weights are loaded"),
    "kserve_get_model_version_readiness": Operation("Tell whether a model can be asked, if these weights are loaded"),
    "kserve_get_model_version_config": Operation("Get the config of a model, if these weights are loaded"),
    "kserve_infer_version": Operation("Sample, if these weights are loaded"),
}
