"""Checks the Host, Origin and API key of every request, and identifies its caller.

The key is in `Authorization: Bearer KEY`, or in the cookie that POST /login sets for the web page. The cookie also
covers images, event streams and WebSockets, to which a page cannot add headers. SameSite=Strict keeps pages of other
sites from sending the cookie. HttpOnly keeps scripts from reading it.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.access.access import WINDOW_S, Access, Caller
from tminus.service.access.keys import ROLES
from tminus.service.api.answers.headers import with_headers
from tminus.service.api.answers.openapi import closed_object, failures, fields_of
from tminus.service.api.answers.operations import API_VERSION, described
from tminus.service.api.answers.problems import error_form, render
from tminus.service.api.edge.connections import counted_address
from tminus.service.api.edge.middleware import body_of
from tminus.service.api.edge.origin import HEALTH, OF_A_MODEL, PROBES, READING, AllowedSites
from tminus.service.api.request.reading import BARE, check_encoding, no_parameters, read_json
from tminus.service.api.request.schemas import RequestSchema
from tminus.service.errors import (
    ConflictingField,
    InvalidField,
    ServiceError,
    Unauthorized,
    UnknownField,
    UnsupportedVersion,
)
from tminus.service.images.encoder import JSON
from tminus.service.tracing import PROBLEM, note

COOKIE = "tminus_key"
COOKIE_S = 30 * 86_400
# Paths that need no key: the health probes, and the web page's files, which are the same for all models.
OPEN_PATHS = frozenset({*HEALTH, "/login", "/logout"})
PAGE = "/"  # needs no key for reading; Hugging Face clients POST prompts to this path
OPEN_FOLDERS = ("/page/",)
NO_STORE = {"Cache-Control": "no-store"}
SET_COOKIE = {
    "description": "The key is right, and the cookie has it now",
    **with_headers("Set-Cookie", "Cache-Control"),
}
LOGGED_OUT = {204: SET_COOKIE | {"description": "The cookie is gone"}, **failures(422)}


def caller_of(request: HTTPConnection) -> Caller:
    """Return the caller, as identified by AccessControl."""
    caller: Caller = request.state.caller
    return caller


def identify(access: Access, scope: Scope) -> Caller:
    """Return the caller of a request. Raises Unauthorized.

    A server without keys ignores credentials: they may be meant for a proxy in front of it.
    """
    headers = Headers(scope=scope)
    if access.has_keys:
        if (secret := _bearer(headers)) is not None:
            return access.with_secret(secret)
        if secret := _cookie(headers):
            with suppress(Unauthorized):  # the cookie's key was removed; the page will ask for a new one
                return access.with_secret(secret)
    return access.without_secret()


def has_key(access: Access, scope: Scope) -> bool:
    """Return True if a WebSocket handshake has a valid key or needs none.

    Raises Unauthorized if the Authorization header has an invalid key.
    """
    if access.has_keys and (secret := _bearer(Headers(scope=scope))) is not None:
        access.with_secret(secret)
    try:
        identify(access, scope)
    except Unauthorized:
        return False
    return True


def is_open(path: str, method: str) -> bool:
    """Return True if this method needs no key on this path."""
    path = OF_A_MODEL.sub("", path)
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or (path == PAGE and method in READING)


def check_version(scope: Scope) -> None:
    """Raise UnsupportedVersion if a request to the native API asks for another version. Probes are not checked."""
    if scope["path"] in PROBES or error_form(scope["method"], scope["path"]) is not None:
        return
    for asked in Headers(scope=scope).getlist("API-Version"):
        if asked.strip() != API_VERSION:
            raise UnsupportedVersion(asked, API_VERSION)


class AccessControl:
    """Refuses a request with a bad Host, Origin, version or key. Otherwise stores the caller in `request.state`.

    A request counts as one of its caller's connections until its response ends. If the caller has a quota, the response
    headers state how much is left. WebSockets are checked by their route instead.
    """

    def __init__(
        self, app: ASGIApp, allowed_sites: AllowedSites, access: Access, refused: Callable[[str], None]
    ) -> None:
        self._app, self._allowed_sites, self._access, self._refused = app, allowed_sites, access, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._allowed_sites.check(scope)
            check_version(scope)
            if is_open(scope["path"], scope["method"]):
                await self._app(scope, receive, send)
                return
            caller = identify(self._access, scope)
            scope.setdefault("state", {})["caller"] = caller
            body_of(scope).owner = caller.name
            send = _with_allowance(caller, send)
            with caller.connected():
                await self._app(scope, receive, send)
        except ServiceError as refusal:  # raised by the checks above; exception handlers catch the errors of routes
            self._refused(refusal.code)
            note({PROBLEM: refusal.code})
            await render(refusal, scope)(scope, receive, send)


class WhoAnswer(BaseModel):
    """The caller of a request, and the caller's limits."""

    name: str | None = Field(description="The name of the key. Null without a key.")
    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    row_steps_per_minute: int | None = Field(description="The quota. Null for none.")
    row_steps_left: int | None = Field(description="What is left of the quota now.")
    jobs: int | None = Field(description="The most jobs that may wait or run at once. Null for no limit.")
    connections: int | None = Field(description="The most connections at once. Null for no limit.")

    @classmethod
    def of(cls, caller: Caller) -> "WhoAnswer":
        allowance = caller.allowance
        return cls(
            name=caller.name or None,
            role=caller.role,
            row_steps_per_minute=caller.limits.row_steps_per_minute,
            row_steps_left=None if allowance is None else allowance.left,
            jobs=caller.limits.jobs,
            connections=caller.limits.connections,
        )


class LoginRequest(RequestSchema):
    """The body of POST /login. The key must not be in the query, because servers log queries."""

    key: Annotated[str, Field(max_length=512)]
    """The key, as it would be sent in a header."""


def authentication_routes(access: Access, max_body_bytes: int) -> APIRouter:
    """Return a router with GET /key, POST /login and POST /logout."""
    router = APIRouter(tags=["keys"])
    key_body = closed_object("A key.", fields_of(LoginRequest, {})) | {"required": ["key"]}

    @router.get("/key", **described("get_key"), dependencies=BARE, responses=failures(422))
    async def get_key(request: Request) -> WhoAnswer:
        return WhoAnswer.of(caller_of(request))

    @router.post(
        "/login",
        **described("login"),
        response_model=WhoAnswer,
        responses={200: SET_COOKIE, **failures(400, 401, 408, 413, 415, 422, 429)},
        openapi_extra={"requestBody": {"required": True, "content": {JSON: {"schema": key_body}}}},
    )
    async def login(request: Request) -> Response:
        check_encoding(request)
        try:
            await no_parameters(request)
            asked = LoginRequest.parse(await read_json(request, max_body_bytes))
        except (ConflictingField, InvalidField, UnknownField) as error:  # leave out the value, which may be a key
            detail = f"{error.field} must be {error.bound}" if isinstance(error, InvalidField) else error.detail
            raise type(error)(detail, field=error.field, bound=error.bound) from None
        address = counted_address(request.client.host) if request.client else ""
        who = WhoAnswer.of(access.login(asked.key, address))
        response = JSONResponse(who.model_dump(), headers=NO_STORE)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, asked.key, COOKIE_S, path="/", secure=secure, httponly=True, samesite="strict")
        return response

    @router.post("/logout", **described("logout"), status_code=204, dependencies=BARE, responses=LOGGED_OUT)
    async def logout() -> Response:
        response = Response(status_code=204, headers=NO_STORE)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return response

    return router


def _bearer(headers: Headers) -> str | None:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None


def _cookie(headers: Headers) -> str:
    return cookie_parser("; ".join(headers.getlist("cookie"))).get(COOKIE, "")


def _with_allowance(caller: Caller, send: Send) -> Send:
    """Add headers with the caller's remaining quota to the response (draft-ietf-httpapi-ratelimit-headers)."""
    if caller.limits.row_steps_per_minute is None:
        return send

    async def send_with_allowance(message: Message) -> None:
        if message["type"] == "http.response.start" and (allowance := caller.allowance) is not None:
            headers = MutableHeaders(scope=message)
            headers["RateLimit-Policy"] = f'"row-steps";q={allowance.quota};w={WINDOW_S}'
            headers["RateLimit"] = f'"row-steps";r={allowance.left};t={allowance.full_in_s}'
        await send(message)

    return send_with_allowance
