import gc
import re
import weakref
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import click.testing
import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from tests.receivers import SECRET
from tests.service.fakes import INFO, FakeEngine
from tests.service.keys import key_line
from tminus.service.access.access import Access
from tminus.service.api.edge.origin import Doors
from tminus.service.cli import main as cli
from tminus.service.cli.configuration import shown
from tminus.service.engine.loading import Loaded
from tminus.service.engine.options import BUNDLED, LoadOptions
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.objects import open_objects as really_open_objects
from tminus.service.jobs.store.postgres_store import open_postgres as really_open_postgres
from tminus.service.jobs.store.results import Results
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.jobs.webhooks.receivers import Allowed
from tminus.service.model_info import Limits
from tminus.service.scheduling.scheduler import Sharing
from tminus.service.startup.library import Library
from tminus.service.startup.model_changes import Prepare
from tminus.service.startup.parts import Prepared
from tminus.service.startup.settings import Settings

TWO_SIDED = ("exact", "open", "metrics", "docs")
DATABASE = "postgresql://tminus:a-secret@host/jobs"
WEBHOOK_SECRETS = Path(__file__).with_name("webhook_secrets_of_the_tests.txt")
KEYS_FILE = Path(__file__).with_name("keys_of_the_tests.txt")
LINE = key_line("studio", "the-secret")
LISTENER = SimpleNamespace(getsockname=lambda: ("127.0.0.1", 8000), close=lambda: None)
METRICS_LISTENER = SimpleNamespace()
APP = SimpleNamespace(metrics="what is counted")

# Each field with a text that is not its default, and what the text means.
GIVEN: dict[str, tuple[str, Any]] = {
    "checkpoint": ("some/folder", Path("some/folder")),
    "models": ("some/models", Path("some/models")),
    "keys_file": (str(KEYS_FILE), KEYS_FILE),
    "keys": (LINE, LINE),
    "open": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "threads": ("3", 3),
    "executor": ("openvino", "openvino"),
    "precision": ("bfloat16", "bfloat16"),
    "exact": ("false", False),
    "policy": ("fcfs", "fcfs"),
    "cache_dir": ("some/cache", Path("some/cache")),
    "max_n": ("7", 7),
    "max_batch": ("9", 9),
    "short_batch": ("7", 7),
    "max_jobs": ("11", 11),
    "max_connections": ("99", 99),
    "max_connections_per_address": ("17", 17),
    "max_streams_per_address": ("17", 17),
    "allowed_hosts": ("a.example,b", "a.example,b"),
    "allowed_origins": ("https://a.example,https://b.example:8080", "https://a.example,https://b.example:8080"),
    "max_rows": ("13", 13),
    "max_backlog_s": ("1.5", 1.5),
    "result_cache_mb": ("5", 5),
    "state_dir": ("some/state", "some/state"),
    "job_store": (DATABASE, DATABASE),
    "job_namespace": ("studio", "studio"),
    "job_lease_s": ("2.5", 2.5),
    "job_address": ("http://10.0.0.5:8000", "http://10.0.0.5:8000"),
    "job_results": ("s3://bucket/jobs", "s3://bucket/jobs"),
    "job_results_above_kb": ("5", 5),
    "keep_jobs_s": ("1.5", 1.5),
    "keep_jobs_mb": ("5", 5),
    "webhook_secret": (SECRET, SECRET),
    "webhook_secret_file": (str(WEBHOOK_SECRETS), WEBHOOK_SECRETS),
    "webhook_allow": ("hooks.internal,10.0.0.0/8", "hooks.internal,10.0.0.0/8"),
    "webhook_retry_s": ("5", 5.0),
    "max_body_bytes": ("2048", 2048),
    "max_image_bytes": ("4096", 4096),
    "metrics": ("false", False),
    "metrics_port": ("9100", 9100),
    "metrics_host": ("::1", "::1"),
    "docs": ("false", False),
    "grace_s": ("0.25", 0.25),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}

# Good values, for those that no number is one for.
OTHER = {
    "checkpoint": "other",
    "models": "elsewhere",
    "keys_file": "elsewhere",
    "keys": key_line("other", "another-secret"),
    "open": "false",
    "metrics": "true",
    "metrics_host": "127.0.0.2",
    "docs": "true",
    "device": "cpu",
    "host": "::1",
    "executor": "eager",
    "precision": "float32",
    "exact": "true",
    "policy": "srpt",
    "cache_dir": "elsewhere",
    "allowed_hosts": "*",
    "allowed_origins": "*",
    "state_dir": "elsewhere",
    "job_store": "postgresql://elsewhere/jobs",
    "job_namespace": "elsewhere",
    "job_address": "http://10.0.0.6",
    "job_results": "s3://elsewhere",
    "webhook_secret": "whsec_" + "A" * 32,
    "webhook_secret_file": "elsewhere",
    "webhook_allow": "elsewhere",
    "log_format": "text",
    "log_level": "error",
}

SECRETS = ("keys", "job_store", "webhook_secret")
OF_RESULTS = ("job_results", "job_results_above_kb")
TICK_TIMES = ((1, 0.5), (16, 2.0))

BAD = [
    ("keys", "a secret by mistake"),
    ("keys", "# none"),
    ("keys_file", "no/such/file"),
    ("job_store", "mysql://host/jobs"),
    ("job_store", "no-url-and-a-secret"),
    ("job_namespace", "Studio"),
    ("job_namespace", "a-b"),
    ("job_namespace", ""),
    ("job_namespace", "a" * 49),
    ("job_address", "10.0.0.5:8000"),
    ("job_address", "http://10.0.0.5/path"),
    ("job_results", "gs://bucket"),
    ("job_results", "bucket"),
    ("job_results", "s3://bucket/../other"),
    ("job_results_above_kb", "-1"),
    ("job_results_above_kb", "1048577"),
    ("webhook_secret", "a secret by mistake"),
    ("webhook_secret", "whsec_short"),
    ("webhook_secret_file", "no/such/file"),
    ("webhook_allow", "http://hooks.internal"),
    ("webhook_allow", "10.0.0.0/33"),
    ("webhook_retry_s", "-1"),
    ("webhook_retry_s", "604801"),
    ("webhook_retry_s", "nan"),
    ("job_lease_s", "0.9"),
    ("job_lease_s", "601"),
    ("open", "perhaps"),
    ("metrics", "9100"),
    ("metrics_port", "0"),
    ("metrics_port", "65536"),
    ("docs", "perhaps"),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "http"),
    ("threads", "0"),
    ("threads", "1025"),
    ("threads", "many"),
    ("max_n", "0"),
    ("max_n", "1025"),
    ("max_n", "1.5"),
    ("executor", "onnx"),
    ("executor", "Eager"),
    ("executor", ""),
    ("precision", "float16"),
    ("precision", "bf16"),
    ("exact", "perhaps"),
    ("policy", "lifo"),
    ("policy", ""),
    ("result_cache_mb", "-1"),
    ("result_cache_mb", "65537"),
    ("result_cache_mb", "much"),
    ("allowed_hosts", "http://studio.example"),
    ("allowed_hosts", "a b"),
    ("allowed_hosts", "\u017ftudio.example"),  # a long s
    ("allowed_origins", "studio.example"),
    ("allowed_origins", "https://b\u00fccher.example"),  # browsers send xn--bcher-kva.example
    ("allowed_origins", "http\u017f://studio.example"),
    ("allowed_origins", "https://studio.example/"),
    ("allowed_origins", "https://a.example https://b.example"),
    ("max_batch", "1"),
    ("max_batch", "3"),
    ("max_batch", "4097"),
    ("short_batch", "3"),
    ("short_batch", "4097"),
    ("max_jobs", "0"),
    ("max_jobs", "10001"),
    ("max_connections", "7"),
    ("max_rows", "1"),
    ("max_rows", "3"),
    ("max_rows", "1000001"),
    ("max_backlog_s", "0"),
    ("max_backlog_s", "-1"),
    ("max_backlog_s", "soon"),
    ("max_backlog_s", "nan"),
    ("max_backlog_s", "inf"),
    ("keep_jobs_s", "0"),
    ("keep_jobs_s", "inf"),
    ("keep_jobs_mb", "0"),
    ("keep_jobs_mb", "much"),
    ("max_body_bytes", "1023"),
    ("max_image_bytes", "1023"),
    ("max_image_bytes", "268435457"),
    ("grace_s", "-0.1"),
    ("grace_s", "nan"),
    ("grace_s", "inf"),
    ("log_level", "loud"),
    ("log_level", "INFO"),
    ("log_level", ""),
]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def given(name: str, text: str) -> list[str]:
    """The arguments that give a setting."""
    if name in TWO_SIDED:
        return [flag(name) if text == "true" else flag(f"no_{name}")]
    more = [flag("job_store"), DATABASE] if name in ("job_namespace", "job_lease_s", "job_address") else []
    more += [flag("webhook_secret"), SECRET] if name in ("webhook_allow", "webhook_retry_s") else []
    more += [flag("job_results"), "s3://bucket/jobs"] if name == "job_results_above_kb" else []
    return [flag(name), text, *more]


def plain(name: str, made: Any) -> Any:
    """A setting as it was given."""
    if name == "checkpoint":
        return Path(*made)
    return made.get_secret_value() if name in SECRETS else made


def variable(name: str) -> str:
    return f"TMINUS_{name.upper()}"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


@dataclass(eq=False)
class FakeCheckpoint:
    weights_hash: str
    name: str


class Served(dict[str, Any]):
    """What `serve` handed to the parts it starts, instead of starting them."""


Serve = Callable[..., tuple[click.testing.Result, Served]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Runs `tminus serve` with its engine, socket, app and server taken away."""

    def run(*arguments: str, **variables: str) -> tuple[click.testing.Result, Served]:
        served, store = Served(), SqliteStore(None)

        read_once: list[weakref.ref[FakeCheckpoint]] = []

        def read(options: LoadOptions) -> FakeCheckpoint:
            served.update({name: getattr(options, name) for name in LoadOptions.__slots__})
            name = options.checkpoint.name
            checkpoint = FakeCheckpoint(INFO.weights_hash if name != "extra" else "cd" * 32, name)
            read_once.append(weakref.ref(checkpoint))
            return checkpoint

        def prepare_engine(checkpoint: FakeCheckpoint, options: LoadOptions, known: None, *, busy: bool) -> Loaded:
            assert not busy
            places = options.max_batch or 16, options.short_batch or 8
            return Loaded(FakeEngine(), options.max_rows or 100, *places, TICK_TIMES)  # type: ignore[arg-type]

        def folders(library: Library) -> dict[str, Path]:
            return dict(library.named) | ({"extra": library.folder / "extra"} if library.folder is not None else {})

        def bind(host: str, port: int) -> SimpleNamespace:
            if "host" in served:  # the first is that of the server
                served.update(metrics_host=host, metrics_port=port)
                return METRICS_LISTENER
            served.update(host=host, port=port)
            return LISTENER

        def create_app(
            first: list[Prepared],
            limits: Limits,
            take_store: Callable[[str], JobStore],
            doors: Doors,
            *,
            library: Library,
            prepare: Prepare,
            access: Access,
            results: Results | None,
            webhooks: Rules | None,
            with_metrics: bool,
            with_docs: bool,
            traces: object,
            end_file: None,
        ) -> SimpleNamespace:
            if len(first) > 1:
                gc.collect()
                assert {each() for each in read_once} == {None}, "an unloaded model's weights would stay for ever"
            assert [take_store(each.engine.info.weights_hash) for each in first] == [store] * len(first)
            sharing = first[0].speed.sharing
            served.update(limits=limits, sharing=sharing, policy=sharing.policy)
            served.update(tick_times=first[0].speed.tick_times.points, models=library.folder)
            if results is not None:
                served.update(job_results=results.objects, job_results_above_kb=results.above_bytes // 1024)
            if webhooks is not None:
                served.update(webhooks=webhooks, webhook_retry_s=webhooks.retry_s)
            served.update(access=access, metrics=with_metrics, docs=with_docs, traces=traces)
            served.update(allowed_origins=doors.origins, allowed_hosts=doors.hosts)
            served.update(names=[each.engine.info.name for each in first], library=library)
            return APP

        def open_store(state_dir: str, weights_hash: str) -> SqliteStore:
            served.update(state_dir=state_dir)
            return store

        def open_postgres(url: str, namespace: str, lease_s: float, address: str | None) -> Callable[[str], JobStore]:
            if not url.startswith("postgresql://"):
                return really_open_postgres(url, namespace, lease_s)
            served.update(job_store=url, job_namespace=namespace, job_lease_s=lease_s, job_address=address)
            return lambda weights_hash: store

        def open_objects(url: str, folder: str) -> str:
            if not re.match("s3://[a-z]+(/[a-z]+)?$", url):
                return really_open_objects(url, folder)  # type: ignore[return-value]
            return url

        def run_server(
            build: Callable[[], object], listener: object, *, max_message_bytes: int, **values: object
        ) -> bool:
            assert (build(), listener) == (APP, LISTENER)
            assert max_message_bytes == served["limits"].max_edit_bytes
            served.update(values, ran=True)
            return True

        monkeypatch.setattr("tminus.service.engine.loading.read_checkpoint", read)
        monkeypatch.setattr("tminus.service.engine.loading.prepare_engine", prepare_engine)
        monkeypatch.setattr("tminus.service.startup.building.create_app", create_app)
        monkeypatch.setattr(Library, "folders", folders)
        monkeypatch.setattr("tminus.service.startup.building.look_at_ends", lambda _settings, _folder: (None, []))
        monkeypatch.setattr("tminus.service.startup.building.open_store", open_store)
        monkeypatch.setattr("tminus.service.jobs.store.postgres_store.open_postgres", open_postgres)
        monkeypatch.setattr("tminus.service.jobs.store.objects.open_objects", open_objects)
        monkeypatch.setattr("tminus.service.startup.server.bind", bind)
        monkeypatch.setattr("tminus.service.startup.server.serve", run_server)
        monkeypatch.setattr(
            "tminus.service.cli.serve.set_up_log", lambda _level, _form, kind: served.update(log_format=kind)
        )
        monkeypatch.setattr("tminus.service.cli.serve.start_traces", lambda _version: "what sends spans")
        monkeypatch.setattr(
            "tminus.service.startup.metrics_server.serve_metrics",
            lambda listener, application, doors: served.update(
                for_metrics=listener, counted=application, metrics_hosts=doors.hosts
            ),
        )
        result = click.testing.CliRunner().invoke(cli.main, ["serve", *arguments], env=variables)
        store.close()
        return result, served

    return run


def arrived(served: Served, name: str) -> Any:
    """Where a setting must have come to."""
    if name in ("keys", "keys_file"):
        assert served["access"].with_secret("the-secret").name == "studio"
        return GIVEN[name][1]
    if name in ("webhook_secret", "webhook_secret_file"):
        assert served["webhooks"].sender._secrets == (b64decode(SECRET.removeprefix("whsec_")),)
        return GIVEN[name][1]
    if name == "webhook_allow":
        assert "webhooks" not in served or served["webhooks"].allowed == Allowed.parse(GIVEN[name][0])
        return GIVEN[name][1]
    if name in (
        "metrics_host",
        "job_namespace",
        "job_lease_s",
        "job_address",
        "webhook_retry_s",
        *OF_RESULTS,
    ):  # of no use without another
        return served.get(name, GIVEN[name][1])
    if name == "open":
        return served["access"].is_open
    if name in {field.name for field in fields(Limits)}:
        return getattr(served["limits"], name)
    if name == "allowed_origins":
        return ",".join(sorted(served[name]))
    if name == "allowed_hosts":  # the name to listen on is one of them
        return ",".join(sorted(served[name] - {served["host"]}))
    if name == "short_batch":
        return served["sharing"].short_batch
    if name == "keep_jobs_mb":
        return served["limits"].keep_jobs_bytes / 2**20
    if name == "result_cache_mb":
        return served["limits"].result_cache_bytes / 2**20
    return served[name]


def test_every_setting_is_tried_here_and_has_a_description() -> None:
    assert GIVEN.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert GIVEN[name][1] != field.default, name


@pytest.mark.parametrize("name", GIVEN)
def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, value = GIVEN[name]
    monkeypatch.setenv(variable(name), text)
    settings = Settings()
    made = getattr(settings, name)
    assert plain(name, made) == value
    assert settings.model_dump() == {**Settings.model_construct().model_dump(), name: made}, "and no other"


@pytest.mark.parametrize("name", GIVEN)
def test_a_flag_and_a_variable_reach_the_part_they_are_for(serve: Serve, name: str) -> None:
    text, value = GIVEN[name]
    for arguments, variables in ((given(name, text), {}), ([], {variable(name): text})):
        result, served = serve(*arguments, **variables)
        assert result.exit_code == 0, result.output
        assert served["ran"]
        assert arrived(served, name) == value


@pytest.mark.parametrize("name", GIVEN)
def test_the_flag_wins_over_the_variable(serve: Serve, name: str) -> None:
    text, value = GIVEN[name]
    other = OTHER.get(name, "1111")
    result, served = serve(*given(name, text), **{variable(name): other})
    assert result.exit_code == 0, result.output
    assert arrived(served, name) == value


@pytest.mark.parametrize("other", [{}, {"TMINUS_EXACT": "true"}, {"TMINUS_EXACT": "false"}])
@pytest.mark.parametrize(("argument", "value"), [("--exact", True), ("--no-exact", False)])
def test_exact_is_a_flag_of_two_sides(serve: Serve, argument: str, value: bool, other: dict[str, str]) -> None:
    result, served = serve(argument, "--port", "0", **other)
    assert result.exit_code == 0, result.output
    assert served["exact"] is value


@pytest.mark.parametrize(
    "arguments", [["--exact", "false"], ["--exact=false"], ["--no-exact=true"], ["--no-port", "5"]]
)
def test_a_flag_of_two_sides_takes_no_value_and_no_other_has_two(serve: Serve, arguments: list[str]) -> None:
    result, served = serve(*arguments)
    assert result.exit_code == 2
    assert not served


def test_without_flags_and_variables_the_defaults_hold(serve: Serve) -> None:
    result, served = serve()
    assert result.exit_code == 0, result.output
    assert served["host"] == "127.0.0.1"
    assert served["port"] == 8000
    assert served["checkpoint"] == BUNDLED
    assert served["limits"] == Limits(
        max_n=64,
        max_batch=16,
        max_rows=100,
        max_jobs=1024,
        max_backlog_s=600,
        max_body_bytes=2**20,
        max_image_bytes=8 * 2**20,
        result_cache_bytes=64 * 2**20,
    )
    assert served["grace_s"] == 30
    assert served["state_dir"] == ""
    sharing = served["sharing"]
    assert sharing == Sharing.of(16, short_batch=8, place_s=2.0 / 16, times=sharing.times)
    assert sharing.times.seconds(16) == 2.0
    assert {name: served[name] for name in ("device", "executor", "precision")} == dict.fromkeys(
        ("device", "executor", "precision"), "auto"
    )
    by_measuring = "exact", "threads", "max_batch", "short_batch", "max_rows", "cache_dir"
    assert {name: served[name] for name in by_measuring} == dict.fromkeys(by_measuring), "left to the machine"
    assert served["traces"] == "what sends spans"
    assert served["tick_times"] == TICK_TIMES, "what was measured is what admission counts with"


def test_origins_are_compared_as_browsers_write_them(serve: Serve) -> None:
    _, served = serve("--allowed-origins", " https://A.example , HTTP://b.example:8080,")
    assert served["allowed_origins"] == {"https://a.example", "http://b.example:8080"}


def test_hosts_are_compared_without_case_and_the_name_to_listen_on_is_one(serve: Serve) -> None:
    _, served = serve("--allowed-hosts", "Diffusion.example, other", "--host", "Studio.local")
    assert served["allowed_hosts"] == {"diffusion.example", "other", "studio.local"}


def test_no_request_is_larger_than_the_rows_held(serve: Serve) -> None:
    result, served = serve("--max-rows", "5")
    assert result.exit_code == 0, result.output
    limits = served["limits"]
    assert (limits.max_n, limits.max_rows) == (5, 5)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_exits_non_zero_with_a_line_that_names_its_flag(serve: Serve, name: str, text: str) -> None:
    ways: list[tuple[list[str], dict[str, str]]] = [([], {variable(name): text})]
    if name not in TWO_SIDED:  # whose flags take no value
        ways.append(([f"{flag(name)}={text}"], {}))
    for arguments, variables in ways:
        result, served = serve(*arguments, **variables)
        assert result.exit_code not in (0, None)
        assert "ran" not in served, "nothing was started"
        assert len(result.stderr.strip().splitlines()) == 1
        assert flag(name) in result.stderr
        assert variable(name) in result.stderr
        assert (text in result.stderr) == (name not in SECRETS), "it is a secret"
        assert "Traceback" not in result.stderr


def test_an_unknown_flag_exits_non_zero_with_its_name(serve: Serve) -> None:
    result, served = serve("--max-bitch", "5")
    assert result.exit_code == 2
    assert "--max-bitch" in result.stderr
    assert not served


def test_settings_do_not_change_once_made() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_help_shows_each_flag_with_its_variable_and_default() -> None:
    result = click.testing.CliRunner().invoke(cli.main, ["serve", "--help"], terminal_width=200)
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for name, field in Settings.model_fields.items():
        assert flag(name) in text
        assert f"[env: {variable(name)}]" in text
        assert field.default in (None, ()) or f"[default: {shown(field.default)}]" in text


def test_a_missing_checkpoint_exits_non_zero_with_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tminus.service.startup.server.bind", lambda host, port: LISTENER)
    folder = tmp_path / "nowhere"
    result = click.testing.CliRunner().invoke(cli.main, ["serve", "--port", "0", "--checkpoint", str(folder)])
    assert result.exit_code == 1
    assert str(folder) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_bad_device_exits_non_zero_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.startup.server.bind", lambda host, port: LISTENER)
    result = click.testing.CliRunner().invoke(cli.main, ["serve", "--port", "0", "--device", "toaster"])
    assert result.exit_code == 1
    assert "'toaster'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- who may ask ---


def test_other_machines_are_let_in_with_keys_or_by_a_flag_only() -> None:
    for address in ("0.0.0.0", "::", "192.0.2.1", "fe80::1"):
        with pytest.raises(ValueError, match=r"--host .* --keys-file .* --open"):
            Settings(host=address).access(address)
        assert Settings(host=address, open=True).access(address).is_open
        assert not Settings(host=address, keys=SecretStr(LINE)).access(address).is_open
    for address in ("127.0.0.1", "127.1.2.3", "::1"):
        assert Settings(host=address).access(address).is_open


def test_keys_come_from_one_place() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Settings(keys=SecretStr(LINE), keys_file=KEYS_FILE).access("::1")


def test_a_server_that_other_machines_reach_does_not_start_without_keys(serve: Serve) -> None:
    listener = SimpleNamespace(getsockname=lambda: ("192.0.2.1", 8000), close=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "LISTENER", listener)
        result, served = serve("--host", "studio.example")
    assert result.exit_code == 1
    assert "ran" not in served
    assert result.stderr.startswith("tminus: --host (TMINUS_HOST): studio.example can be reached from other machines")
    assert len(result.stderr.strip().splitlines()) == 1


def test_metrics_on_a_port_of_their_own_are_not_on_the_other(serve: Serve) -> None:
    _, served = serve("--metrics-port", "9100", "--metrics-host", "::1")
    assert (served["metrics"], served["metrics_host"], served["metrics_port"]) == (False, "::1", 9100)
    assert (served["for_metrics"], served["counted"]()) == (METRICS_LISTENER, APP)
    _, served = serve("--metrics-port", "9100", "--metrics-host", "Studio.local", "--allowed-hosts", "tminus")
    assert served["metrics_hosts"] >= {"studio.local", "tminus"}
    _, served = serve("--metrics-port", "9100", "--host", "127.0.0.2")
    assert served["metrics_host"] == "127.0.0.2"
    _, served = serve("--metrics-port", "9100", "--no-metrics")
    assert (served["metrics"], served.get("for_metrics")) == (False, None)


# --- webhooks ---


def test_secrets_of_webhooks_come_from_one_place_and_without_any_none_are_sent(serve: Serve) -> None:
    result, served = serve("--webhook-secret", SECRET, "--webhook-secret-file", str(WEBHOOK_SECRETS))
    assert result.exit_code == 1
    assert "exclude each other" in result.stderr
    _, served = serve("--webhook-allow", "hooks.internal")
    assert served["ran"]
    assert "webhooks" not in served


def test_certificates_that_cannot_be_read_are_told_at_the_start(serve: Serve) -> None:
    result, _ = serve("--webhook-secret", SECRET, SSL_CERT_FILE="no/such/file")
    assert result.exit_code == 1
    assert "SSL_CERT_FILE" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- several models ---


def test_several_checkpoints_are_models_with_their_names_the_first_the_default(serve: Serve) -> None:
    flags = ["--checkpoint", "first=some/folder", "--checkpoint", "a=b/extra"]
    for arguments, variables in ((flags, {}), ([], {"TMINUS_CHECKPOINT": "first=some/folder,a=b/extra"})):
        result, served = serve(*arguments, **variables)
        assert result.exit_code == 0, result.output
        assert served["names"] == ["first", "a"]
        assert served["library"].named == {"first": Path("some/folder"), "a": Path("b/extra")}


def test_without_a_name_a_model_is_called_what_its_checkpoint_is_called(serve: Serve) -> None:
    _, served = serve("--checkpoint", "some/My model (2)", "--checkpoint", "/data/a=b/extra")
    assert served["names"] == ["My-model-2", "extra"], "what has a slash before the = has no name"


def test_a_folder_of_models_comes_after_the_checkpoints_that_are_named(serve: Serve) -> None:
    _, served = serve("--models", "some/models", "--checkpoint", "first=some/folder")
    assert served["names"] == ["first", "extra"]
    assert served["library"].folder == Path("some/models")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--checkpoint", "a=x/one", "--checkpoint", "a=x/extra"], "two models are named a"),
        (["--checkpoint", "x/extra", "--checkpoint", "extra=x/one"], "two models are named extra"),
        (["--checkpoint", "extra=x/one", "--models", "m"], "two models are named extra"),
        (["--checkpoint", "a=x/one", "--checkpoint", "b=x/two"], "b has the weights of a"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(serve: Serve, flags: list[str], says: str) -> None:
    result, served = serve(*flags)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "ran" not in served
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_of_models_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folders"):
        Settings(models=tmp_path).checkpoints()
    with pytest.raises(ValueError, match="has no folders"):
        Settings(models=tmp_path / "gone").checkpoints()


# --- docs/settings.md ---


def documented() -> dict[str, list[str]]:
    """The cells of each row of the tables in docs/settings.md, by the flag that the row begins with."""
    lines = (Path(__file__).parents[3] / "docs" / "settings.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `--")]
    assert len({row[0] for row in rows}) == len(rows), "each setting once"
    return {row[0]: row for row in rows}


def values_of(field: FieldInfo) -> str:
    """The cell that says what a setting may be."""
    if field.annotation in (bool, bool | None):
        return "yes or no"
    if get_origin(field.annotation) is tuple:
        return "`[NAME=]PATH`"
    bounds = {key: value for each in field.metadata for key, value in vars_of(each).items() if value is not None}
    choice = bounds.get("pattern", "").strip("^()$").split("|") if "pattern" in bounds else get_args(field.annotation)
    if choice and all(isinstance(value, str) for value in choice):
        return ", ".join(f"`{value}`" for value in choice)
    if "gt" in bounds:
        return f"above {bounds['gt']}"
    if "ge" in bounds:
        return f"{bounds['ge']}..{bounds['le']}" if "le" in bounds else f"{bounds['ge']} or more"
    return "path" if field.annotation in (Path, Path | None) else "text"


def vars_of(constraint: object) -> dict[str, Any]:
    return {key: getattr(constraint, key, None) for key in ("ge", "gt", "le", "pattern")}


def test_the_settings_page_has_every_setting_and_no_other() -> None:
    assert {row.split("`")[1] for row in documented()} == {flag(name) for name in Settings.model_fields}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_settings_page_says_what_a_setting_is_called_may_be_and_is_by_default(name: str) -> None:
    field = Settings.model_fields[name]
    sides = f"`{flag(name)}`, `--no-{name}`" if name in TWO_SIDED else f"`{flag(name)}`"
    _, named, values, default, what = documented()[sides]
    assert named == f"`{variable(name)}`"
    assert values == values_of(field)
    if name == "checkpoint":
        assert default == f"the bundled `{BUNDLED.name}`"
    elif field.default is None:
        assert default, "in words, for what the machine decides"
        assert "`" not in default or name == "cache_dir"
    else:
        assert default == (f"`{shown(field.default)}`" if field.default != "" else "empty")
    assert what.endswith(".")
