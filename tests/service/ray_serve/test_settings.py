from typing import Any

import pytest
from pydantic import ValidationError

from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.settings import Settings

STORE = "postgresql://tminus:a-secret@host/jobs"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RaySettings.model_fields:
        monkeypatch.delenv(f"TMINUS_{name.upper()}", raising=False)


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in RaySettings.model_fields.values())


def test_what_a_config_file_gives_is_added_to_what_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve makes the arguments of an application so; a password should not be in a file of theirs."""
    monkeypatch.setenv("TMINUS_JOB_STORE", STORE)
    settings = RaySettings.model_validate({"max_replicas": "4", "max_n": 2})
    assert settings.job_store is not None
    assert settings.job_store.get_secret_value() == STORE
    assert (settings.min_replicas, settings.most_replicas, settings.max_n) == (1, 4, 2)
    assert "a-secret" not in repr(settings)


def test_a_replica_has_any_port_or_one_of_those_that_are_named() -> None:
    assert RaySettings().own_ports == (0,)
    assert RaySettings(replica_ports="9200-9202").own_ports == range(9200, 9203)


def test_as_many_as_at_least_run_unless_more_may() -> None:
    assert RaySettings().most_replicas == 1
    assert RaySettings(min_replicas=3, job_store=STORE).most_replicas == 3


@pytest.mark.parametrize(
    ("given", "named", "said"),
    [
        ({"max_replicas": 2}, "max_replicas", "need --job-store"),
        ({"min_replicas": 2}, "max_replicas", "need --job-store"),
        ({"min_replicas": 3, "max_replicas": 2, "job_store": STORE}, "max_replicas", "at least --min-replicas"),
        ({"min_replicas": 0}, "min_replicas", "greater than or equal to 1"),
        ({"max_replicas": 1001}, "max_replicas", "less than or equal to 1000"),
        ({"metrics_port": 9100}, "metrics_port", "one of its own"),
        ({"job_address": "http://10.0.0.5:8000", "job_store": STORE}, "job_address", "one of its own"),
        ({"target_backlog_s": 0}, "target_backlog_s", "greater than 0"),
        ({"target_backlog_s": "inf"}, "target_backlog_s", "finite"),
        ({"upscale_delay_s": -1}, "upscale_delay_s", "greater than or equal to 0"),
        ({"downscale_delay_s": "nan"}, "downscale_delay_s", "finite"),
        ({"device": "cuda", "replica_gpus": 0}, "replica_gpus", "above 0 with --device cuda"),
        *(
            ({"replica_ports": ports}, "replica_ports", "two ports of 1..65535, the first at most the second")
            for ports in ("9200", "0-5", "9300-9200", "9200-65536", "9200-9300-9400", "-", "")
        ),
        ({"replica_gpus": 2}, "replica_gpus", "less than or equal to 1"),
        ({"replica_cpus": 0}, "replica_cpus", "greater than 0"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(given: dict[str, Any], named: str, said: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        RaySettings(**given)
    (error,) = refusal.value.errors()
    assert error["loc"] == (named,)
    assert said in error["msg"]


def test_the_settings_of_a_server_are_all_there() -> None:
    assert RaySettings.model_fields.keys() > Settings.model_fields.keys()
