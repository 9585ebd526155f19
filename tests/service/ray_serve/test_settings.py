from typing import Any

import pytest
from pydantic import ValidationError

from tminus.service.ray_serve.settings import RaySettings

STORE = "postgresql://tminus:a-secret@host/jobs"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RaySettings.model_fields:
        monkeypatch.delenv(f"TMINUS_{name.upper()}", raising=False)


def test_what_a_config_file_gives_is_added_to_what_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve makes the arguments of an application so; a password should not be in a file of theirs."""
    monkeypatch.setenv("TMINUS_JOB_STORE", STORE)
    settings = RaySettings.model_validate({"max_replicas": "4", "max_n": 2})
    assert settings.job_store is not None
    assert settings.job_store.get_secret_value() == STORE
    assert (settings.min_replicas, settings.most_replicas, settings.max_n) == (1, 4, 2)
    assert "a-secret" not in repr(settings)


def test_as_many_as_at_least_run_unless_more_may_each_with_a_port_of_those_that_are_named() -> None:
    settings = RaySettings()
    assert (settings.most_replicas, settings.own_ports) == (1, (0,))
    settings = RaySettings(min_replicas=3, job_store=STORE, replica_ports="9200-9202")
    assert (settings.most_replicas, settings.own_ports) == (3, range(9200, 9203))


@pytest.mark.parametrize(
    ("given", "named", "said"),
    [
        ({"max_replicas": 2}, "max_replicas", "need --job-store"),
        ({"min_replicas": 2}, "max_replicas", "need --job-store"),
        ({"min_replicas": 3, "max_replicas": 2, "job_store": STORE}, "max_replicas", "at least --min-replicas"),
        ({"metrics_port": 9100}, "metrics_port", "cannot be set on Ray: each replica has its own"),
        (
            {"job_address": "http://10.0.0.5:8000", "job_store": STORE},
            "job_address",
            "cannot be set on Ray: each replica has its own",
        ),
        ({"target_backlog_s": 0}, "target_backlog_s", "greater than 0"),
        ({"downscale_delay_s": "nan"}, "downscale_delay_s", "finite"),
        ({"device": "cuda", "replica_gpus": 0}, "replica_gpus", "above 0 with --device cuda"),
        *(
            ({"replica_ports": ports}, "replica_ports", "two ports of 1..65535, the first at most the second")
            for ports in ("9200", "0-5", "9300-9200", "9200-65536", "9200-9300-9400")
        ),
    ],
)
def test_a_bad_value_is_refused_by_its_name(given: dict[str, Any], named: str, said: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        RaySettings(**given)
    (error,) = refusal.value.errors()
    assert error["loc"] == (named,)
    assert said in error["msg"]
