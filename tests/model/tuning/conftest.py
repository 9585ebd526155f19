from pathlib import Path

import pytest

from tests.model.tuning.nets import save_net


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_net(tmp_path / "net")
