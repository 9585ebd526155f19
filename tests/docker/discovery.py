"""What a cluster tells kubectl before anything else: which kinds of objects it has.

Without an answer to that, kubectl does not even make a dry run on the client's side. The kinds are those of a release
of Kubernetes, as its own OpenAPI document lists them, and the resources that others define. It has no objects.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema"
NOT_IN_A_NAMESPACE = ("Namespace", "Node", "PersistentVolume")
Kinds = dict[tuple[str, str], set[str]]  # by group and version


def kinds_of(release: str) -> Kinds:
    """Every kind of a release, as 1.32."""
    text = (SCHEMAS / f"v{release}.0-local-strict" / "_definitions.json").read_text()
    found: Kinds = defaultdict(set)
    for definition in json.loads(text)["$defs"].values():
        for kind in definition.get("x-kubernetes-group-version-kind", ()):
            found[kind["group"], kind["version"]].add(kind["kind"])
    return found


def plural(kind: str) -> str:
    """The name of a kind's objects in paths."""
    name = kind.lower()
    if name.endswith("y"):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith("s") else f"{name}s"


def answer(path: str, kinds: Kinds) -> dict[str, Any]:
    """What a cluster says at a path."""
    groups = defaultdict(list)
    for group, version in kinds:
        if group:
            groups[group].append({"groupVersion": f"{group}/{version}", "version": version})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [
            {"name": name, "versions": versions, "preferredVersion": versions[0]} for name, versions in groups.items()
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    root, *rest = path.strip("/").split("/")
    group, version = ("", *rest) if root == "api" and len(rest) == 1 else (rest if len(rest) == 2 else ("", ""))
    if (group, version) in kinds:
        resources = [
            {
                "name": plural(kind),
                "kind": kind,
                "namespaced": kind not in NOT_IN_A_NAMESPACE,
                "verbs": ["create", "get", "patch"],
            }
            for kind in sorted(kinds[group, version])
        ]
        name = f"{group}/{version}".lstrip("/")
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources}
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


@contextmanager
def cluster(kinds: Kinds) -> Iterator[str]:
    """The URL of one without objects."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = answer(self.path.partition("?")[0], kinds)
            body = json.dumps(document).encode()
            self.send_response(document.get("code", 200))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # kubectl asks for all groups at once

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)
