"""The version of the native API: what requests may ask for, and what answers say. docs/api-version.md has the rules.

The APIs that others have defined have versions of their own, and the WebSocket has none in its messages.
"""

from starlette.datastructures import Headers
from starlette.types import Scope

from tminus.service.api.answers.operations import API_VERSION
from tminus.service.api.answers.problems import error_form
from tminus.service.api.edge.origin import PROBES
from tminus.service.errors import UnsupportedVersion

HEADER = "API-Version"


def is_native(scope: Scope) -> bool:
    """Whether an HTTP request is of the native API."""
    return error_form(scope["method"], scope["path"]) is None


def check_version(scope: Scope) -> None:
    """Raise UnsupportedVersion for a request that names another version than there is. Probes are always answered."""
    if scope["path"] in PROBES or not is_native(scope):
        return
    for asked in Headers(scope=scope).getlist(HEADER):
        if asked.strip() != API_VERSION:
            raise UnsupportedVersion(asked, API_VERSION)
