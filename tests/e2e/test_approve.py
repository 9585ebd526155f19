"""A server that finds out while no job runs whether bfloat16 does harm."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import serving
from tminus.model.checkpoint import load_checkpoint
from tminus.service.engine import approval

SPEC = {"n": 2, "steps": 5, "seed": 7, "class_label": 1, "sampler": "ddim"}


def hurry() -> None:
    """Have the server make as few images as it ever makes."""
    approval.BUDGET_S = 0.0


@pytest.mark.long
def test_images_are_the_same_while_bfloat16_is_looked_into_and_until_the_next_start(
    small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    flags = ("--approve-when-idle", "--executor", "eager", "--threads", "1", "--cache-dir", str(tmp_path / "cache"))
    with serving(folder, *flags, "--result-cache-mb", "0", prepare=hurry) as server:
        before = server.post(json=SPEC)
        assert before.status_code == 200, before.text
        server.wait_until(lambda: "comparing eager in bfloat16" in server.log)
        assert server.post(json=SPEC).content == before.content
        server.wait_until(lambda: "bfloat16 is approved for eager" in server.log)
        after = server.post(json=SPEC)
        assert after.content == before.content
        assert after.headers["X-Fingerprint"] == before.headers["X-Fingerprint"]
    assert load_checkpoint(folder).approved.keys() == {("eager", "bfloat16")}
