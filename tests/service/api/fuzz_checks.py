"""A check of ours for schemathesis, which imports it by SCHEMATHESIS_HOOKS."""

import schemathesis

# A schema cannot say which parameters go together, what is in an image or a class's name, nor the bounds of a number
# that is text in JSON.
NOT_IN_A_SCHEMA = {
    "bit_depth", "class_label", "clip_output", "deadline_s", "dtype", "eta", "every", "fps", "guidance",
    "guidance_interval", "guidance_rescale", "Idempotency-Key", "image", "keep", "mix", "nearest", "table", "to_seed",
    "image_sha256", "index", "mask", "mask_sha256", "show", "strength", "t", "until", "webhook",
    "output_compression", "output_format", "partial_images", "prompt", "response_format", "size",  # of /v1
    "inputs", "guidance_scale",  # of Hugging Face's
}  # fmt: skip


@schemathesis.check
def a_valid_parameter_is_refused_only_by_what_no_schema_can_say(
    _context: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    if case.path.startswith("/v2/"):  # what a tensor holds is in no schema
        return
    if response.status_code in (400, 422) and case.meta is not None and case.meta.generation.mode.is_positive:
        document, body = response.json(), case.body if isinstance(case.body, dict) else {}
        if isinstance(body.get("parameters"), dict):  # of Hugging Face's
            body = body["parameters"]
        below_v1 = isinstance(document.get("error"), dict)
        error = document["error"] if below_v1 else document
        field = error["param" if below_v1 else "field"] if error["code"] == "invalid_field" else None
        if error["code"] == "invalid_field" and not isinstance(body.get(field), str):
            assert field in NOT_IN_A_SCHEMA, response.text


@schemathesis.hook
def filter_body(context: schemathesis.HookContext, body: object) -> bool:
    """Leave out forms with an empty list: nothing of it is sent, so that the server cannot refuse it."""
    of_form = context.operation is not None and context.operation.path == "/noise"
    return not (of_form and isinstance(body, dict) and any(value == [] for value in body.values()))
