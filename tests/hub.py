"""A Hugging Face hub of the tests' own: a real HTTP server that answers what huggingface_hub asks for of a model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(text: str) -> str:
    """A commit of this name."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """A model of the hub: what each commit holds, and which commit each branch or tag is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # without which it is not seen
    gated: bool = False

    def push(self, name: str, files: dict[str, bytes], ref: str = "main") -> str:
        commit = commit_of(name)
        self.commits[commit], self.refs[ref] = files, commit
        return commit


@dataclass
class Hub:
    """What the server has, what is wrong with it, and what was asked of it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # method and path
    answers_html: bool = False
    fails: bool = False  # each answer is 503
    silent: threading.Event = field(default_factory=threading.Event)  # set: a request waits for the end of the test
    ended: threading.Event = field(default_factory=threading.Event)

    def push(self, repository: str, folder: Path, name: str = "first", ref: str = "main") -> str:
        """Put the files of a folder there as a commit."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repositories.setdefault(repository, Repository()).push(name, files, ref)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.silent.is_set():
                hub.ended.wait()
                return
            if hub.fails:
                self._send(503, b"{}", {})
                return
            if hub.answers_html:
                self._send(200, b"<!doctype html><title>Log in to the wireless network</title>", {}, "text/html")
                return
            if path.startswith("/cdn/"):  # where large files are led to
                self._send_file(hub.repositories, path.removeprefix("/cdn/"))
                return
            if path.startswith("/api/models/"):
                model, is_tree, commit = path.removeprefix("/api/models/").partition("/tree/")
                if is_tree:
                    self._list_tree(model, commit)
                else:
                    self._list(*model.partition("/revision/")[::2])
                return
            repository, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._resolve(repository, revision, name)

        def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """Find a commit, or answer as the hub does where there is none, or it is not for everybody."""
            found = hub.repositories.get(repository)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if found is None or (found.token is not None and token != found.token):
                headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                self._send(404 if token else 401, b'{"error":"Repository not found"}', headers)
                return None
            if found.gated:
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"}
                self._send(403, b'{"error":"Access is restricted"}', headers)
                return None
            commit = found.refs.get(revision, revision)
            if commit not in found.commits:
                headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
                self._send(404, b'{"error":"Invalid rev id"}', headers)
                return None
            return commit, found.commits[commit]

        def _list(self, repository: str, revision: str) -> None:
            if (found := self._find(repository, revision or "main")) is None:
                return
            commit, files = found
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            document = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(document).encode(), {})

        def _list_tree(self, repository: str, commit: str) -> None:
            """List files as other programs ask for them."""
            if (found := self._find(repository, commit)) is None:
                return
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in found[1].items()
            ]
            self._send(200, json.dumps(entries).encode(), {})

        def _resolve(self, repository: str, revision: str, name: str) -> None:
            if (found := self._find(repository, revision)) is None:
                return
            commit, files = found
            if name not in files:
                self._send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            data = files[name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if name.endswith(".json"):
                self._send(200, data, headers)
                return
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            elsewhere = hub.url.replace("127.0.0.1", "localhost")  # the client follows where it is the same host
            location = {"Location": f"{elsewhere}/cdn/{repository}/{commit}/{name}"}
            self._send(302, b"", headers | linked | location)

        def _send_file(self, repositories: dict[str, Repository], path: str) -> None:
            owner, model, commit, name = path.split("/", 3)
            data = repositories[f"{owner}/{model}"].commits[commit][name]
            self._send(200, data, {}, "application/octet-stream")

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], media_type: str = "application/json"
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
