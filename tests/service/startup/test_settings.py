"""The settings: where each may be given, what it may be, and the part that it comes to."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from tests.receivers import SECRET
from tests.service.cli.running import line_of, run
from tests.service.conftest import MakeCheckpoint
from tests.service.fakes import wait_until
from tests.service.keys import bearer, key_line
from tminus.model.checkpoint import save_checkpoint
from tminus.service.engine.protocol import BUNDLED, LoadOptions
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.model_info import MAX_JOBS, Limits
from tminus.service.startup.serve import measure_and_build, open_all, read_models
from tminus.service.startup.server import Opening, config_of
from tminus.service.startup.settings import NAME, NO_FLAG, Library, Settings, name_of

SECRETS = ("keys", "job_store", "webhook_secret")
HERE = ("127.0.0.1", 8000)
WEBHOOK_SECRETS = Path(__file__).with_name("webhook_secrets_of_the_tests.txt")
KEYS_FILE = Path(__file__).with_name("keys_of_the_tests.txt")
LINE = key_line("studio", "the-secret")

# Each setting with a text that is not its default, and what the text means.
GIVEN: dict[str, tuple[str, Any]] = {
    "checkpoint": ("/some/folder", ["/some/folder"]),
    "models": ("some/models", "some/models"),
    "models_memory_gb": ("2.5", 2.5),
    "idle_unload": ("15m", "15m"),
    "keys_file": ("some/keys", "some/keys"),
    "keys": (LINE, None),
    "open": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "threads": ("3", 3),
    "executor": ("openvino", "openvino"),
    "precision": ("bfloat16", "bfloat16"),
    "approve_when_idle": ("true", True),
    "exact": ("false", False),
    "cache_dir": ("some/cache", "some/cache"),
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
    "job_store": ("postgresql://tminus:a-secret@host/jobs", None),
    "job_namespace": ("studio", "studio"),
    "job_lease_s": ("2.5", 2.5),
    "job_address": ("http://10.0.0.5:8000", "http://10.0.0.5:8000"),
    "job_results": ("s3://bucket/jobs", "s3://bucket/jobs"),
    "keep_jobs_s": ("1.5", 1.5),
    "keep_jobs_mb": ("5", 5),
    "webhook_secret": (SECRET, None),
    "webhook_secret_file": ("some/secrets", "some/secrets"),
    "webhook_allow": ("hooks.internal,10.0.0.0/8", "hooks.internal,10.0.0.0/8"),
    "max_image_bytes": ("4096", 4096),
    "metrics_port": ("9100", 9100),
    "grace_s": ("0.25", 0.25),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}

# Values that are refused, as a setting or when it is used.
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


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def changed(*flags: str, **variables: str) -> dict[str, dict[str, Any]]:
    """The settings that are not the default, as `tminus config` prints them."""
    result = run("config", "--json", "--changed", *flags, **variables)
    assert result.exit_code == 0, result.output
    settings: dict[str, dict[str, Any]] = json.loads(result.stdout)["settings"]
    return settings


def test_every_setting_is_tried_here_and_has_a_description() -> None:
    assert GIVEN.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert GIVEN[name][1] != field.default or name in SECRETS, name


@pytest.mark.parametrize("name", GIVEN)
def test_a_variable_sets_its_setting_and_a_flag_wins_over_it(name: str) -> None:
    text, value = GIVEN[name]
    by_variable = {"value": value, "secret": name in SECRETS, "source": "variable", "given_by": variable(name)}
    assert changed(**{variable(name): text}) == {name: by_variable}
    if name in NO_FLAG:
        assert run("config", flag(name), text).exit_code == 2
        return
    words = [flag(name), text]
    if isinstance(value, bool):
        words = [flag(name) if value else flag(f"no_{name}")]
    by_flag = by_variable | {"source": "flag", "given_by": flag(name)}
    assert changed(*words, **{variable(name): "1111" if not isinstance(value, bool) else str(not value)}) == {
        name: by_flag
    }


@pytest.mark.parametrize("arguments", [["--exact", "false"], ["--no-exact=true"], ["--no-port", "5"], ["--max-bitch"]])
def test_a_flag_of_two_sides_takes_no_value_and_no_other_has_two(arguments: list[str]) -> None:
    assert run("config", *arguments).exit_code == 2


# --- where they come to ---


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """Two models, and a third with the weights of the first."""
    for name, seed in (("one", 0), ("My model (2)", 1), ("again", 0)):
        made = make_checkpoint(seed=seed)
        save_checkpoint(tmp_path / name, made.net.state_dict(), made.net.config, made.noise, made.labels, {})
    return tmp_path


def test_without_flags_and_variables_the_defaults_hold() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.checkpoints()) == ("127.0.0.1", 8000, [(None, BUNDLED)])
    limits = Limits(
        max_n=64,
        max_batch=16,
        max_rows=100,
        max_backlog_s=600,
        max_body_bytes=2**20,
        max_image_bytes=8 * 2**20,
        result_cache_bytes=64 * 2**20,
    )
    assert settings.limits(max_rows=100, max_batch=16) == limits
    assert settings.load_options(BUNDLED) == LoadOptions(BUNDLED, max_jobs=MAX_JOBS)


def test_settings_come_to_loading_limits_and_the_server() -> None:
    settings = Settings(**{name: text for name, (text, _) in GIVEN.items()})
    options = settings.load_options(Path("x"))
    for name in ("device", "threads", "executor", "precision", "exact", "max_batch", "max_rows", "approve_when_idle"):
        assert getattr(options, name) == GIVEN[name][1], name
    assert options.cache_dir == Path("some/cache")
    limits = settings.limits(max_rows=13, max_batch=9)
    for name in ("max_n", "max_backlog_s", "max_image_bytes", "max_streams_per_address"):
        assert getattr(limits, name) == GIVEN[name][1], name
    assert (limits.keep_jobs_s, limits.keep_jobs_bytes, limits.result_cache_bytes) == (1.5, 5 * 2**20, 5 * 2**20)
    assert settings.limits(max_rows=5, max_batch=9).max_n == 5, "no request is larger than the rows that are held"
    config = config_of(settings, Opening())
    assert (config.log_level, config.ws_max_size) == ("debug", limits.max_edit_bytes)
    assert settings.idle_unload_s == 900


def test_a_body_beside_its_images_may_have_an_eighth_of_an_image_and_always_a_mebibyte() -> None:
    for image_bytes, body_bytes in ((4096, 2**20), (8 * 2**20, 2**20), (2**28, 2**25)):
        assert Settings(max_image_bytes=image_bytes).limits(16, 16).max_body_bytes == body_bytes


def test_keys_secrets_and_stores_are_opened_before_anything_is_measured(folder: Path) -> None:
    settings = Settings(
        checkpoint=str(folder / "one"),
        keys_file=KEYS_FILE,
        open=False,
        state_dir=":memory:",
        webhook_secret_file=WEBHOOK_SECRETS,
        webhook_allow="hooks.internal,10.0.0.0/8",
    )
    opened = open_all(settings, HERE)
    opened.stores.close()
    assert opened.access.with_secret("the-secret").name == "studio"
    assert not opened.access.is_open
    assert opened.webhooks is not None
    assert opened.webhooks.allowed == AllowedReceivers.parse("hooks.internal,10.0.0.0/8")
    texts = Settings(checkpoint=str(folder / "one"), keys=LINE, open=True, state_dir=":memory:", webhook_secret=SECRET)
    opened = open_all(texts, HERE)
    opened.stores.close()
    assert opened.access.with_secret("the-secret").name == "studio"
    assert opened.access.is_open
    assert opened.webhooks is not None


def test_a_server_answers_by_its_settings(folder: Path) -> None:
    settings = Settings(
        checkpoint=(f"first={folder / 'one'}", str(folder / "My model (2)")),
        keys=LINE,
        allowed_hosts="tminus",
        executor="eager",
        threads=1,
        cache_dir=folder / "cache",
        max_n=3,
        state_dir=":memory:",
        metrics_port=9100,
    )
    opened, opening = open_all(settings, HERE), Opening()
    app = measure_and_build(opened, None, opening).app
    assert "(My-model-2)" in opening.detail
    assert not opened.models, "an unloaded model's weights would stay for ever"
    with TestClient(app, base_url="http://tminus", headers=bearer("the-secret")) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert [each["name"] for each in client.get("/models").json()["models"]] == ["first", "My-model-2"]
        assert client.get("/model").json()["limits"]["max_n"] == 3
        assert client.get("/metrics").status_code == 404, "it has a port of its own"
        assert client.get("/model", headers={"Host": "another"}).status_code == 403
        assert client.get("/model", headers={"Authorization": ""}).status_code == 401


def test_origins_and_hosts_are_compared_as_browsers_write_them() -> None:
    settings = Settings(allowed_origins=" https://A.example , HTTP://b.example:8080,", host="Studio.local")
    assert settings.allowed_sites().origins == {"https://a.example", "http://b.example:8080"}
    assert settings.allowed_sites().hosts == {"studio.local"}
    settings = Settings(allowed_hosts="Diffusion.example, b")
    assert settings.allowed_sites().hosts == {"diffusion.example", "b", "127.0.0.1"}


def test_variables_that_are_no_settings_are_named_in_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("TMINUS_MAX_BITCH", "TMINUS_OPEN_BROWSER", "TMINUS_MAX_N", "TMINUS_KEY", "TMINUS_CONFIG"):
        monkeypatch.setenv(name, "5")
    for name, value in (  # as Kubernetes sets them for a Service tminus-page
        ("TMINUS_PAGE_SERVICE_HOST", "10.0.0.1"),
        ("TMINUS_PAGE_SERVICE_PORT_HTTP", "8000"),
        ("TMINUS_PAGE_PORT", "tcp://10.0.0.1:8000"),
        ("TMINUS_PAGE_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    open_all(Settings(checkpoint=str(folder / "one"), state_dir=":memory:"), HERE).stores.close()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "variables that are no settings are ignored: TMINUS_MAX_BITCH, TMINUS_OPEN_BROWSER"
    ]


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., str]]:
    """Runs `tminus serve` on a checkpoint, and returns the line in which it ends."""
    before = signal.getsignal(signal.SIGTERM)
    usual = {"TMINUS_CHECKPOINT": str(folder / "one"), "TMINUS_STATE_DIR": ":memory:", "TMINUS_PORT": "0"}
    yield lambda *arguments, **variables: line_of(run("serve", *arguments, **usual | variables))
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_ends_the_start_with_a_line_that_names_its_setting(
    serve: Callable[..., str], name: str, text: str
) -> None:
    lines = [serve(**{variable(name): text})]
    if name != "open" and name not in NO_FLAG:  # whose flag takes no value, or which has none
        lines.append(serve(f"{flag(name)}={text}"))
    for line in lines:
        assert (flag(name) in line) == (name not in NO_FLAG)
        assert variable(name) in line
        assert (text in line) == (name not in SECRETS), "it is a secret"
        assert "Value error" not in line


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WEBHOOK_SECRET": SECRET, "WEBHOOK_SECRET_FILE": str(WEBHOOK_SECRETS)}, "exclude each other"),
        ({"KEYS": LINE, "KEYS_FILE": str(KEYS_FILE)}, "exclude each other"),
        ({"CHECKPOINT": "a={0}/one,a={0}/extra"}, "two models are named a"),
        ({"CHECKPOINT": "{0}/one,one={0}/My model (2)"}, "two models are named one"),
        ({"CHECKPOINT": "again={0}/one", "MODELS": "{0}"}, "two models are named again"),
        ({"CHECKPOINT": "a={0}/one,b={0}/again"}, "b has the weights of a"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    serve: Callable[..., str], folder: Path, variables: dict[str, str], says: str
) -> None:
    assert says in serve(**{f"TMINUS_{name}": text.format(folder) for name, text in variables.items()})


def test_certificates_for_webhooks_that_cannot_be_read_are_named(serve: Callable[..., str]) -> None:
    assert "SSL_CERT_FILE" in serve(TMINUS_WEBHOOK_SECRET=SECRET, SSL_CERT_FILE="no/such/file")


# --- who may ask ---


def test_other_machines_are_let_in_with_keys_or_by_a_flag_only(serve: Callable[..., str]) -> None:
    for address in ("0.0.0.0", "::", "192.0.2.1", "fe80::1"):
        with pytest.raises(ValueError, match=r"--host .* --keys-file .* --open"):
            Settings(host=address).access(address)
        assert Settings(host=address, open=True).access(address).is_open
        assert not Settings(host=address, keys=SecretStr(LINE)).access(address).is_open
    for address in ("127.0.0.1", "127.1.2.3", "::1"):
        assert Settings(host=address).access(address).is_open
    line = serve("--host", "0.0.0.0")
    assert line.startswith("tminus: --host (TMINUS_HOST): 0.0.0.0 can be reached from other machines")


# --- several models ---


def test_several_checkpoints_are_models_with_their_names_the_first_the_default(folder: Path) -> None:
    def names(*checkpoint: str, models: Path | None = None) -> list[str]:
        return [each.name for each in read_models(Settings(checkpoint=checkpoint, models=models))[0]]

    one, two = folder / "one", folder / "My model (2)"
    assert names(f"first={one}", f"a={two}") == ["first", "a"]
    assert names(str(two), str(one)) == ["My-model-2", "one"]
    more = folder / "x=y" / "more"
    more.parent.mkdir()
    one.rename(more)
    assert names(str(more)) == ["one"], "what has a slash before the = has no name"
    assert names(f"first={two}", models=more.parent) == ["first", "more"], "named models come before a folder's"


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
