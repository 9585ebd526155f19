"""The errors of the service. Each error has an HTTP status and a stable code.

An error's docstring says when the error occurs, and its `remedy` says what to do. The docs' page of errors is generated
from both, so both are Markdown with links relative to docs/.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

# SECRET matches the secrets that `tminus key` makes. With the prefix tm_, a secret matches in upper or lower case and
# after any text, but link parameters such as utm_source do not match. Without the prefix, a secret is 43 characters of
# base64url with both upper and lower case. Names and hashes of that length do not mix cases.
UTM = "source|medium|campaign|term|content|id|source_platform|creative_format|marketing_tactic"
SECRET = re.compile(
    rf"(?i:tm_(?!(?<=utm_)(?:{UTM})(?![\w-]))[\w-]+)|(?<![\w-])(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[\w-]{{43,}}", re.ASCII
)
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|lowbar|UnderBar);\Z", re.ASCII)
ENTITY_CHARACTERS = 11
LONGEST_SECRET = 3 * 46  # characters of a secret that is fully percent-encoded
MOST_FAULTS = 20  # maximum number of errors in one problem document
HEX = frozenset("0123456789abcdefABCDEF")


class ServiceError(Exception):
    """Something unexpected happened in the server."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    remedy: ClassVar[str] = "Look at the log of the server, which has the reason."
    detail: str = "something went wrong on the server; its log has the details"
    retry_after_s: int | None = None  # None if unknown
    of_parameters: ClassVar[bool] = False  # True if a parameter is wrong; `errors` then lists every wrong parameter
    refusal: ClassVar[bool] = True  # True if tminus_rejected_total counts the error

    @property
    def ws_close(self) -> int:
        """Return the WebSocket close code (RFC 6455, section 7.4.1)."""
        if self.status in (429, 503):
            return 1013
        if self.status == 413:
            return 1009
        return 1011 if self.status >= 500 else 1008

    def __init__(
        self,
        detail: str | None = None,
        *,
        field: str | None = None,
        value: object = None,
        bound: str | None = None,
        retry_after_s: int | None = None,
    ):
        """Create an error with the members of its problem document.

        detail: text for people; the default is the class's `detail`. field: name of the wrong parameter. value: the
        value received. bound: the values allowed.
        """
        self.detail, self.field, self.value, self.bound = detail or self.detail, field, value, bound
        super().__init__(self.detail)
        self.headers: dict[str, str] = {}
        self.retry_after_s = retry_after_s or self.retry_after_s
        if self.retry_after_s is not None:
            self.headers["Retry-After"] = str(self.retry_after_s)
        self.others: tuple[ServiceError, ...] = ()  # errors of other parameters in the same request

    def problem(self) -> dict[str, Any]:
        """Return the members of the problem document."""
        members = {
            "type": f"urn:tminus:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            **self.fault(),
        }
        if self.of_parameters:
            members["errors"] = [each.fault() for each in (self, *self.others)[:MOST_FAULTS]]
        return members

    def fault(self) -> dict[str, Any]:
        """Return the members that describe the error, and the wrong parameter if there is one."""
        members: dict[str, Any] = {"code": self.code, "detail": masked(self.detail)}
        if self.field is not None:
            members |= {"field": short(self.field), "value": short(self.value)}
            if self.bound is not None:
                members["bound"] = self.bound
        return members


class ValidationErrors:
    """Collects the first error of each parameter in one request or message."""

    def __init__(self) -> None:
        self._found: dict[str | None, ServiceError] = {}  # keyed by field name

    def has(self, *fields: str) -> bool:
        """Return True if any of these fields has an error."""
        return any(field in self._found for field in fields)

    def __iter__(self) -> Iterator[str]:
        return (field for field in self._found if field is not None)

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, error: ServiceError) -> None:
        """Add an error and its `others`. Only the first error of each field is kept."""
        for each in (error, *error.others):
            self._found.setdefault(each.field, each)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect a parameter error that the `with` block raises. Other errors propagate."""
        try:
            yield
        except ServiceError as error:
            if not error.of_parameters:
                raise
            self.add(error)

    def check(self) -> None:
        """Raise the collected errors, if any."""
        if self._found:
            self.raise_all()

    def raise_all(self) -> NoReturn:
        """Raise the first collected error, with the rest in its `others`."""
        first, *others = self._found.values()
        first.others = tuple(others)
        raise first from None


# Pydantic collects only ValueErrors, so errors that its validators raise are ValueErrors too.


class InvalidField(ServiceError, ValueError):
    """A parameter has the wrong type or a value that is not allowed.

    The value may be out of bounds. It may also be valid only with another model, other parameters or another `Accept`
    header.
    """

    status, code, title, of_parameters = 422, "invalid_field", "A parameter is invalid", True
    remedy = "Change the parameter in `field` to what `bound` says."

    @classmethod
    def of(cls, field: str, bound: str, value: object) -> "InvalidField":
        return cls(f"{field} must be {bound}, got {short(value)!r}", field=field, value=value, bound=bound)


class UnknownField(ServiceError):
    """There is no parameter with this name, or a form has no file with this name."""

    status, code, title, of_parameters = 422, "unknown_field", "There is no such parameter", True
    remedy = "Remove or rename it. `bound` lists the names that exist."

    @classmethod
    def of(cls, field: str, known: Iterable[str], value: object) -> "UnknownField":
        names = ", ".join(known) or "none"
        detail = f"there is no parameter {short(field)!r}; known: {names}"
        return cls(detail, field=field, value=value, bound=f"one of {names}")


class ConflictingField(ServiceError):
    """A parameter has two values.

    For example, the query and the body both contain the parameter, a parameter that is not a list is repeated, or a
    parameter is sent under two of its names. Two images in one request also cause this error.
    """

    status, code, title, of_parameters = 422, "conflicting_field", "A parameter has two values", True
    remedy = "Send the parameter once."


class MalformedBody(ServiceError):
    """The body is not a JSON object, or it has more than 4096 lists, objects and members in total."""

    status, code, title = 400, "malformed_body", "The body is not a JSON object"
    remedy = "Correct the body."


class MalformedForm(ServiceError):
    """A form is malformed or over a limit.

    The form cannot be parsed, ends before its last boundary, has too many parts, or has a field that is too long.
    """

    status, code, title = 400, "malformed_form", "The body is not a form"
    remedy = "Correct the form."


class UnsupportedVersion(ServiceError):
    """The `API-Version` header names a version that this server does not have."""

    status, code, title = 400, "unsupported_api_version", "The server does not have this version of the API"
    remedy = "Ask for the version in `bound`, or leave the header out; see [the API version](api-version.md)."

    def __init__(self, asked: str, bound: str) -> None:
        detail = f"API-Version must be {bound}, or absent, got {short(asked)!r}"
        super().__init__(detail, field="API-Version", value=asked, bound=bound)


class PreconditionFailed(ServiceError):
    """The `If-None-Match` header of a POST names the `ETag` of the answer.

    The client already has the answer, so the request was not run.
    """

    status, code, title = 412, "precondition_failed", "The client has this answer already"
    remedy = "Use the answer that you have."
    refusal = False

    def __init__(self, etag: str) -> None:
        bound = "an ETag of another answer, or absent"
        detail = f"the answer has the ETag {etag}, which If-None-Match names"
        super().__init__(detail, field="If-None-Match", value=etag, bound=bound)


class UnsupportedMediaType(ServiceError):
    """The call does not take a body of this `Content-Type`."""

    status, code, title = 415, "unsupported_media_type", "The media type of the body is not supported"
    remedy = "Set the `Content-Type` to one that `bound` or `detail` lists, and send such a body."

    @classmethod
    def of(cls, declared: str, taken: Iterable[str]) -> "UnsupportedMediaType":
        """Return an error that lists the supported types. Its Accept header lists them too (RFC 9110, 15.5.16)."""
        names = [*taken]
        bound = " or ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)
        detail = f"Content-Type must be {bound}, got {short(declared)!r}"
        error = cls(detail, field="Content-Type", value=declared, bound=bound)
        error.headers["Accept"] = ", ".join(names)
        return error


class UnsupportedEncoding(ServiceError):
    """The body is compressed: its `Content-Encoding` is not `identity`."""

    status, code, title = 415, "unsupported_encoding", "The body is compressed"
    remedy = "Send the body without compression."

    def __init__(self, encoding: str) -> None:
        bound = "identity, or absent"
        detail = f"Content-Encoding must be {bound}, got {short(encoding)!r}"
        super().__init__(detail, field="Content-Encoding", value=encoding, bound=bound)
        self.headers["Accept-Encoding"] = "identity"


class InvalidImage(ServiceError, ValueError):
    """An image or a mask cannot be used.

    The image may be missing from the form, not valid base64, not a PNG, JPEG or WebP, broken, too large or animated. A
    mask may have transparency and no white pixel; see [editing](editing.md).
    """

    status, code, title, of_parameters = 422, "invalid_image", "The image is invalid", True
    remedy = "Send an image as `bound` describes it."

    @classmethod
    def of(cls, field: str, bound: str, got: str) -> "InvalidImage":
        return cls(f"{field} must be {bound}, got {short(got)}", field=field, value=got, bound=bound)


class MalformedMessage(ServiceError):
    """A WebSocket message is not a JSON object as text, or is not allowed at this point of the exchange.

    The connection closes.
    """

    status, code, title = 400, "malformed_message", "The message is not understood"
    remedy = "Correct the message; see [streaming](streaming.md)."


class Silence(ServiceError):
    """A WebSocket client sent no request for too long, and the connection closes.

    The first request must come within ten seconds, and each further request within a minute after the last job.
    """

    status, code, title = 408, "silence", "The client asked for nothing"
    remedy = "Send the request as soon as the connection is open, and connect again for the next job."
    refusal = False


class ForeignHost(ServiceError):
    """The `Host` header has a name that the server does not know."""

    status, code, title = 403, "foreign_host", "The server does not know this host name"
    remedy = "Add the name to [`--allowed-hosts`](reference/settings.md#allowed-hosts)."


class ForeignOrigin(ServiceError):
    """A web page of another site sent a request that costs work, changes something or shows jobs.

    The server detects this by the headers `Origin`, `Sec-Fetch-Site` and `Referer`.
    """

    status, code, title = 403, "foreign_origin", "Pages of this origin may not use the server"
    remedy = "Add the origin of the page to [`--allowed-origins`](reference/settings.md#allowed-origins)."


class TooManyStreams(ServiceError):
    """Too many WebSockets and event streams are open, from one address or in total.

    If a proxy does not send `X-Forwarded-For`, all its clients count as one address.
    """

    status, code, title = 429, "too_many_streams", "Too many streams are open"
    remedy = (
        "Close a stream, or raise [`--max-streams-per-address`](reference/settings.md#max-streams-per-address) or "
        "[`--max-connections`](reference/settings.md#max-connections)."
    )

    def __init__(self, bound: str, limit: int) -> None:
        super().__init__(f"{bound} may be open", field="streams", value=limit + 1, bound=bound, retry_after_s=1)


class MalformedRequest(ServiceError):
    """The request is not HTTP/1.1, or breaks a limit on its headers or chunks.

    The request line and headers may have at most 16 KiB, and the body at most 1,024 chunks plus one for each 64 bytes.
    A WebSocket handshake may have neither a body nor control characters. After these errors, the connection closes. A
    request with two `Idempotency-Key` headers is also refused with this error.
    """

    status, code, title = 400, "malformed_request", "The request is not valid HTTP"
    remedy = "Correct the request."


class TooManyHeaders(ServiceError):
    """A WebSocket handshake has more than 128 headers, or a header over 8 KiB. The connection closes."""

    status, code, title = 431, "too_many_headers", "The head is too large"
    remedy = "Send fewer or shorter headers."


class SlowHead(ServiceError):
    """The request line and headers of a request did not arrive within ten seconds. The connection closes."""

    status, code, title = 408, "slow_head", "The head took too long"
    remedy = "Send the head at once."

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the head of a request must arrive within {limit_s:g} s")


class SlowBody(ServiceError):
    """For ten seconds, a body arrived at less than 8 KiB a second.

    The server does not read the rest of the body, and the connection closes.
    """

    status, code, title = 408, "slow_body", "The body arrives too slowly"
    remedy = "Send the body faster, or send less."

    def __init__(self, bytes_per_s: int, window_s: float) -> None:
        super().__init__(f"a body must bring at least {bytes_per_s} bytes a second in every {window_s:g} s")
        self.headers["Connection"] = "close"


class BodyTooLarge(ServiceError):
    """An image or the rest of the body is over its size limit.

    The limit of an image is [`--max-image-bytes`](reference/settings.md#max-image-bytes). The limit of the rest is 1
    MiB, or an eighth of `--max-image-bytes` if that is more. The server does not read the rest of the body, and the
    connection closes after the answer.
    """

    status, code, title = 413, "body_too_large", "The body is too large"
    remedy = "Send less, or raise the limit."

    def __init__(self, received: int, limit: int, field: str = "body"):
        bound = f"at most {limit} bytes"
        super().__init__(f"{field} must be {bound}, got {received} or more", field=field, value=received, bound=bound)
        self.headers["Connection"] = "close"  # so the client need not send the rest of the body


class TooManyBytes(ServiceError):
    """The clients together, or one key, are sending or reading too much.

    The server holds at most 256 MiB each of request bodies, of uploads that wait to be decoded, and of answers. One key
    may take three quarters of the bytes that other keys leave free. Bodies up to 64 KiB are always accepted. The
    connection closes; a WebSocket closes with code 1013, and an event stream ends.
    """

    status, code, title = 429, "too_many_bytes", "Too much is being sent at once"
    remedy = "Try again after the seconds in `Retry-After`."
    retry_after_s = 1

    def __init__(self, held: int, limit: int, *, of_caller: bool = False):
        bound, whose = f"at most {limit} bytes", "one caller's bodies" if of_caller else "bodies"
        super().__init__(f"{whose} held at once must be {bound}, got {held}", field="body", value=held, bound=bound)
        self.headers["Connection"] = "close"


class TooManyImages(ServiceError):
    """The image would wait over ten seconds to be decoded.

    Keys take turns, so an image mainly waits for other images of the same key.
    """

    status, code, title = 429, "too_many_images", "Too many images wait to be decoded"
    remedy = "Try again after the seconds in `Retry-After`."

    def __init__(self, wait_s: float, limit_s: float) -> None:
        detail = f"the uploads before this one take {wait_s:.1f} s to decode; at most {limit_s:g} s is waited"
        value, bound = round(wait_s, 1), f"at most {limit_s:g} s"
        super().__init__(detail, field="image", value=value, bound=bound, retry_after_s=math.ceil(wait_s))


class NotAcceptable(ServiceError):
    """The `Accept` header allows none of the media types that this call can return.

    [The API](reference/api.md) lists them. The images of a durable job are available as `application/x-npy` only if the
    job was created with `bit_depth=32`.
    """

    status, code, title = 406, "not_acceptable", "No acceptable media type"
    remedy = "Allow one of these media types."


class Overloaded(ServiceError):
    """The request would exceed a [limit](reference/settings.md#what-is-accepted) on work, jobs or images.

    The error also occurs if ten thousand events already wait for the receiver of the job's [webhook](webhooks.md).
    """

    status, code, title = 429, "overloaded", "Too much work is waiting"
    remedy = (
        "Try again after the seconds in `Retry-After`. There should be room then, but none is reserved. `bound` names "
        "the limit."
    )

    retry_after_s: int

    def __init__(
        self, reason: str, *, retry_after_s: int, field: str, value: object, bound: str, of_owner: bool = False
    ):
        """of_owner: True if the limit applies to one key."""
        told: dict[str, Any] = {"field": field, "value": value, "bound": bound, "retry_after_s": retry_after_s}
        super().__init__(f"{reason}. Try again in {retry_after_s} s", **told)
        self.of_owner, self._reason, self._told = of_owner, reason, told

    def sooner(self, retry_after_s: int) -> "Overloaded":
        """Return a copy with the earlier of the two retry times."""
        told = self._told | {"retry_after_s": min(retry_after_s, self.retry_after_s)}
        return Overloaded(self._reason, of_owner=self.of_owner, **told)


class DeadlineUnmeetable(ServiceError):
    """An idle server could finish the job within `deadline_s`, but this server has too much other work."""

    status, code, title = 429, "deadline_unmeetable", "The deadline cannot be met at this load"
    remedy = (
        "Allow more time: `bound` is the earliest deadline that the server could meet now. If it names none, retry."
    )

    def __init__(self, detail: str, *, value: float, bound: str):
        super().__init__(detail, field="deadline_s", value=value, bound=bound)


class NotReady(ServiceError):
    """The server is starting: it is measuring the model, or has not run its first forward pass yet."""

    status, code, title = 503, "not_ready", "The model is not ready yet"
    remedy = "Try again after the seconds in `Retry-After`."
    detail, retry_after_s = "the server is warming up; try again in a moment", 1


class Stalled(ServiceError):
    """A thread of the server hangs.

    One operation has taken over a minute and over twenty times its usual duration. The operation may be the worker's,
    or the encoding or decoding of an image. `/healthz` and `/readyz` report the hang too. If the event loop itself
    hangs, only `/healthz` on `--metrics-port` answers.
    """

    status, code, title = 503, "stalled", "The server hangs"
    remedy = "Restart the server. It continues its durable jobs."

    def __init__(self, seconds: float, what: str = "the worker") -> None:
        super().__init__(f"{what} has hung for {seconds:.0f} s; the server must be restarted")
        self.seconds = seconds


class Draining(ServiceError):
    """The server is shutting down and accepts no new work.

    Accepted work that takes longer than the [grace period](reference/settings.md#grace-s) also ends with this error.
    The connection closes.
    """

    status, code, title = 503, "draining", "The server is shutting down"
    remedy = "Ask another server, or try again after the seconds in `Retry-After`."
    detail, retry_after_s = "the server is shutting down; ask another one, or again when it is back", 5


class ModelNotFound(ServiceError):
    """The server has no model with this name."""

    status, code, title = 404, "model_not_found", "There is no such model"
    remedy = "Use a name from `GET /models`."

    @classmethod
    def of(cls, name: str, known: Iterable[str]) -> "ModelNotFound":
        bound = f"one of {', '.join(sorted(known))}"
        return cls(f"no model {short(name)!r} is loaded; {bound}", field="model", value=name, bound=bound)


class ModelUnloaded(ServiceError):
    """The model was unloaded or replaced when the request arrived, or while the job ran."""

    status, code, title = 503, "model_unloaded", "The model was unloaded"
    remedy = "Try again: if the model was replaced, the new one answers."
    retry_after_s = 1

    def __init__(self, name: str = "") -> None:
        super().__init__(f"the model {name + ' ' if name else ''}was unloaded just now; GET /models lists the models")


class ModelLoading(ServiceError):
    """The model is [not in memory](models.md), and loading it would take too long for the request.

    Loading would take longer than `deadline_s` or [`--max-backlog-s`](reference/settings.md#max-backlog-s). The server
    is loading the model now.
    """

    status, code, title = 503, "model_loading", "The model is being loaded"
    remedy = "Try again after the seconds in `Retry-After`, or allow a longer deadline."

    def __init__(self, name: str, waited_s: float, left_s: float) -> None:
        retry_after_s = max(1, math.ceil(left_s))
        super().__init__(
            f"the model {name} is not in memory, and loading it takes about {retry_after_s} s more",
            field="deadline_s", value=round(waited_s, 3), bound=f"at least {retry_after_s} more, or a later try",
            retry_after_s=retry_after_s,
        )  # fmt: skip


class ModelBusy(ServiceError):
    """The model cannot be loaded or unloaded now.

    Another model is being loaded, this model is already loaded, or this model is the default model, which cannot be
    unloaded.
    """

    status, code, title = 409, "model_busy", "The model cannot be changed now"
    remedy = "If a model is being loaded, try again when it is done."


class CheckpointRefused(ServiceError):
    """The server cannot load a model from its folder; `detail` says why.

    The models that were loaded before are still served.
    """

    status, code, title = 422, "checkpoint_refused", "The checkpoint cannot be loaded"
    remedy = "Correct the checkpoint, and load it again."


class AdminOff(ServiceError):
    """Models can be loaded and unloaded only on a server that has a key of the role `admin`."""

    status, code, title = 403, "admin_off", "No key has the role admin"
    remedy = "Give the server such a key: `tminus key NAME --role admin --file FILE`; see [security](security.md)."
    detail = "this needs a key of the role admin, and the server has none: see --keys-file and TMINUS_KEYS"


class Unauthorized(ServiceError):
    """The server requires a key, and the request has none or has one that the server does not know.

    A WebSocket handshake with a wrong `Authorization` header is refused with 401. A wrong key in the first message
    closes the connection.
    """

    status, code, title = 401, "unauthorized", "The key is missing or wrong"
    remedy = "Send the header `Authorization: Bearer KEY`; see [security](security.md)."

    def __init__(self, reason: str = "this server asks for a key") -> None:
        super().__init__(f"{reason}; send one: Authorization: Bearer KEY")
        self.headers["WWW-Authenticate"] = 'Bearer realm="tminus"'


class TooManyLogins(ServiceError):
    """Too many wrong keys were sent to `POST /login` from one address within a minute.

    All IPv6 addresses in one /64 network count as one address. Keys in headers and cookies still work.
    """

    status, code, title = 429, "too_many_logins", "Too many logins failed"
    remedy = "Try again after the seconds in `Retry-After`."

    def __init__(self, most: int, retry_after_s: int) -> None:
        detail = f"at most {most} wrong keys are taken from one address; it may try again in {retry_after_s} s"
        super().__init__(detail, retry_after_s=retry_after_s)


class NotOpen(ServiceError):
    """The server runs on [Ray](operations.md#ray-serve) without keys, and other machines can reach it.

    A WebSocket is refused with status 403 and plain text.
    """

    status, code, title = 403, "not_open", "The server has no keys"
    remedy = "Give the server keys, or set [`--open`](reference/settings.md#open)."
    detail = (
        "other machines reach this address of Ray's proxy, so the server needs keys: give it some by keys_file, or let "
        "anybody in by open"
    )


class Forbidden(ServiceError):
    """The key has the role `sample`, and the request needs the role `admin`."""

    status, code, title = 403, "forbidden", "The key may not do this"
    remedy = "Use a key of the role `admin`."

    def __init__(self, name: str) -> None:
        super().__init__(f"this needs a key of the role admin, and {name} has the role sample")


class QuotaExceeded(ServiceError):
    """The key has used its row-steps for this minute, or has too many unfinished jobs or open requests.

    `field` says which.
    """

    status, code, title = 429, "quota_exceeded", "The quota of this key is used up"
    remedy = "Try again after the seconds in `Retry-After`, or give the key a larger [quota](security.md)."

    def __init__(self, field: str, bound: str, value: int, retry_after_s: int) -> None:
        detail = f"{field} of this key must be {bound}, got {value}"
        super().__init__(detail, field=field, value=value, bound=bound, retry_after_s=max(1, retry_after_s))


class EngineFailed(ServiceError):
    """A forward pass failed. The jobs in that pass are lost; other jobs continue.

    The error also occurs if the worker crashes or the GPU stops answering; the server then exits. A durable job that
    has [ended the server twice](jobs.md) also gets this error.
    """

    status, code, title = 500, "engine_failed", "The denoising step failed"
    refusal = False


class NotFinite(ServiceError):
    """The network returned NaN or infinity for an image of this job. Other jobs are not affected."""

    status, code, title = 500, "not_finite", "The network returned NaN or infinity"
    remedy = "Try another seed, class or guidance. If it happens again, the checkpoint is at fault."
    refusal = False
    detail = "the network returned NaN or infinity for an image of this job"


class DeadlinePassed(ServiceError):
    """`deadline_s` passed before the job was done."""

    status, code, title = 504, "deadline_passed", "The deadline passed"
    remedy = "Allow more time, or take fewer steps."
    refusal = False

    @classmethod
    def of(cls, deadline_s: float) -> "DeadlinePassed":
        detail = f"deadline_s={deadline_s:g} passed before the job was done"
        return cls(detail, field="deadline_s", value=deadline_s, bound="a longer time")


class StorageFailed(ServiceError):
    """A durable job cannot be written or read.

    The disk may be full, read-only or broken, the database or the object store may not answer, or the stored data of
    this job may be damaged. Accepted jobs stay accepted, and `POST /sample` still works.
    """

    status, code, title = 507, "storage_failed", "The job store failed"
    remedy = (
        "Look at the log of the server, which has the reason. Try again after the seconds in `Retry-After`; if there "
        "is no such header, the data are damaged, and you can only delete the job."
    )

    def __init__(self, detail: str, *, damaged: bool = False) -> None:
        """damaged: True if the stored data cannot be read, so retrying does not help."""
        super().__init__(detail, retry_after_s=None if damaged else 5)  # the server itself retries every 5 s
        self.damaged = damaged


class NewerJob(StorageFailed):
    """A newer version of the server accepted the durable job.

    The job needs something that this server does not know.
    """

    status, code, title = 503, "newer_job", "A newer server accepted the job"
    remedy = "Try again: the servers are being [updated](production.md#upgrade)."


class KeyReused(ServiceError):
    """The `Idempotency-Key` was already used for other parameters or another model."""

    status, code, title = 422, "idempotency_key_reused", "This Idempotency-Key was used for another request"
    remedy = "Use a new key for a new request."


class JobNotDone(ServiceError):
    """The request asks for the images of a job that is still waiting or running."""

    status, code, title = 409, "job_not_done", "The job is not done yet"
    remedy = "Try again after the seconds in `Retry-After`, or follow the events of the job; see [jobs](jobs.md)."
    refusal = False

    def __init__(self, state: str, retry_after_s: int) -> None:
        super().__init__(f"this job is {state}. Try again in {retry_after_s} s", retry_after_s=retry_after_s)


class NoImages(ServiceError):
    """The request asks for the images of a job that was cancelled or has failed.

    If the job failed, `cause` has its error.
    """

    status, code, title = 410, "no_images", "The job has no images"
    remedy = "Create another job."
    refusal = False

    def __init__(self, detail: str, cause: Mapping[str, Any] | None) -> None:
        super().__init__(detail)
        self._cause = cause

    def problem(self) -> dict[str, Any]:
        return super().problem() | ({"cause": dict(self._cause)} if self._cause is not None else {})


class JobNotFound(ServiceError):
    """There is no job with this id. It never existed, is no longer stored, or was not durable and has ended."""

    status, code, title = 404, "job_not_found", "There is no such job"
    remedy = "`GET /jobs` lists the jobs that exist."
    refusal = False


class JobCancelled(ServiceError):
    """A request cancelled or deleted the job, or the client disconnected and will not read this answer."""

    status, code, title = 499, "cancelled", "The job was cancelled"
    remedy = "You need not do anything: this is what was asked for."
    refusal = False


def short(value: object, limit: int = 200) -> object:
    """Shorten a client's value for an error message, and mask the secrets in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity or NaN
    if isinstance(value, (bool, type(None))) or (isinstance(value, int) and abs(value) < 2**128):
        return value
    looked_at = limit + LONGEST_SECRET  # long enough to include a secret that begins within the limit
    try:
        text = value if isinstance(value, str) else _json_start(value, looked_at)
        if isinstance(value, (list, tuple, dict)) and len(text.encode()) <= limit and masked(text) == text:
            return value
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    shown = masked(text[:looked_at].encode("utf-8", "replace").decode())  # JSON may contain half of a surrogate pair
    return shown if max(len(shown), len(text) - LONGEST_SECRET) <= limit else shown[:limit] + "…"


def masked(text: str) -> str:
    """Mask the secrets of API keys in a text.

    Finds secrets that are percent-encoded or written with HTML entities, even repeatedly.
    """
    if "%" in text or ("&" in text and ";" in text):
        decoded, starts = _decoded(text)
        pieces, end = list[str](), 0
        for found in SECRET.finditer(decoded):
            pieces += text[end : starts[found.start()]], "tm_…"
            end = starts[found.end()]
        text = "".join([*pieces, text[end:]])
    return SECRET.sub("tm_…", text)  # finds a secret whose beginning was hidden by a percent sign in the encoded text


def _decoded(text: str) -> tuple[str, list[int]]:
    """Return the decoded text, and the position in `text` of each decoded character.

    The positions end with the length of `text`.
    """
    characters, starts = list[str](), list[int]()
    for at, character in enumerate(text):
        characters.append(character)
        starts.append(at)
        while found := _last_encoded(characters):
            length, meant = found
            characters[-length:] = meant
            del starts[len(starts) - length + 1 :]
    return "".join(characters), [*starts, len(text)]


def _last_encoded(characters: list[str]) -> tuple[int, str] | None:
    """Decode an encoded character at the end of the list.

    Returns the number of characters that encode it, and the decoded character. Returns None if the list does not end
    with an encoded character.
    """
    if len(characters) > 2 and characters[-3] == "%" and HEX.issuperset(characters[-2:]):
        return 3, chr(int("".join(characters[-2:]), 16))
    if characters[-1] == ";" and (found := ENTITY.search("".join(characters[-ENTITY_CHARACTERS:]))):
        return len(found[0]), html.unescape(found[0])[:1] or "\ufffd"
    return None


_SHOWN = json.JSONEncoder(allow_nan=False, default=str, ensure_ascii=False)


def _json_start(value: object, limit: int) -> str:
    """Write a value as JSON. Stop soon after `limit` characters, because the value may have a million items."""
    text = ""
    for piece in _SHOWN.iterencode(value):
        text += piece
        if len(text) > limit:
            break
    return text
