"""Every way the service refuses or fails, each with its status and stable code. docs/errors.md explains them."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

# The secrets that `tminus key` makes, in any case, whatever stands before them; not utm_source and the like of links.
UTM = "source|medium|campaign|term|content|id|source_platform|creative_format|marketing_tactic"
SECRET = re.compile(rf"tm_(?!(?<=utm_)(?:{UTM})(?![\w-]))[\w-]+", re.ASCII | re.IGNORECASE)
HEX = frozenset("0123456789abcdefABCDEF")


class ServiceError(Exception):
    """Rendered as application/problem+json (RFC 9457). `field`, `value` and `bound` say what to change."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    remedy: ClassVar[str] = "Look at the log of the server, which has the reason."  # what to do about it
    refusal: ClassVar[bool] = True  # whether tminus_rejected_total counts it; failures of the server are not refusals

    @property
    def ws_close(self) -> int:
        """The code to close a WebSocket with (RFC 6455, 7.4.1): try again later, too big, internal error or policy."""
        if self.status in (429, 503):
            return 1013
        if self.status == 413:
            return 1009
        return 1011 if self.status >= 500 else 1008

    def __init__(self, detail: str, *, field: str | None = None, value: object = None, bound: str | None = None):
        super().__init__(detail)
        self.detail, self.field, self.value, self.bound = detail, field, value, bound
        self.headers: dict[str, str] = {}

    def problem(self) -> dict[str, Any]:
        """The members of the problem document."""
        members: dict[str, Any] = {
            "type": f"urn:tminus:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": masked(self.detail),
        }
        if self.field is not None:
            members |= {"field": short(self.field), "value": short(self.value)}
            if self.bound is not None:
                members["bound"] = self.bound
        return members


class InvalidField(ServiceError):
    """A parameter has the wrong type, is out of bounds, or does not go with the model or another parameter."""

    status, code, title = 422, "invalid_field", "A parameter is invalid"

    @classmethod
    def of(cls, field: str, bound: str, value: object) -> "InvalidField":
        """Build the usual detail: the field, its bound, the value received."""
        return cls(f"{field} must be {bound}, got {short(value)!r}", field=field, value=value, bound=bound)


class UnknownField(ServiceError):
    """There is no parameter of this name."""

    status, code, title = 422, "unknown_field", "There is no such parameter"

    @classmethod
    def of(cls, field: str, known: Iterable[str], value: object) -> "UnknownField":
        """Build the usual detail: the name received, and those that there are."""
        names = ", ".join(known) or "none"
        detail = f"there is no parameter {short(field)!r}; known: {names}"
        return cls(detail, field=field, value=value, bound=f"one of {names}")


class ConflictingField(ServiceError):
    """A parameter is given twice: in query and body with different values, or repeated where it is no list."""

    status, code, title = 422, "conflicting_field", "A parameter has two values"


class MalformedBody(ServiceError):
    """The body is not a JSON object."""

    status, code, title = 400, "malformed_body", "The body is not a JSON object"


class MalformedForm(ServiceError):
    """A multipart body cannot be parsed, has too many parts, or has too long a field."""

    status, code, title = 400, "malformed_form", "The body is not a form"


class UnsupportedMediaType(ServiceError):
    """The body must be an image, but its Content-Type says that it is something else."""

    status, code, title = 415, "unsupported_media_type", "The body is of no type that is taken here"


class UnsupportedEncoding(ServiceError):
    """The body is compressed, says its Content-Encoding. An answer of 415 lists what is taken (RFC 9110, 12.5.3)."""

    status, code, title = 415, "unsupported_encoding", "The body is compressed"

    def __init__(self, encoding: str) -> None:
        bound = "identity, or absent"
        detail = f"Content-Encoding must be {bound}, got {short(encoding)!r}"
        super().__init__(detail, field="Content-Encoding", value=encoding, bound=bound)
        self.headers["Accept-Encoding"] = "identity"


class InvalidImage(ServiceError):
    """What was sent as an image is not in a supported format, is broken, or is too large."""

    status, code, title = 422, "invalid_image", "The image is invalid"

    @classmethod
    def of(cls, field: str, bound: str, got: str) -> "InvalidImage":
        """Build the detail: what the image must be, and what was received."""
        return cls(f"{field} must be {bound}, got {short(got)}", field=field, value=got, bound=bound)


class MalformedMessage(ServiceError):
    """A WebSocket message is not a JSON object in a text message, or is not allowed at this point."""

    status, code, title = 400, "malformed_message", "The message is not understood"


class Silence(ServiceError):
    """A WebSocket is open, and the client has asked for nothing in time."""

    status, code, title = 408, "silence", "Nothing was asked for"
    refusal = False


class ForeignHost(ServiceError):
    """The request names another host than this one, as after DNS rebinding."""

    status, code, title = 403, "foreign_host", "The server is not known by this name"


class ForeignOrigin(ServiceError):
    """A page of another site would start work, change something, or see somebody's jobs."""

    status, code, title = 403, "foreign_origin", "Pages of this origin may not use the server"


class TooManyStreams(ServiceError):
    """The limit of open streams is reached, for this address or in total."""

    status, code, title = 429, "too_many_streams", "Too many streams are open"

    def __init__(self, bound: str, limit: int) -> None:
        super().__init__(f"{bound} may be open", field="streams", value=limit + 1, bound=bound)
        self.headers["Retry-After"] = "1"


class MalformedRequest(ServiceError):
    """What a client sent is not HTTP that this server reads. The connection closes."""

    status, code, title = 400, "malformed_request", "The request is not valid HTTP"


class TooManyHeaders(ServiceError):
    """A WebSocket handshake has more or longer headers than the library for WebSockets takes."""

    status, code, title = 431, "too_many_headers", "The head is too large"


class SlowHead(ServiceError):
    """The head of a request did not arrive in time. The connection closes."""

    status, code, title = 408, "slow_head", "The head took too long"

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the head of a request must arrive within {limit_s:g} s")


class SlowBody(ServiceError):
    """The body of a request arrives too slowly. It was not read to its end."""

    status, code, title = 408, "slow_body", "The body is too slow"

    def __init__(self, bytes_per_s: int, window_s: float) -> None:
        super().__init__(f"a body must bring at least {bytes_per_s} bytes a second in every {window_s:g} s")
        self.headers["Connection"] = "close"


class BodyTooLarge(ServiceError):
    """The body is over the limit; it was not read to its end."""

    status, code, title = 413, "body_too_large", "The body is too large"

    def __init__(self, received: int, limit: int, field: str = "body"):
        bound = f"at most {limit} bytes"
        super().__init__(f"{field} must be {bound}, got {received} or more", field=field, value=received, bound=bound)
        self.headers["Connection"] = "close"  # nobody has to send the rest


class TooManyBytes(ServiceError):
    """All clients together send too many bytes, or are sent too many; this body was not taken, or not sent."""

    status, code, title = 429, "too_many_bytes", "Too much is being sent at once"

    def __init__(self, held: int, limit: int):
        bound = f"at most {limit} bytes"
        super().__init__(f"bodies held at once must be {bound}, got {held}", field="body", value=held, bound=bound)
        self.headers |= {"Retry-After": "1", "Connection": "close"}


class TooManyImages(ServiceError):
    """Too many uploaded images wait to be decoded."""

    status, code, title = 429, "too_many_images", "Too many images wait to be decoded"

    def __init__(self, wait_s: float, limit_s: float) -> None:
        detail = f"uploads before this one take {wait_s:.1f} s to decode"
        super().__init__(detail, field="image", value=round(wait_s, 1), bound=f"at most {limit_s:g} s")
        self.headers["Retry-After"] = str(math.ceil(wait_s))


class NotAcceptable(ServiceError):
    """The server can make none of the media types that the client accepts."""

    status, code, title = 406, "not_acceptable", "No acceptable media type"


class Overloaded(ServiceError):
    """More work is waiting than the limits allow; Retry-After says when there should be room, and keeps none."""

    status, code, title = 429, "overloaded", "Too much work is waiting"

    def __init__(
        self, detail: str, *, retry_after_s: int, field: str, value: object, bound: str, of_owner: bool = False
    ):
        """detail: without the time. of_owner: the limit is of what one key may hold."""
        super().__init__(f"{detail}. Try again in {retry_after_s} s", field=field, value=value, bound=bound)
        self.of_owner, self.retry_after_s, self._reason = of_owner, retry_after_s, detail
        self.headers["Retry-After"] = str(retry_after_s)

    def sooner(self, retry_after_s: int) -> "Overloaded":
        """Return this refusal with an earlier time to come back."""
        if retry_after_s >= self.retry_after_s:
            return self
        assert self.field is not None
        assert self.bound is not None
        return Overloaded(
            self._reason, retry_after_s=retry_after_s, field=self.field, value=self.value, bound=self.bound,
            of_owner=self.of_owner,
        )  # fmt: skip


class DeadlineUnmeetable(ServiceError):
    """An idle server would meet the deadline, but not at this load; the bound is the earliest that could be met."""

    status, code, title = 429, "deadline_unmeetable", "The deadline cannot be met at this load"

    def __init__(self, detail: str, *, value: float, bound: str):
        super().__init__(detail, field="deadline_s", value=value, bound=bound)


class NotReady(ServiceError):
    """The first tick has not run yet."""

    status, code, title = 503, "not_ready", "The model is not ready yet"

    def __init__(self, detail: str = "the server is warming up; try again in a moment") -> None:
        super().__init__(detail)
        self.headers["Retry-After"] = "1"


class Stalled(ServiceError):
    """The worker has been at one thing for far longer than it should take. Only the end of the process can end that."""

    status, code, title = 503, "stalled", "The worker hangs"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the worker has hung for {seconds:.0f} s; the server must be restarted")


class Draining(ServiceError):
    """The server is shutting down: new work is refused, and work that outlasts the grace period is given up."""

    status, code, title = 503, "draining", "The server is shutting down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask another one, or again when it is back")
        self.headers["Retry-After"] = "5"


class ModelNotFound(ServiceError):
    """No model of this name is loaded."""

    status, code, title = 404, "model_not_found", "There is no such model"

    @classmethod
    def of(cls, name: str, known: Iterable[str]) -> "ModelNotFound":
        """Name those that there are."""
        bound = f"one of {', '.join(sorted(known))}"
        return cls(f"no model {short(name)!r} is loaded; {bound}", field="model", value=name, bound=bound)


class ModelUnloaded(ServiceError):
    """The model was unloaded while the request came in, or its job was still running."""

    status, code, title = 503, "model_unloaded", "The model was unloaded"

    def __init__(self, name: str = "") -> None:
        super().__init__(
            f"the model {name + ' ' if name else ''}was unloaded just now; GET /models lists those that are"
        )
        self.headers["Retry-After"] = "1"


class ModelLoading(ServiceError):
    """The model is not in memory, and cannot be before the deadline. It is being loaded; Retry-After says how long."""

    status, code, title = 503, "model_loading", "The model is being loaded"

    def __init__(self, name: str, waited_s: float, left_s: float) -> None:
        retry_after_s = max(1, math.ceil(left_s))
        super().__init__(
            f"the model {name} is not in memory, and takes about {retry_after_s} s more to be loaded",
            field="deadline_s", value=round(waited_s, 3), bound=f"at least {retry_after_s} more, or a later try",
        )  # fmt: skip
        self.headers["Retry-After"] = str(retry_after_s)


class ModelBusy(ServiceError):
    """Another model is being loaded, or this one cannot be in this state: it is loaded already, or is the default."""

    status, code, title = 409, "model_busy", "The model cannot be changed now"


class CheckpointRefused(ServiceError):
    """The checkpoint of a model cannot be loaded. What was loaded before goes on as it was."""

    status, code, title = 422, "checkpoint_refused", "The checkpoint cannot be loaded"


class AdminOff(ServiceError):
    """The server has no key of the role admin, so that nothing can be loaded or unloaded."""

    status, code, title = 403, "admin_off", "No key has the role admin"

    def __init__(self) -> None:
        super().__init__("this needs a key of the role admin, and the server has none: see --keys-file and --keys")


class Unauthorized(ServiceError):
    """The request needs a key, or the one that came is not known."""

    status, code, title = 401, "unauthorized", "The key is missing or wrong"

    def __init__(self, reason: str = "this server asks for a key") -> None:
        super().__init__(f"{reason}; send one: Authorization: Bearer KEY")
        self.headers["WWW-Authenticate"] = 'Bearer realm="tminus"'


class NotOpen(ServiceError):
    """Other machines reach the server, and it has no keys; on Ray, whose proxies listen where Ray's settings say."""

    status, code, title = 403, "not_open", "The server has no keys"

    def __init__(self) -> None:
        super().__init__(
            "other machines reach this address of Ray's proxy, so the server needs keys: give it some by keys_file, or "
            "let anybody in by open"
        )


class Forbidden(ServiceError):
    """The key is known, and its role is not enough."""

    status, code, title = 403, "forbidden", "The key may not do this"

    def __init__(self, name: str) -> None:
        super().__init__(f"this needs a key of the role admin, and {name} has the role sample")


class QuotaExceeded(ServiceError):
    """The key has used what it may use for now: row-steps of this minute, jobs that have not ended, connections."""

    status, code, title = 429, "quota_exceeded", "The quota of this key is used up"

    def __init__(self, field: str, bound: str, value: int, retry_after_s: int) -> None:
        super().__init__(f"{field} of this key must be {bound}, got {value}", field=field, value=value, bound=bound)
        self.headers["Retry-After"] = str(max(1, retry_after_s))


class EngineFailed(ServiceError):
    """A tick raised, and its jobs are lost; or the worker crashed, and all jobs are lost."""

    status, code, title = 500, "engine_failed", "The denoising step failed"
    refusal = False


class NotFinite(ServiceError):
    """The network returned NaN or infinity for this job. Other jobs are not affected."""

    status, code, title = 500, "not_finite", "The network gave no finite image"
    refusal = False

    def __init__(self) -> None:
        super().__init__("the network gave NaN or infinity for an image of this job")


class DeadlinePassed(ServiceError):
    """The job's deadline_s passed before it was done. Its rows are free."""

    status, code, title = 504, "deadline_passed", "The deadline passed"
    refusal = False

    @classmethod
    def of(cls, deadline_s: float) -> "DeadlinePassed":
        """Name the deadline of a job that ran."""
        detail = f"deadline_s={deadline_s:g} passed before the job was done"
        return cls(detail, field="deadline_s", value=deadline_s, bound="a longer time")


class StorageFailed(ServiceError):
    """A durable job cannot be written or read: the disk is full, read-only or broken. Accepted jobs stay accepted."""

    status, code, title = 507, "storage_failed", "The job store failed"

    def __init__(self, detail: str, *, damaged: bool = False) -> None:
        """damaged: what is kept cannot be read, however often it is tried."""
        super().__init__(detail)
        self.damaged = damaged
        if not damaged:
            self.headers["Retry-After"] = "5"  # as often as a server itself tries again


class NewerJob(StorageFailed):
    """A durable job asks for what this version does not know: a server of a newer one has accepted it."""

    status, code, title = 503, "newer_job", "The job is a newer server's"


class KeyReused(ServiceError):
    """The Idempotency-Key was used for another request before."""

    status, code, title = 422, "idempotency_key_reused", "This Idempotency-Key was used for another request"


class JobExists(ServiceError):
    """PUT /jobs/{id} with an id that is another request's already."""

    status, code, title = 409, "job_exists", "This id is another job's"

    def __init__(self, chosen: str) -> None:
        bound = "a new UUID for a new request"
        detail = f"the job {short(chosen)} was asked for with other parameters before"
        super().__init__(detail, field="job_id", value=chosen, bound=bound)


class JobNotDone(ServiceError):
    """The job still waits or runs, so it has no images yet; Retry-After says when it should be done."""

    status, code, title = 409, "job_not_done", "The job is not done yet"
    refusal = False

    def __init__(self, state: str, retry_after_s: int) -> None:
        super().__init__(f"this job is {state}. Try again in {retry_after_s} s")
        self.headers["Retry-After"] = str(retry_after_s)


class NoImages(ServiceError):
    """The job was cancelled or failed, so it has no images; `cause` is the problem it failed with."""

    status, code, title = 410, "no_images", "The job has no images"
    refusal = False

    def __init__(self, detail: str, cause: Mapping[str, Any] | None) -> None:
        super().__init__(detail)
        self._cause = cause

    def problem(self) -> dict[str, Any]:
        """The members of the problem document."""
        return super().problem() | ({"cause": dict(self._cause)} if self._cause is not None else {})


class JobNotFound(ServiceError):
    """There is no such job: it was not durable and has ended, or is no longer kept, or never existed."""

    status, code, title = 404, "job_not_found", "There is no such job"
    refusal = False


class JobCancelled(ServiceError):
    """The client disconnected, so this is not read; or the job was cancelled by a request."""

    status, code, title = 499, "cancelled", "The job was cancelled"
    refusal = False


def short(value: object, limit: int = 200) -> object:
    """Shorten a value that a client sent, so that an error never echoes a megabyte."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity
    if isinstance(value, (bool, type(None))) or (isinstance(value, int) and abs(value) < 2**128):
        return value
    try:
        text = value if isinstance(value, str) else _json_start(value, limit)
        if isinstance(value, (list, tuple, dict)) and len(text.encode()) <= limit and masked(text) == text:
            return value
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    text = text[: limit + 1].encode("utf-8", "replace").decode()  # JSON may escape half a surrogate pair
    return masked(text if len(text) <= limit else text[:limit] + "…")


def masked(text: str) -> str:
    """Mask the secrets of API keys, which clients may have put anywhere, percent-encoded any number of times."""
    if "%" not in text:
        return SECRET.sub("tm_…", text)
    decoded, starts = _decoded(text)
    pieces, end = list[str](), 0
    for found in SECRET.finditer(decoded):
        pieces += text[end : starts[found.start()]], "tm_…"
        end = starts[found.end()]
    return "".join([*pieces, text[end:]])


def _decoded(text: str) -> tuple[str, list[int]]:
    """Decode percent-encoding until none is left; where in the text each character begins, and where it ends."""
    characters, starts = list[str](), list[int]()
    for at, character in enumerate(text):
        characters.append(character)
        starts.append(at)
        while len(characters) > 2 and characters[-3] == "%" and HEX.issuperset(characters[-2:]):
            characters[-3:] = chr(int("".join(characters[-2:]), 16))
            del starts[-2:]
    return "".join(characters), [*starts, len(text)]


_SHOWN = json.JSONEncoder(allow_nan=False, default=str, ensure_ascii=False)


def _json_start(value: object, limit: int) -> str:
    """Write a value as JSON, or a little more than `limit` characters of it: it may have a million items."""
    text = ""
    for piece in _SHOWN.iterencode(value):
        text += piece
        if len(text) > limit:
            break
    return text
