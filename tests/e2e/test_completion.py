"""What Tab makes of a command line of tminus, in a real bash on a terminal of its own."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT

PATIENCE_S = 60.0
CLEAR = "\x15"  # Ctrl-U
Press = Callable[[str, str], None]

# As the script that pip installs, of this checkout.
SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
sys.argv[0] = "tminus"
from tminus.__main__ import main
main()
"""


@pytest.fixture
def press(tmp_path: Path) -> Iterator[Press]:
    """Type a text and Tab in a bash with the completion that the docs describe, until it shows what is expected."""
    if (bash := shutil.which("bash")) is None:
        pytest.skip("there is no bash")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "tminus"
    script.write_text(SCRIPT.format(python=sys.executable, root=str(ROOT)))
    script.chmod(0o755)
    (tmp_path / "rc").write_text(f"cd {tmp_path}\nPS1='ready$ '\nbind 'set bell-style none'\n")
    (tmp_path / "runs" / "of-digits").mkdir(parents=True)
    (tmp_path / "runs" / "of-notes.txt").touch()
    terminal, other = pty.openpty()
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TERM": "dumb", "COLUMNS": "200"}
    shell = subprocess.Popen(
        [bash, "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i"],
        stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(other)
    shown = ""

    def wait_for(expected: str) -> None:
        nonlocal shown
        give_up = time.monotonic() + PATIENCE_S
        while not re.search(expected, shown):
            left = give_up - time.monotonic()
            assert left > 0, f"{expected!r} was not shown, but {shown!r}"
            if select.select([terminal], [], [], left)[0]:
                shown += os.read(terminal, 4096).decode()

    def press(text: str, expected: str) -> None:
        nonlocal shown
        shown = ""
        os.write(terminal, f"{CLEAR}{text}\t".encode())
        wait_for(expected)

    wait_for(r"ready\$ ")
    os.write(terminal, b'eval "$(_TMINUS_COMPLETE=bash_source tminus)" && echo com"pl"ete\n')
    wait_for("complete\r\n")
    yield press
    shell.kill()
    shell.wait()
    os.close(terminal)


@pytest.mark.long
def test_commands_options_values_and_folders_are_completed(press: Press) -> None:
    press("tminus se", "tminus serve ")
    press("tminus serve --exec", "--executor ")
    press("tminus sample --executor ea", "--executor eager ")
    press("tminus sample --sampler dpmpp_2m_", "--sampler dpmpp_2m_sde ")
    press("tminus serve --checkpoint runs/of-", "runs/of-digits/")
    press("tminus sample --checkpoint runs/of-", "runs/of-digits/")
    press("tminus train --data fash", "--data fashion-mnist ")
    press("tminus train --data runs/of-", "runs/of-digits/")
    press("tminus inspect --js", "--json ")
