"""The settings: where each may be given, what it may be, and the part that it comes to."""

import gc
import re
import weakref
from base64 import b64decode
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest
from pydantic import SecretStr

from tests.receivers import SECRET
from tests.service.fakes import INFO, FakeEngine
from tests.service.keys import key_line
from tminus.service.cli import main as cli
from tminus.service.engine.loading import Loaded, Progress
from tminus.service.engine.protocol import BUNDLED, LoadOptions
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.objects import open_objects as really_open_objects
from tminus.service.jobs.store.postgres_store import open_postgres as really_open_postgres
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.stores import Stores
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.model_info import Limits
from tminus.service.scheduling.scheduler import BatchPolicy, TickTimes
from tminus.service.startup import serve as module
from tminus.service.startup.models import Prepared
from tminus.service.startup.settings import NAME, NO_FLAG, Library, Settings, name_of

TWO_SIDED = ("approve_when_idle", "exact", "open", "open_browser", "metrics", "docs")
SECRETS = ("keys", "job_store", "webhook_secret")
DATABASE = "postgresql://tminus:a-secret@host/jobs"
WEBHOOK_SECRETS = Path(__file__).with_name("webhook_secrets_of_the_tests.txt")
KEYS_FILE = Path(__file__).with_name("keys_of_the_tests.txt")
LINE = key_line("studio", "the-secret")
TICK_TIMES = ((1, 0.5), (16, 2.0))

# Each field with a text that is not its default, and what the text means.
GIVEN: dict[str, tuple[str, Any]] = {
    "checkpoint": ("/some/folder", ("/some/folder",)),
    "models": ("some/models", Path("some/models")),
    "models_memory_gb": ("2.5", 2.5),
    "idle_unload": ("15m", "15m"),
    "keys_file": (str(KEYS_FILE), KEYS_FILE),
    "keys": (LINE, LINE),
    "open": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "open_browser": ("true", True),
    "threads": ("3", 3),
    "executor": ("openvino", "openvino"),
    "precision": ("bfloat16", "bfloat16"),
    "approve_when_idle": ("true", True),
    "exact": ("false", False),
    "cache_dir": ("some/cache", Path("some/cache")),
    "max_n": ("7", 7),
    "max_batch": ("9", 9),
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

BAD = [
    ("keys", "a secret by mistake"),
    ("keys_file", "no/such/file"),
    ("job_store", "no-url-and-a-secret"),
    ("job_namespace", "Studio"),
    ("job_address", "http://10.0.0.5/path"),
    ("job_results", "s3://bucket/../other"),
    ("webhook_secret", "whsec_short"),
    ("webhook_secret_file", "no/such/file"),
    ("webhook_allow", "10.0.0.0/33"),
    ("open", "perhaps"),
    ("port", "65536"),
    ("max_n", "1.5"),
    ("executor", "Eager"),
    ("allowed_hosts", "\u017ftudio.example"),  # a long s
    ("allowed_origins", "https://b\u00fccher.example"),  # browsers send xn--bcher-kva.example
    ("allowed_origins", "https://studio.example/"),
    ("max_backlog_s", "nan"),
    ("grace_s", "-0.1"),
]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    return f"TMINUS_{name.upper()}"


def plain(settings: Settings, name: str) -> Any:
    """A setting as it was given."""
    made = getattr(settings, name)
    return made.get_secret_value() if isinstance(made, SecretStr) else made


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


Run = Callable[..., click.testing.Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tminus serve`, which hands its settings to `served` in place of a server."""
    monkeypatch.setattr("tminus.service.cli.serve.signal.signal", lambda *_: None)
    monkeypatch.setattr("tminus.service.cli.serve.set_up_log", lambda *_: None)

    def invoke(*arguments: str, **variables: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli.main, ["serve", *arguments], env=variables)

    return invoke


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `tminus serve` would serve by."""
    made: list[Settings] = []
    monkeypatch.setattr(module, "serve", lambda settings: made.append(settings) or True)
    return made


def test_every_setting_is_tried_here_and_has_a_description() -> None:
    assert GIVEN.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert GIVEN[name][1] != field.default, name


@pytest.mark.parametrize("name", GIVEN)
def test_a_variable_sets_its_field_and_a_flag_wins_over_it(
    run: Run, handed: list[Settings], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, value = GIVEN[name]
    monkeypatch.setenv(variable(name), text)
    settings = Settings()
    assert plain(settings, name) == value
    assert settings.model_dump() == {**Settings.model_construct().model_dump(), name: getattr(settings, name)}
    if name in NO_FLAG:
        assert run(flag(name), text).exit_code == 2
        return
    monkeypatch.setenv(variable(name), "1111" if name not in TWO_SIDED else str(text != "true"))
    given = [flag(name), text] if name not in TWO_SIDED else [flag(name) if text == "true" else flag(f"no_{name}")]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert plain(handed[0], name) == value


@pytest.mark.parametrize("arguments", [["--exact", "false"], ["--no-exact=true"], ["--no-port", "5"], ["--max-bitch"]])
def test_a_flag_of_two_sides_takes_no_value_and_no_other_has_two(
    run: Run, handed: list[Settings], arguments: list[str]
) -> None:
    assert run(*arguments).exit_code == 2
    assert not handed


# --- where they come to ---


@dataclass(eq=False)
class FakeCheckpoint:
    weights_hash: str
    name: str


class Served(dict[str, Any]):
    """What a server was made of, instead of being started."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What `serve` hands to the parts that it starts, with its engine, sockets and server taken away."""
    seen, store = Served(address="127.0.0.1"), SqliteStore(None)
    read_once: list[weakref.ref[FakeCheckpoint]] = []

    def read(options: LoadOptions) -> FakeCheckpoint:
        seen.update({name: getattr(options, name) for name in LoadOptions.__slots__})
        name = options.checkpoint.name
        checkpoint = FakeCheckpoint(INFO.weights_hash if name != "extra" else "cd" * 32, name)
        read_once.append(weakref.ref(checkpoint))
        return checkpoint

    def prepare_engine(
        checkpoint: FakeCheckpoint, options: LoadOptions, known: list[object], *, busy: bool, progress: Progress
    ) -> Loaded:
        assert not busy
        progress("measuring how it runs fastest", 2.4)
        places = options.max_batch or 16, 8
        return Loaded(FakeEngine(), options.max_rows or 100, *places, TICK_TIMES)  # type: ignore[arg-type]

    def folders(library: Library) -> dict[str, Path]:
        return dict(library.named) | ({"extra": library.folder / "extra"} if library.folder is not None else {})

    def listen(host: str, port: int) -> SimpleNamespace:
        seen.setdefault("listened", []).append((host, port))
        return SimpleNamespace(getsockname=lambda: (seen["address"], port), close=lambda: None, listen=lambda _: None)

    def serve_models(
        first: list[Prepared], stores: Stores, allowed_sites: object, access: object, **more: object,
    ) -> SimpleNamespace:  # fmt: skip
        if len(first) > 1:
            gc.collect()
            assert {each() for each in read_once} == {None}, "an unloaded model's weights would stay for ever"
        assert {stores.take_first(each.engine.info.weights_hash)._store for each in first} == {store}
        seen.update(results=stores._results)
        names = [each.engine.info.name for each in first]
        seen.update(limits=first[0].limits, speed=first[0].speed)
        seen.update(allowed_sites=allowed_sites, access=access, names=names, **more)
        return SimpleNamespace(
            worker=SimpleNamespace(state=SimpleNamespace(hangs=False, crashed=False, stall=None)), codes_images=False
        )

    def open_store(state_dir: str, weights_hash: str) -> SqliteStore:
        seen.update(state_dir=state_dir)
        return store

    def open_postgres(url: str, namespace: str, lease_s: float, address: str | None) -> Callable[[str], JobStore]:
        if not url.startswith("postgresql://"):
            return really_open_postgres(url, namespace, lease_s)
        seen.update(job_store=url, job_namespace=namespace, job_lease_s=lease_s, job_address=address)
        return lambda weights_hash: store

    def open_objects(url: str, folder: str) -> str:
        if not re.match("s3://[a-z]+(/[a-z]+)?$", url):
            return really_open_objects(url, folder)  # type: ignore[return-value]
        return url

    async def listen_and_serve(
        server: Any, opening: Any, _listener: object, build: Any, _url: str, *, open_browser: bool
    ) -> None:
        seen.update(server=server, open_browser=open_browser)
        opening.application = build()

    def run_it(main: Coroutine[Any, Any, None]) -> None:
        with pytest.raises(StopIteration):
            main.send(None)

    monkeypatch.setattr("tminus.service.engine.loading.read_checkpoint", read)
    monkeypatch.setattr("tminus.service.engine.loading.prepare_engine", prepare_engine)
    monkeypatch.setattr(Library, "folders", folders)
    monkeypatch.setattr("tminus.service.jobs.store.postgres_store.open_postgres", open_postgres)
    monkeypatch.setattr("tminus.service.jobs.store.objects.open_objects", open_objects)
    for name, fake in {
        "listen": listen,
        "ServedModels": serve_models,
        "ModelLoader": lambda _served, library, _load, _room, idle_s: seen.update(library=library, idle_s=idle_s),
        "create_app": lambda _served, _loader, **values: seen.update(values),
        "open_store": open_store,
        "look_at_ends": lambda _settings, _folder: (None, []),
        "serve_metrics": lambda _listener, _opening, allowed_sites: seen.update(metrics_hosts=allowed_sites.hosts),
        "start_traces": lambda _version: "what sends spans",
        "_run": listen_and_serve,
    }.items():
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(module.asyncio, "run", run_it)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return seen


def given(*names: str, **more: Any) -> Settings:
    return Settings(**{name: GIVEN[name][1] for name in names}, **more)


def test_without_flags_and_variables_the_defaults_hold(served: Served) -> None:
    assert module.serve(Settings())
    assert served["listened"] == [("127.0.0.1", 8000)]
    assert served["checkpoint"] == BUNDLED
    assert served["limits"] == Limits(
        max_n=64,
        max_batch=16,
        max_rows=100,
        max_backlog_s=600,
        max_body_bytes=2**20,
        max_image_bytes=8 * 2**20,
        result_cache_bytes=64 * 2**20,
    )
    assert served["state_dir"] == ""
    policy = served["speed"].policy
    assert policy == BatchPolicy.of(16, short_batch=8, times=TickTimes(TICK_TIMES))
    assert {served[name] for name in ("device", "executor", "precision")} == {"auto"}
    by_measuring = "exact", "threads", "max_batch", "max_rows", "cache_dir"
    assert {served[name] for name in by_measuring} == {None}, "left to the machine"
    assert (served["traces"], served["with_metrics"], served["with_docs"]) == ("what sends spans", True, True)
    assert (served["results"], served["webhooks"]) == (None, None)


def test_each_setting_comes_to_the_part_that_it_is_for(served: Served) -> None:
    once = {"keys", "webhook_secret", "state_dir", "metrics_port", "models", "models_memory_gb", "idle_unload", "open"}
    assert module.serve(given(*(GIVEN.keys() - once)))
    assert served["checkpoint"] == Path("/some/folder")
    of_loading = ("device", "threads", "executor", "precision", "exact", "max_batch", "max_rows")
    for name in (*of_loading, "cache_dir", "job_store", "job_namespace", "job_lease_s", "job_address"):
        assert served[name] == GIVEN[name][1], name
    limits = served["limits"]
    for name in ("max_n", "max_backlog_s", "max_body_bytes", "max_image_bytes", "max_streams_per_address"):
        assert getattr(limits, name) == GIVEN[name][1], name
    assert (limits.keep_jobs_s, limits.keep_jobs_bytes, limits.result_cache_bytes) == (1.5, 5 * 2**20, 5 * 2**20)
    assert served["access"].with_secret("the-secret").name == "studio"
    assert not served["access"].is_open
    assert (served["results"].objects, served["results"].above_bytes) == ("s3://bucket/jobs", 5 * 1024)
    webhooks = served["webhooks"]
    assert webhooks.sender._secrets == (b64decode(SECRET.removeprefix("whsec_")),)
    assert webhooks.allowed == AllowedReceivers.parse("hooks.internal,10.0.0.0/8")
    assert served["allowed_sites"].hosts == {"a.example", "b", "0.0.0.0", "::1"}, "the names to listen on are of them"
    assert served["allowed_sites"].origins == {"https://a.example", "https://b.example:8080"}
    assert (served["listened"], served["with_metrics"], served["with_docs"]) == ([("0.0.0.0", 0)], False, False)
    config = served["server"].config
    assert (config.log_level, config.ws_max_size) == ("debug", limits.max_edit_bytes)
    assert served["open_browser"]
    assert served["server"]._give_up.interval == 0.25


def test_keys_and_secrets_may_be_texts_and_no_request_is_larger_than_the_rows_held(served: Served) -> None:
    assert module.serve(given("keys", "webhook_secret", "state_dir", "models", "open", max_rows=5))
    assert served["access"].with_secret("the-secret").name == "studio"
    assert served["access"].is_open
    assert served["webhooks"].sender._secrets == (b64decode(SECRET.removeprefix("whsec_")),)
    assert (served["state_dir"], served["library"].folder) == ("some/state", Path("some/models"))
    assert (served["limits"].max_n, served["limits"].max_rows) == (5, 5)


def test_origins_and_hosts_are_compared_as_browsers_write_them() -> None:
    settings = Settings(allowed_origins=" https://A.example , HTTP://b.example:8080,", host="Studio.local")
    assert settings.allowed_sites().origins == {"https://a.example", "http://b.example:8080"}
    assert settings.allowed_sites().hosts == {"studio.local"}
    settings = Settings(allowed_hosts="Diffusion.example, b")
    assert settings.allowed_sites().hosts == {"diffusion.example", "b", "127.0.0.1"}


def test_metrics_on_a_port_of_their_own_are_not_on_the_other(served: Served) -> None:
    assert module.serve(Settings(metrics_port=9100, host="Studio.local", allowed_hosts="tminus"))
    assert (served["with_metrics"], served["listened"]) == (False, [("Studio.local", 8000), ("Studio.local", 9100)])
    assert served["metrics_hosts"] == {"studio.local", "tminus"}
    served.clear()
    served["address"] = "127.0.0.1"
    assert module.serve(Settings(metrics_port=9100, metrics_host="127.0.0.2"))
    assert served["listened"] == [("127.0.0.1", 8000), ("127.0.0.2", 9100)]
    served.clear()
    served["address"] = "127.0.0.1"
    assert module.serve(Settings(metrics_port=9100, metrics=False))
    assert (served["with_metrics"], served["listened"]) == (False, [("127.0.0.1", 8000)])


def test_variables_that_are_no_settings_are_named_in_the_log(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("TMINUS_MAX_BITCH", "TMINUS_MAX_N", "TMINUS_KEY", "TMINUS_CONFIG"):
        monkeypatch.setenv(name, "5")
    for name, value in (  # as Kubernetes sets them for a Service tminus-page
        ("TMINUS_PAGE_SERVICE_HOST", "10.0.0.1"),
        ("TMINUS_PAGE_SERVICE_PORT_HTTP", "8000"),
        ("TMINUS_PAGE_PORT", "tcp://10.0.0.1:8000"),
        ("TMINUS_PAGE_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    assert module.serve(Settings())
    assert served["limits"].max_n == 5
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "variables that are no settings are ignored: TMINUS_MAX_BITCH"
    ]


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_ends_the_start_with_a_line_that_names_its_setting(run: Run, name: str, text: str) -> None:
    ways: list[tuple[list[str], dict[str, str]]] = [([], {variable(name): text})]
    if name not in (*TWO_SIDED, *NO_FLAG):  # whose flags take no value, or which have none
        ways.append(([f"{flag(name)}={text}"], {}))
    for arguments, variables in ways:
        result = run(*arguments, **variables)
        assert result.exit_code == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert (flag(name) in result.stderr) == (name not in NO_FLAG)
        assert variable(name) in result.stderr
        assert (text in result.stderr) == (name not in SECRETS), "it is a secret"
        assert "Value error" not in result.stderr


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TMINUS_WEBHOOK_SECRET": SECRET, "TMINUS_WEBHOOK_SECRET_FILE": str(WEBHOOK_SECRETS)}, "exclude each other"),
        ({"TMINUS_KEYS": LINE, "TMINUS_KEYS_FILE": str(KEYS_FILE)}, "exclude each other"),
        ({"TMINUS_WEBHOOK_SECRET": SECRET, "SSL_CERT_FILE": "no/such/file"}, "SSL_CERT_FILE"),
        ({"TMINUS_CHECKPOINT": "a=/x/one,a=/x/extra"}, "two models are named a"),
        ({"TMINUS_CHECKPOINT": "/x/extra,extra=/x/one"}, "two models are named extra"),
        ({"TMINUS_CHECKPOINT": "extra=/x/one", "TMINUS_MODELS": "m"}, "two models are named extra"),
        ({"TMINUS_CHECKPOINT": "a=/x/one,b=/x/two"}, "b has the weights of a"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(run: Run, variables: dict[str, str], says: str) -> None:
    result = run(**variables)
    assert result.exit_code == 1
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# --- who may ask ---


def test_other_machines_are_let_in_with_keys_or_by_a_flag_only(run: Run, served: Served) -> None:
    for address in ("0.0.0.0", "::", "192.0.2.1", "fe80::1"):
        with pytest.raises(ValueError, match=r"--host .* --keys-file .* --open"):
            Settings(host=address).access(address)
        assert Settings(host=address, open=True).access(address).is_open
        assert not Settings(host=address, keys=SecretStr(LINE)).access(address).is_open
    for address in ("127.0.0.1", "127.1.2.3", "::1"):
        assert Settings(host=address).access(address).is_open
    served["address"] = "192.0.2.1"
    result = run("--host", "studio.example")
    assert result.exit_code == 1
    assert result.stderr.startswith("tminus: --host (TMINUS_HOST): studio.example can be reached from other machines")


# --- several models ---


def test_several_checkpoints_are_models_with_their_names_the_first_the_default(served: Served) -> None:
    assert module.serve(Settings(checkpoint="first=/some/folder,a=/b/extra"))
    assert served["names"] == ["first", "a"]
    assert served["library"].named == {"first": Path("/some/folder"), "a": Path("/b/extra")}
    assert module.serve(Settings(checkpoint=("some/My model (2)", "/data/a=/b/extra")))
    assert served["names"] == ["My-model-2", "extra"], "what has a slash before the = has no name"
    assert module.serve(Settings(models="some/models", checkpoint="first=/some/folder"))
    assert served["names"] == ["first", "extra"], "those of a folder come after those that are named"
    assert served["library"].folder == Path("some/models")


def test_the_folders_of_a_folder_are_models_of_their_names_as_they_are_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = Library({"given": Path("elsewhere"), "b": Path("elsewhere")}, tmp_path)
    for name in ("b", "a", ".hidden", "with space", "x" * 65):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "long").symlink_to("x" * 300)  # no file has so long a name: to look there is an error
    assert library.folders() == {"given": Path("elsewhere"), "b": Path("elsewhere"), "a": tmp_path / "a"}
    assert "long in the folder of models cannot be read" in caplog.text
    (tmp_path / "c").mkdir()
    assert "c" in library.folders()
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(ValueError, match="has no folder whose name"):
            Settings(models=folder).checkpoints()


def test_a_name_may_stand_in_an_address() -> None:
    for name in ("a", "A-b_c.9", "9", "x" * 64):
        assert NAME.fullmatch(name)
        assert name_of(name) == name
    for name in ("", ".", "..", "-a", "a/b", "a\\b", "a b", "\u00e9", "a\n", "x" * 65, "%2e"):
        assert not NAME.fullmatch(name)
        assert NAME.fullmatch(name_of(name))
