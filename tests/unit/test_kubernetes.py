"""The manifests in deploy/kubernetes: valid by Kubernetes' published schemas, and true to predlog's settings."""

from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from common.config import ConsumerSettings, ProducerSettings, load, parser_for

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
RESOURCES: dict[str, dict[str, Any]] = {
    f"{each['kind']}/{each['metadata']['name']}": each
    for path in sorted(FOLDER.glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
    if each["kind"] != "Kustomization"
}
BROKER = RESOURCES["RabbitmqCluster/predlog-broker"]
SETTINGS: dict[str, str] = RESOURCES["ConfigMap/predlog"]["data"]
PRODUCER = RESOURCES["Deployment/predlog-producer"]
CONSUMER = RESOURCES["StatefulSet/predlog-consumer"]
WORKLOADS = [(PRODUCER, ProducerSettings), (CONSUMER, ConsumerSettings)]


def container(workload: dict[str, Any]) -> dict[str, Any]:
    [only] = workload["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(workload: dict[str, Any]) -> dict[str, str]:
    """Return what the container sees: the ConfigMap, then its own variables. A field of the pod is its ordinal."""
    return SETTINGS | {item["name"]: item.get("value", "0") for item in container(workload)["env"]}


@pytest.mark.parametrize("version", ["1.28", "1.37"])  # the oldest that has the label with a pod's ordinal, the newest
@pytest.mark.parametrize("name", sorted(RESOURCES.keys() - {"RabbitmqCluster/predlog-broker"}))
def test_a_manifest_is_valid_by_the_published_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], version, strict=True)


def test_every_manifest_is_applied() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_the_settings_of_a_workload_load(workload: dict[str, Any], kind: Any) -> None:
    own = {name: value for name, value in environment(workload).items() if not name.endswith("_FILE")}
    settings = load(kind, parser_for(kind, "", "").parse_args([]), own, str)
    assert settings.partitions == CONSUMER["spec"]["replicas"]


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_secrets_are_files_that_are_mounted_and_no_variables(workload: dict[str, Any], kind: Any) -> None:
    pod = workload["spec"]["template"]["spec"]
    secrets = {each["name"]: each["secret"] for each in pod["volumes"] if "secret" in each}
    mounts = {each["mountPath"]: secrets.get(each["name"]) for each in container(workload)["volumeMounts"]}
    files = {name: Path(value) for name, value in environment(workload).items() if name.endswith("_FILE")}
    assert files.keys() == {"AMQP_URL_FILE"} | ({"API_TOKEN_FILE"} if kind is ProducerSettings else set())
    for path in files.values():
        secret = mounts[str(path.parent)]
        assert secret is not None
        assert path.name in [item["path"] for item in secret.get("items", [{"path": "api-token"}])]
    assert "secretKeyRef" not in str(container(workload))


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_the_name_of_a_service_sets_nothing(workload: dict[str, Any], kind: Any) -> None:
    assert workload["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_a_pod_has_the_time_that_its_stop_takes(workload: dict[str, Any], kind: Any) -> None:
    pre_stop = container(workload).get("lifecycle", {}).get("preStop", {}).get("exec", {"command": ["sleep", "0"]})
    seconds = int(pre_stop["command"][1]) + int(SETTINGS["SHUTDOWN_TIMEOUT_MS"]) / 1000
    assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > seconds


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_liveness_never_asks_for_the_broker(workload: dict[str, Any], kind: Any) -> None:
    probes = {name: container(workload)[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")}
    assert probes == {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_a_pod_has_no_rights_that_it_does_not_need(workload: dict[str, Any], kind: Any) -> None:
    pod = workload["spec"]["template"]["spec"]
    own = container(workload)["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
    assert own["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(("workload", "kind"), WORKLOADS)
def test_whatever_selects_pods_selects_those(workload: dict[str, Any], kind: Any) -> None:
    name, labels = workload["metadata"]["name"], workload["spec"]["template"]["metadata"]["labels"]
    selectors = [
        workload["spec"]["selector"]["matchLabels"],
        RESOURCES[f"Service/{name}"]["spec"]["selector"],
        RESOURCES[f"PodDisruptionBudget/{name}"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    target = RESOURCES["HorizontalPodAutoscaler/predlog-producer"]["spec"]["scaleTargetRef"]
    assert f"{target['kind']}/{target['name']}" in RESOURCES


def test_the_broker_keeps_a_majority_while_a_node_is_away() -> None:
    assert BROKER["apiVersion"] == "rabbitmq.com/v1beta1"
    assert BROKER["spec"]["replicas"] in (3, 5, 7)
    assert "queue_leader_locator = balanced" in BROKER["spec"]["rabbitmq"]["additionalConfig"]
