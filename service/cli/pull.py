"""`tminus pull`: downloads a checkpoint from a release of the project, and checks its hash."""

import hashlib
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tminus.model.archives import Archive, file_name, release, unpack
from tminus.service.cli.output import aligned, fail, failing_in_one_line, make_folder, say
from tminus.service.engine.protocol import BUNDLED

if TYPE_CHECKING:
    import httpx

FROM = "TMINUS_PULL_FROM"
MOST_REDIRECTS = 5
PATIENCE_S = 30.0  # the download fails if no data arrives for this time; also the interval between checks of its speed
LEAST_BYTES_PER_S = 8192


class NotFetched(Exception):
    """The server did not send the file. The message says why."""


@click.command(short_help="Fetch another checkpoint of this project.")
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make  [default: NAME, in the current folder]")
@click.option(
    "--from",
    "address",
    metavar="URL",
    envvar=FROM,
    help="Address of a copy of the release's files; they must have the same hashes  "
    f"[default: the release of this version] [env: {FROM}]",
)
def pull(name: str | None, out: Path | None, address: str | None) -> None:
    """Download the checkpoint NAME from this project's release. Without NAME, list the checkpoints.

    \b
      tminus pull
      tminus pull pixel-art-32
      tminus serve --checkpoint pixel-art-32

    The file must have the size and the sha256 that are recorded in this version of tminus.
    """
    known = release()
    if name is None:
        cells = [(each, f"{pinned.size_bytes / 1e6:.1f} MB", pinned.about) for each, pinned in known.archives.items()]
        say(aligned([("NAME", "SIZE", "WHAT IT IS"), *cells]))
        say("tminus pull NAME fetches one.")
        return
    if name == BUNDLED.name:
        fail(f"{name} comes with tminus: `tminus serve` serves it")
    if name not in known.archives:
        fail(f"NAME must be one of {', '.join(known.archives)}, got {name!r}")
    folder = out if out is not None else Path(name)
    where = f"--out {folder}"
    if folder.exists() or folder.is_symlink():
        fail(f"{folder} exists already, and is left as it is; name another folder with --out")
    make_folder(where, folder.parent)
    with failing_in_one_line(where), tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        file = Path(made) / file_name(name)
        fetch(f"{(address or known.address).rstrip('/')}/{file.name}", known.archives[name], file)
        unpack(file, Path(made))
        (Path(made) / name).rename(folder)
    say(f"{folder}: {known.archives[name].about}. Serve it: tminus serve --checkpoint {shlex.quote(str(folder))}")


def fetch(url: str, archive: Archive, file: Path) -> None:
    """Download an archive to a file. Exits with 1 on an error."""
    import httpx

    shown = url
    try:
        shown = str(httpx.URL(url).copy_with(userinfo=b""))
        client = httpx.Client(timeout=PATIENCE_S, headers={"Accept-Encoding": "identity"})
        with client, following(client, url) as answer:
            check_head(answer, archive)
            write_body(answer, archive, file)
    except NotFetched as error:
        fail(f"{shown}: {error}")
    except httpx.TimeoutException:
        fail(f"{shown}: nothing has come for {PATIENCE_S:g} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"{shown}: {error}")


@contextmanager
def following(client: "httpx.Client", url: str) -> "Iterator[httpx.Response]":
    """Send a request, and follow redirects to https. httpx itself would read the body of each redirect."""
    request = client.build_request("GET", url)
    for _ in range(MOST_REDIRECTS + 1):
        answer = client.send(request, stream=True)
        try:
            if answer.next_request is None:
                yield answer
                return
            request = answer.next_request
        finally:
            answer.close()
        if request.url.scheme != "https":
            raise NotFetched(f"redirects to {request.url}, and only https is followed")
    raise NotFetched(f"redirects more than {MOST_REDIRECTS} times")


def check_head(answer: "httpx.Response", archive: Archive) -> None:
    """Raise NotFetched if the status or the headers of a response show that it is not the archive."""
    if answer.status_code != 200:
        raise NotFetched(f"the answer is {answer.status_code} {answer.reason_phrase}".rstrip())
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise NotFetched("is a web page, not an archive")
    if (length := answer.headers.get("Content-Length", str(archive.size_bytes))) != str(archive.size_bytes):
        raise NotFetched(f"has {length} bytes, must have {archive.size_bytes}")


def write_body(answer: "httpx.Response", archive: Archive, file: Path) -> None:
    """Write the body of a response to a file, with a progress bar.

    Raises NotFetched if the body is not the archive, or if it arrives too slowly.
    """
    from tqdm import tqdm

    size_bytes, came_bytes, digest = archive.size_bytes, 0, hashlib.sha256()
    since_s, before_bytes = time.monotonic(), 0
    with file.open("wb") as written, tqdm(total=size_bytes, unit="B", unit_scale=True, disable=None) as progress:
        for part in answer.iter_raw():
            came_bytes += len(part)
            if came_bytes > size_bytes:
                raise NotFetched(f"has more than the {size_bytes} bytes that it must have")
            written.write(part)
            digest.update(part)
            progress.update(len(part))
            if (now_s := time.monotonic()) - since_s > PATIENCE_S:
                if came_bytes - before_bytes < LEAST_BYTES_PER_S * PATIENCE_S:
                    raise NotFetched(f"comes too slowly: {came_bytes} of {size_bytes} bytes are here")
                since_s, before_bytes = now_s, came_bytes
    if came_bytes < size_bytes:
        raise NotFetched(f"ends after {came_bytes} of {size_bytes} bytes")
    if (found := digest.hexdigest()) != archive.sha256:
        raise NotFetched(f"has the sha256 {found}, must have {archive.sha256}")
