"""docker/kubernetes as kubectl renders it, held against Kubernetes' schemas, and against what the server is."""

import asyncio
import os
import re
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tests.service.conftest import MakeSite, make_site  # noqa: F401
from tests.service.keys import key_line
from tests.tools import needs
from tminus.service.jobs.leases import AHEAD_S
from tminus.service.metrics import METRICS
from tminus.service.startup.server import ANSWER_S, KEPT_S
from tminus.service.startup.settings import Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "docker" / "kubernetes"
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
OF_THE_IMAGE = dict(re.findall(r"\b(TMINUS_[A-Z_]+)=(\S+)", DOCKERFILE.partition(" AS base\n")[2]))
RELEASES = ("1.30", "1.36")  # the oldest and the newest
NAME = {"app.kubernetes.io/name": "tminus"}
OTHER_VARIABLES = {"FORWARDED_ALLOW_IPS"}  # of uvicorn
Objects = dict[tuple[str, str], dict[str, Any]]  # by kind and name


def kubectl(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    nobodys = os.environ | {"KUBECONFIG": os.devnull}
    command = [needs("kubectl"), *arguments]
    return subprocess.run(command, env=nobodys, capture_output=True, text=True, timeout=60, check=False)


def render(folder: Path) -> Objects:
    done = kubectl("kustomize", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "it warns of nothing"
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert found
    return found


def overlay(folder: Path, *components: str) -> Objects:
    """The base with some components, as a cluster's own folder has them."""
    folder.mkdir()
    here = os.path.relpath(KUBERNETES, folder.resolve())
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{here}/base"],
        "components": [f"{here}/components/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return render(folder)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Objects]:
    """The base, the base with each component and with all, and the example."""
    folder = tmp_path_factory.mktemp("kubernetes")
    found = {name: overlay(folder / name, name) for name in COMPONENTS}
    found |= {name: render(KUBERNETES / name) for name in ("base", "example")}
    return found | {"all": overlay(folder / "all", *COMPONENTS)}


@pytest.fixture(params=["base", "example", "all"])
def objects(request: pytest.FixtureRequest, rendered: dict[str, Objects]) -> Objects:
    return rendered[request.param]


def deployment(objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = objects["Deployment", "tminus"]["spec"]
    return found


def pod(objects: Objects) -> dict[str, Any]:
    found: dict[str, Any] = deployment(objects)["template"]["spec"]
    return found


def container(objects: Objects) -> dict[str, Any]:
    (found,) = pod(objects)["containers"]
    assert isinstance(found, dict)
    return found


def settings_map(objects: Objects) -> dict[str, Any]:
    (found,) = [each for (kind, _), each in objects.items() if kind == "ConfigMap"]
    return found


def environment(objects: Objects) -> dict[str, str]:
    """The variables of a server, as the kubelet makes them."""
    found = OF_THE_IMAGE | settings_map(objects)["data"]
    for each in container(objects)["env"]:
        match each:
            case {"value": value}:
                found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], value)
            case {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}:
                found[each["name"]] = "10.1.2.3"
            case {"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}:
                found[each["name"]] = container(objects)["resources"]["limits"]["cpu"]
            case {"valueFrom": {"secretKeyRef": {"name": "tminus", "key": "job-store"}}}:
                found[each["name"]] = "postgresql://tminus:password@database/tminus"
            case _:
                raise AssertionError(each)
    return found


# --- what Kubernetes takes ---


def check(document: dict[str, Any], release: str) -> None:
    """Raise ValueError for what is not of its schema, or has a field that is not in it."""
    # Imported here, which takes seconds of each process that only collects the tests.
    import kubernetes_validate
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

    defined_by_others = {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}
    if (model := defined_by_others.get(document["kind"])) is not None:
        read = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        if read != document:
            raise ValueError(f"{read} is what is known of {document}")
        return
    try:
        kubernetes_validate.validate(document, release, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        raise ValueError(error.message) from None


def test_every_object_is_of_its_schema(objects: Objects) -> None:
    for document in objects.values():
        for release in RELEASES:
            check(document, release)


# --- what the server takes ---


def test_every_variable_is_a_setting_and_its_value_one_that_is_taken(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = environment(objects)
    known = {f"TMINUS_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in found if name.startswith("TMINUS_")} <= known
    assert settings_map(objects)["data"].keys() <= known | OTHER_VARIABLES
    (tmp_path / "keys").write_text(key_line("studio", "a-key"))
    mounts = {each["mountPath"]: each["name"] for each in container(objects)["volumeMounts"]}
    assert Path(found["TMINUS_KEYS_FILE"]).parent.as_posix() in mounts
    for name in [name for name in os.environ if name.startswith("TMINUS_")]:
        monkeypatch.delenv(name)
    for name, value in (found | {"TMINUS_KEYS_FILE": str(tmp_path / "keys")}).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.access(settings.host).has_keys, "it starts, and asks for keys"
    assert settings.job_store is not None
    assert settings.job_address == f"http://10.1.2.3:{settings.port}"
    assert settings.allowed_sites().hosts >= {"tminus", "tminus.tminus.svc"}
    assert str(settings.threads) == container(objects)["resources"]["limits"]["cpu"]


def test_each_file_system_that_is_written_to_is_a_volume_and_each_volume_is_bounded(objects: Objects) -> None:
    found = environment(objects)
    volumes = {each["name"]: each for each in pod(objects)["volumes"]}
    mounted = {each["mountPath"]: (volumes[each["name"]], each) for each in container(objects)["volumeMounts"]}
    assert len(mounted) == len(volumes)
    for written in (found["TMINUS_CACHE_DIR"], "/state", "/tmp"):
        volume, mount = mounted.pop(written)
        assert volume["emptyDir"]["sizeLimit"]
        assert not mount.get("readOnly")
    assert all(mount["readOnly"] for _, mount in mounted.values())
    assert mounted["/keys"][0]["secret"]["defaultMode"] == 0o440
    assert ("TMINUS_CHECKPOINT" in found) == ("/checkpoint" in mounted)


def test_what_earlier_pods_have_measured_is_given_to_new_ones(objects: Objects, page: str) -> None:
    from tminus.service.engine.choice_cache import GIVEN  # which takes seconds to import torch

    (mount,) = [each for each in container(objects)["volumeMounts"] if each["name"] == "measured"]
    assert mount["mountPath"] == f"{environment(objects)['TMINUS_CACHE_DIR']}/{GIVEN}"
    (volume,) = [each for each in pod(objects)["volumes"] if each["name"] == "measured"]
    assert volume["configMap"]["optional"], "the first pods measure"
    assert f"create configmap {volume['configMap']['name']} --from-file" in page
    assert f"--exclude ./{GIVEN} " in page


def test_no_pod_may_say_that_it_asks_for_another_client(objects: Objects) -> None:
    """But for an ingress controller, whose addresses a cluster's own folder names."""
    believed = environment(objects).get("FORWARDED_ALLOW_IPS", "127.0.0.1")  # uvicorn's default
    seen: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["client"][0])

    headers = [(b"x-forwarded-for", b"203.0.113.9")]
    for address in ("10.1.2.3", "192.0.2.1"):
        scope: Any = {"type": "http", "scheme": "http", "client": (address, 1), "headers": headers}
        asyncio.run(ProxyHeadersMiddleware(app, believed)(scope, None, None))  # type: ignore[arg-type]
    is_example = "FORWARDED_ALLOW_IPS" in environment(objects)
    assert seen == ["10.1.2.3", "203.0.113.9" if is_example else "192.0.2.1"]
    assert is_example == (environment(objects)["TMINUS_ALLOWED_HOSTS"].startswith("diffusion.example"))


def test_probes_ask_routes_that_are_there(objects: Objects, make_site: MakeSite) -> None:  # noqa: F811
    found = container(objects)
    ports = {each["name"]: each["containerPort"] for each in found["ports"]}
    settings = environment(objects)
    assert ports == {"http": int(settings["TMINUS_PORT"]), "metrics": int(settings["TMINUS_METRICS_PORT"])}
    most = Settings.model_fields["max_connections"].default
    assert int(settings["TMINUS_MAX_CONNECTIONS_PER_ADDRESS"]) == most, "an ingress controller is one address"
    assert int(settings["TMINUS_MAX_STREAMS_PER_ADDRESS"]) == most // 2, "so is a server that passes events on"
    site = make_site()
    probes = {name: found[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    # That a pod is alive is asked where no client takes the connections (startup/test_server.py).
    assert [probe["httpGet"]["port"] for probe in probes.values()] == ["metrics", "metrics", "http"]
    for probe in probes.values():
        assert probe["timeoutSeconds"] < probe["periodSeconds"] * probe["failureThreshold"]
        assert site.client.get(probe["httpGet"]["path"], headers={"Host": "10.1.2.3:8000"}).status_code == 200
    assert [probe["httpGet"]["path"] for probe in probes.values()] == ["/healthz", "/healthz", "/readyz"]
    site.worker.drain()
    assert site.client.get(probes["liveness"]["httpGet"]["path"]).status_code == 200, "it is not killed as it drains"
    assert site.client.get(probes["readiness"]["httpGet"]["path"]).status_code == 503


def test_a_pod_has_time_to_leave_the_endpoints_and_then_to_drain(objects: Objects) -> None:
    readiness = container(objects)["readinessProbe"]
    pause_s = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace_s = float(environment(objects)["TMINUS_GRACE_S"])
    assert pause_s >= readiness["periodSeconds"]
    assert pause_s + grace_s + ANSWER_S + KEPT_S < pod(objects)["terminationGracePeriodSeconds"]


def test_no_variable_of_a_service_is_taken_for_a_setting(objects: Objects) -> None:
    """The kubelet would set TMINUS_PORT=tcp://… for a Service of this name."""
    assert ("Service", "tminus") in objects
    assert pod(objects)["enableServiceLinks"] is False


# --- what the objects say of each other ---


def test_selectors_match_the_pods_and_names_are_of_objects(objects: Objects) -> None:
    labels = deployment(objects)["template"]["metadata"]["labels"]
    assert labels == NAME
    assert deployment(objects)["selector"]["matchLabels"] == labels
    service = objects["Service", "tminus"]["spec"]
    assert service["selector"] == labels
    named = {each["name"] for each in container(objects)["ports"]}
    assert {each["targetPort"] for each in service["ports"]} <= named
    assert objects["PodDisruptionBudget", "tminus"]["spec"]["selector"]["matchLabels"] == labels
    assert all(each["labelSelector"]["matchLabels"] == labels for each in pod(objects)["topologySpreadConstraints"])
    for (kind, _), each in objects.items():
        if kind != "Namespace":
            assert each["metadata"]["labels"].items() >= NAME.items()
        if kind == "NetworkPolicy":
            assert each["spec"]["podSelector"]["matchLabels"] == labels
            assert {port["port"] for rule in each["spec"]["ingress"] for port in rule["ports"]} <= named
    assert container(objects)["envFrom"] == [{"configMapRef": {"name": settings_map(objects)["metadata"]["name"]}}]
    assert re.fullmatch(r"tminus-settings-\w+", settings_map(objects)["metadata"]["name"]), "it changes with its values"
    assert ("ServiceAccount", pod(objects)["serviceAccountName"]) in objects


def test_who_may_come_in_is_named_for_each_port(rendered: dict[str, Objects]) -> None:
    allowed: dict[str, set[str]] = defaultdict(set)
    for (kind, name), each in rendered["all"].items():
        if kind == "NetworkPolicy":
            for rule in each["spec"]["ingress"]:
                assert rule["from"], "nobody else"
                allowed[rule["ports"][0]["port"]].add(name)
    assert allowed == {"http": {"tminus", "tminus-ingress"}, "metrics": {"tminus-monitoring"}}
    (of_base,) = rendered["base"]["NetworkPolicy", "tminus"]["spec"]["ingress"]
    assert {"podSelector": {"matchLabels": NAME}} in of_base["from"], "servers ask each other"


def test_a_name_of_the_ingress_is_one_of_the_servers(rendered: dict[str, Objects]) -> None:
    ingress = rendered["example"]["Ingress", "tminus"]["spec"]
    allowed = environment(rendered["example"])["TMINUS_ALLOWED_HOSTS"].split(",")
    (rule,), (tls,) = ingress["rules"], ingress["tls"]
    assert rule["host"] in allowed
    of_base = environment(rendered["base"])["TMINUS_ALLOWED_HOSTS"].split(",")
    assert {*allowed} == {rule["host"], *of_base}, "those of the Service stay"
    assert tls["hosts"] == [rule["host"]]
    (path,) = rule["http"]["paths"]
    assert ("Service", path["backend"]["service"]["name"]) in rendered["example"]
    ports = rendered["example"]["Service", "tminus"]["spec"]["ports"]
    assert path["backend"]["service"]["port"]["name"] in {each["name"] for each in ports}


def test_a_pod_may_do_nothing_that_it_need_not(objects: Objects) -> None:
    """What Kubernetes' Pod Security Standard `restricted` asks, and more."""
    user = re.findall(r"--uid (\d+) ", DOCKERFILE)[0]
    of_pod, of_container = pod(objects)["securityContext"], container(objects)["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert {str(of_pod[name]) for name in ("runAsUser", "runAsGroup", "fsGroup")} == {user}
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container["allowPrivilegeEscalation"] is False
    assert of_container["readOnlyRootFilesystem"] is True
    assert of_container["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod(objects).keys()
    assert pod(objects)["automountServiceAccountToken"] is False
    assert not [kind for kind, _ in objects if "Role" in kind]


def test_one_server_is_left_whatever_is_done_to_the_nodes(objects: Objects) -> None:
    if ("ScaledObject", "tminus") in objects:
        assert "replicas" not in deployment(objects), "that is the autoscaler's"
        least = objects["ScaledObject", "tminus"]["spec"]["minReplicaCount"]
    else:
        least = deployment(objects)["replicas"]
    assert least - objects["PodDisruptionBudget", "tminus"]["spec"]["maxUnavailable"] >= 1
    assert least - deployment(objects)["strategy"]["rollingUpdate"]["maxUnavailable"] >= 1


# --- autoscaling ---


@pytest.fixture(scope="module")
def scaling(rendered: dict[str, Objects]) -> dict[str, Any]:
    found: dict[str, Any] = rendered["example"]["ScaledObject", "tminus"]["spec"]
    return found


def test_the_autoscaler_scales_the_servers_and_asks_for_metrics_that_they_have(
    rendered: dict[str, Objects], scaling: dict[str, Any]
) -> None:
    target = rendered["example"]["Deployment", scaling["scaleTargetRef"]["name"]]
    assert (scaling["scaleTargetRef"]["apiVersion"], target["kind"]) == (target["apiVersion"], "Deployment")
    (trigger,) = scaling["triggers"]
    named = set(re.findall(r"tminus_\w+", trigger["metadata"]["query"]))
    assert named == {"tminus_backlog_seconds", "tminus_store_backlog_seconds"}
    assert named <= METRICS.keys()
    assert set(re.findall(r'namespace="(\w+)"', trigger["metadata"]["query"])) == {target["metadata"]["namespace"]}
    assert trigger["metricType"] == "AverageValue"
    assert float(trigger["metadata"]["threshold"]) > AHEAD_S, "or a server that takes work ahead is too busy"


@pytest.mark.parametrize(
    ("pods", "store", "expected"),
    [
        ([8, 8], [0, 0], [16]),
        ([8, 8, 4], [60, 60, 60], [80]),
        ([8, 8], [], []),  # the database is away: nothing is told, and nothing changes
        ([], [], []),
    ],
)
def test_prometheus_adds_up_what_all_hold_and_what_waits_once(
    scaling: dict[str, Any], tmp_path: Path, pods: list[int], store: list[int], expected: list[int]
) -> None:
    (trigger,) = scaling["triggers"]
    rules = {"groups": [{"name": "g", "rules": [{"record": "needed", "expr": trigger["metadata"]["query"]}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    series = [
        {"series": f'tminus_{name}{{namespace="tminus", pod="{number}"}}', "values": f"{value}x5"}
        for name, values in (("backlog_seconds", pods), ("store_backlog_seconds", store))
        for number, value in enumerate(values)
    ]
    series.append({"series": 'tminus_backlog_seconds{namespace="others", pod="0"}', "values": "999x5"})
    samples = [{"labels": "needed", "value": value} for value in expected]
    asked = [{"expr": "needed", "eval_time": "1m", "exp_samples": samples}]
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "10s"}
    test |= {"tests": [{"interval": "30s", "input_series": series, "promql_expr_test": asked}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    command = [needs("prometheus").with_name("promtool"), "test", "rules", tmp_path / "test.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_the_port_and_the_name_of_the_job(rendered: dict[str, Objects]) -> None:
    monitor = rendered["monitoring"]["PodMonitor", "tminus"]["spec"]
    labels = deployment(rendered["monitoring"])["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"] == labels
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {each["name"] for each in container(rendered["monitoring"])["ports"]}
    scraped = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert labels[monitor["jobLabel"]] == scraped["job_name"], "which alerts and dashboard ask for"


# --- what docker/README.md says ---


@pytest.fixture(scope="module")
def page() -> str:
    text = (ROOT / "docker" / "README.md").read_text("utf-8")
    return text.partition("\n## Kubernetes\n")[2].partition("\n## ")[0]


def test_the_page_names_every_component_and_the_keys_of_the_secret(page: str, rendered: dict[str, Objects]) -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(COMPONENTS)
    made = re.search(r"create secret generic (\w+) ((?:.*\\\n)*.*)", page)
    assert made is not None
    (keys,) = [each["secret"] for each in pod(rendered["base"])["volumes"] if each["name"] == "keys"]
    assert made[1] == keys["secretName"]
    assert set(re.findall(r"--from-\w+=([\w-]+)", made[2])) == {"job-store", keys["items"][0]["key"]}


def test_the_alerts_become_an_object_by_the_command_of_the_page(page: str, tmp_path: Path) -> None:
    (command,) = re.findall(r"^    (\{ printf .*(?:\\\n.*)*?) *\|[ \\\n]*kubectl", page, re.MULTILINE)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    document = yaml.safe_load(done.stdout)
    check(document, "1.32")
    assert document["spec"] == yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
