"""Whether a server sends traces: by its setting, else by the variables that OpenTelemetry reads."""

import logging
import os
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tminus.service.tracing import Tracer

log = logging.getLogger(__name__)

# For traces, and for all that a program sends; the first wins.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
DISABLED = "OTEL_SDK_DISABLED"
USUAL = "http://localhost:4318"


def start_traces(wanted: bool | None) -> "Tracer | None":
    """Begin to send traces, if they are wanted. Raises ValueError for what is wrong with the variables.

    wanted: None: where an endpoint is set. Variables that switch OpenTelemetry off hold in any case.
    """
    endpoint_from, endpoint = _first(ENDPOINTS)
    off = os.environ.get(DISABLED, "").strip().lower() == "true" or _value(EXPORTER) == "none"
    if off or not (bool(endpoint) if wanted is None else wanted):
        return None
    because = "--traces (TMINUS_TRACES)" if wanted else endpoint_from
    if (exporter := _value(EXPORTER)) not in ("", "otlp"):
        _refuse(because, f"{EXPORTER} must be otlp or none, got {exporter!r}")
    protocol_from, protocol = _first(PROTOCOLS)
    if protocol not in ("", "http/protobuf"):
        _refuse(because, f"{protocol_from} must be http/protobuf, which collectors take on port 4318, got {protocol!r}")
    address = endpoint.rpartition("@")[2]  # without a password
    try:
        url = urlsplit(endpoint or USUAL)
        known = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number
        known = False
    if not known:
        _refuse(because, f"{endpoint_from} must be a URL such as {USUAL}, got {address!r}")
    from tminus.service.startup.app import VERSION

    try:
        from tminus.service.startup.telemetry import start_tracer

        tracer = start_tracer(VERSION)
    except ImportError as error:
        _refuse(because, f"this needs the extra otel: pip install 'tminus[otel]' ({error})")
    except ValueError as error:
        _refuse(because, str(error))
    log.info("traces are sent to %s", address or USUAL)
    return tracer


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _first(names: tuple[str, ...]) -> tuple[str, str]:
    """The first of some variables that is set, with its value; where none is, the last."""
    return next(((name, _value(name)) for name in names if _value(name)), (names[-1], ""))


def _refuse(because: str, why: str) -> NoReturn:
    raise ValueError(f"{because} asks for traces: {why}; --no-traces (TMINUS_TRACES=no) serves without")
