"""Real servers on a real PostgreSQL: a small form of tests/trials/replicas.py, each fault once."""

from pathlib import Path

import pytest

from tests.trials import replicas

pytestmark = pytest.mark.slow


def test_whatever_happens_to_a_server_or_the_database_each_job_ends_once_in_the_same_bytes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "LEASE_S", 2.0)
    claims = replicas.trial(small, dict.fromkeys(replicas.FAULTS, 1), jobs=6, count=2)
    for claim in claims[:4]:  # the last is a time
        assert claim.holds, claim
