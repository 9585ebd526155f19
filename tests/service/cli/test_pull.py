"""`tminus pull`, from a real HTTP server that keeps to what it should do, or does not."""

import http.server
import os
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.receivers import make_certificate
from tests.service.cli import running
from tests.wheel import ROOT
from tminus.model.archives import pack, release
from tminus.model.checkpoint import load_checkpoint
from tminus.service.cli import pull

NAME = "pixel-art-32"
FOLDER = ROOT / "checkpoints" / NAME
DATA = pack(FOLDER)
Request = http.server.BaseHTTPRequestHandler
Answer = Callable[[Request], None]


@dataclass
class Files:
    """A server of files: what it answers, and for what it was asked."""

    url: str
    answer: Answer
    asked: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)  # when the test has


@contextmanager
def serving(answer: Answer, certificate: Path | None = None) -> Iterator[Files]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.asked.append(self.path)
            try:
                files.answer(self)
            except OSError:  # the client has enough
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    files = Files(f"http://127.0.0.1:{server.server_port}", answer)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        files.url = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield files
    finally:
        files.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def sends(data: bytes, status: int = 200, **headers: str) -> Answer:
    """Answers with a body and its length, or what the headers say."""

    def answer(request: Request) -> None:
        request.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            if value:
                request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def leads_to(url: str) -> Answer:
    return sends(b"", 302, Location=url)


@pytest.fixture
def files() -> Iterator[Files]:
    with serving(sends(DATA)) as running_server:
        yield running_server


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the command runs."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refusal(files: Files, *arguments: str) -> str:
    """The line in which the command ends; nothing is left behind."""
    before = sorted(Path.cwd().rglob("*"))
    line = running.refusal("pull", NAME, "--from", files.url, *arguments)
    assert sorted(Path.cwd().rglob("*")) == before
    return line.removeprefix("tminus: ")


def contents(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- what is fetched ---


@pytest.mark.parametrize("name", release().archives)
def test_a_checkpoint_that_is_fetched_is_that_of_the_release_and_can_be_served_as_the_last_line_says(
    files: Files, name: str, here: Path
) -> None:
    files.answer = sends(pack(ROOT / "checkpoints" / name))
    result = running.run("pull", name, "--from", f"{files.url}/release/")
    assert result.exit_code == 0, result.output
    assert files.asked == [f"/release/{name}.tar"]
    assert contents(here / name) == contents(ROOT / "checkpoints" / name)
    assert [path.name for path in here.iterdir()] == [name]
    *_, program, command, flag, folder = shlex.split(result.stdout.splitlines()[-1])
    assert (program, command, flag) == ("tminus", "serve", "--checkpoint")
    assert load_checkpoint(Path(folder)).name == name


def test_the_folder_and_the_server_can_be_chosen(files: Files, here: Path) -> None:
    result = running.run("pull", NAME, "--out", "some folder/model", TMINUS_PULL_FROM=files.url)
    assert result.exit_code == 0, result.output
    assert contents(here / "some folder" / "model") == contents(FOLDER)
    assert result.stdout.endswith("tminus serve --checkpoint 'some folder/model'\n")


def test_without_a_name_it_lists_what_there_is(files: Files) -> None:
    result = running.run("pull", "--from", files.url)
    assert result.exit_code == 0
    for name, archive in release().archives.items():
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
        assert f"{archive.size_bytes / 1e6:.1f} MB" in line
        assert line.endswith(archive.about)
    assert files.asked == []


# --- what is refused ---


def cut(request: Request) -> None:
    sends(DATA[:100_000], Content_Length=str(len(DATA)))(request)
    request.close_connection = True


def half_and_then_a_byte_now_and_then(request: Request, files: Files) -> None:
    sends(DATA[: len(DATA) // 2], Content_Length=str(len(DATA)))(request)
    for _ in range(500):
        if not files.ended.wait(0.01):
            request.wfile.write(b"0")
    request.close_connection = True


def half_and_then_nothing(request: Request, files: Files) -> None:
    sends(DATA[: len(DATA) // 2], Content_Length=str(len(DATA)))(request)
    files.ended.wait(60)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (sends(b"", 404), "the answer is 404 Not Found"),
        (sends(b"", 500), "the answer is 500 Internal Server Error"),
        (sends(b"", 302), "the answer is 302 Found"),  # which leads nowhere
        (sends(b"<html>", Content_Type="text/html; charset=utf-8"), "is a web page, not an archive"),
        (sends(DATA + b"0"), f"has {len(DATA) + 1} bytes, must have {len(DATA)}"),
        (sends(DATA + b"0", Content_Length=""), f"has more than the {len(DATA)} bytes that it must have"),
        (sends(DATA[:-1], Content_Length=""), f"ends after {len(DATA) - 1} of {len(DATA)} bytes"),
        (cut, "peer closed connection without sending complete message body"),
        (lambda request: request.wfile.write(b"no HTTP\r\n\r\n"), "illegal status line"),
        (leads_to("ftp://localhost/file"), "redirects to ftp://localhost/file, and only https is followed"),
    ],
)
def test_a_server_that_does_not_give_the_file_is_told_of_in_one_line(files: Files, answer: Answer, says: str) -> None:
    files.answer = answer
    line = refusal(files)
    assert line.startswith(f"{files.url}/{NAME}.tar: ")
    assert says in line


def test_another_file_of_the_same_size_is_refused_and_both_hashes_are_named(files: Files) -> None:
    files.answer = sends(DATA[:-1] + b"1")
    done = subprocess.run(["sha256sum"], input=DATA[:-1] + b"1", capture_output=True, check=True)
    expected = subprocess.run(["sha256sum"], input=DATA, capture_output=True, check=True)
    assert refusal(files) == (
        f"{files.url}/{NAME}.tar: has the sha256 {done.stdout[:64].decode()}, must have {expected.stdout[:64].decode()}"
    )


@pytest.mark.parametrize(
    ("answer", "says"),
    [(half_and_then_a_byte_now_and_then, "comes too slowly"), (half_and_then_nothing, "nothing has come for 0.2 s")],
)
def test_a_server_that_is_too_slow_is_given_up(
    files: Files, answer: Callable[[Request, Files], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "PATIENCE_S", 0.2)
    files.answer = lambda request: answer(request, files)
    assert says in refusal(files)


def test_a_redirect_to_plain_http_is_not_followed(files: Files) -> None:
    with serving(sends(DATA)) as other:
        files.answer = leads_to(f"{other.url}/file")
        assert f"redirects to {other.url}/file, and only https is followed" in refusal(files)
        assert other.asked == []


def test_credentials_of_an_address_are_not_repeated(files: Files) -> None:
    files.answer = sends(b"", 404)
    files.url = files.url.replace("http://", "http://me:secret@")
    assert "secret" not in refusal(files)


def test_what_is_there_is_left_as_it_is_and_no_server_is_asked(files: Files, here: Path) -> None:
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    (here / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert (
            refusal(files, "--out", name)
            == f"{name} exists already, and is left as it is; name another folder with --out"
        )
    assert (here / "file").read_text() == "mine"
    assert "File exists" in refusal(files, "--out", "file/below")
    assert files.asked == []


# --- in processes of their own ---


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tminus", "pull", NAME, *arguments]


def test_ctrl_c_leaves_nothing_half_written(files: Files, here: Path) -> None:
    files.answer = lambda request: half_and_then_nothing(request, files)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command("--from", files.url), stderr=subprocess.PIPE, text=True, env=env) as process:
        while not [file for file in here.rglob("*.tar") if file.stat().st_size]:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "tminus: interrupted\n")
    assert list(here.iterdir()) == []


def test_redirects_from_https_to_https_are_followed_a_few_times_and_none_to_http(
    files: Files, here: Path, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    env = os.environ | {"SSL_CERT_FILE": str(certificate), "PYTHONPATH": str(ROOT)}
    with serving(sends(DATA), certificate) as secure:

        def answer(request: Request) -> None:
            _, place, file = request.path.split("/")
            leads = {"once": f"/there/{file}", "ever": f"/ever/{file}", "down": f"{files.url}/{file}"}
            (sends(DATA) if place == "there" else leads_to(leads[place]))(request)

        secure.answer = answer

        def end(place: str) -> tuple[int, str]:
            asked = command("--from", f"{secure.url}/{place}", "--out", place)
            done = subprocess.run(asked, capture_output=True, text=True, timeout=60, env=env, check=False)
            return done.returncode, done.stderr

        assert end("once") == (0, "")
        assert contents(here / "once") == contents(FOLDER)
        assert secure.asked == [f"/once/{NAME}.tar", f"/there/{NAME}.tar"]
        where = f"tminus: {secure.url}"
        assert end("ever") == (1, f"{where}/ever/{NAME}.tar: redirects more than 5 times\n")
        leads = f"redirects to {files.url}/{NAME}.tar, and only https is followed"
        assert end("down") == (1, f"{where}/down/{NAME}.tar: {leads}\n")
        assert files.asked == []
