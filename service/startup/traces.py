"""Starts tracing if OpenTelemetry's environment variables ask for it."""

import logging
import os
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tminus.service.startup.telemetry import Traces

log = logging.getLogger(__name__)

# The first variable is for traces only, the second for all telemetry. The first takes precedence.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
DISABLED = "OTEL_SDK_DISABLED"


def start_traces(version: str) -> "Traces | None":
    """Start sending traces if an endpoint is set; otherwise return None.

    version: this server's version. The SDK is imported only if it is needed. Raises ValueError for an invalid variable.
    """
    named_by, endpoint = _first(ENDPOINTS)
    exporter = _value(EXPORTER)
    if not endpoint or exporter == "none" or _value(DISABLED).lower() == "true":
        return None
    if exporter not in ("", "otlp"):
        _refuse(named_by, f"{EXPORTER} must be otlp or none, got {exporter!r}")
    protocol_from, protocol = _first(PROTOCOLS)
    if protocol not in ("", "http/protobuf"):
        why = "must be http/protobuf, which collectors take on port 4318"
        _refuse(named_by, f"{protocol_from} {why}, got {protocol!r}")
    address = endpoint.rpartition("@")[2]  # without the user name and password
    try:
        url = urlsplit(endpoint)
        known = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # the port is not a number
        known = False
    if not known:
        _refuse(named_by, f"it must be a URL such as http://localhost:4318, got {address!r}")
    try:
        from tminus.service.startup.telemetry import send_spans

        traces = send_spans(version)
    except ImportError as error:
        _refuse(named_by, f"this needs the extra otel: pip install '.[otel]' in a checkout ({error})")
    except ValueError as error:
        _refuse(named_by, str(error))
    log.info("traces are sent to %s", address)
    return traces


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _first(names: tuple[str, ...]) -> tuple[str, str]:
    """Return the first variable that is set, and its value. If none is set, return the last name and ""."""
    return next(((name, _value(name)) for name in names if _value(name)), (names[-1], ""))


def _refuse(named_by: str, why: str) -> NoReturn:
    raise ValueError(f"{named_by} asks for traces: {why}; {EXPORTER}=none serves without traces")
