"""deploy/kubernetes.yaml against the schemas of the API, and against the program that it starts."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import lumen_clip
import security
from settings import Settings
from tests.hub import FakeHub, folder_content
from tests.kit import ROOT, Node, one_model, write_labels

VERSIONS = "1.29", "1.33", "1.37"  # the oldest that the file names, and the newest that the package has
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
KINDS = "Service", "PersistentVolumeClaim", "PodDisruptionBudget", "Deployment"
DEPLOYMENT: dict[str, Any] = MANIFESTS[KINDS.index("Deployment")]
GPU = yaml.safe_load((ROOT / "deploy" / "kubernetes-gpu.yaml").read_text())
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def merged(original: Any, patch: Any) -> Any:
    """A strategic merge patch as the API server applies it, as far as ours needs it: lists are merged by name."""
    if isinstance(original, dict) and isinstance(patch, dict):
        return {**original, **{key: merged(original.get(key), value) for key, value in patch.items()}}
    if isinstance(original, list) and all(isinstance(item, dict) and "name" in item for item in patch):
        patches = {item["name"]: item for item in patch}
        assert patches.keys() <= {item["name"] for item in original}
        return [merged(item, patches.get(item["name"], {})) for item in original]
    return patch


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_are_valid(version: str) -> None:
    """Lost otherwise: an evening with a file that the cluster refuses, or a misspelt field that it ignores."""
    assert [manifest["kind"] for manifest in MANIFESTS] == list(KINDS)
    for manifest in (*MANIFESTS, merged(DEPLOYMENT, GPU)):
        kubernetes_validate.validate(manifest, version, strict=True)
    for wrong in ("readynessProbe", "livenessProbe"):
        broken = copy.deepcopy(DEPLOYMENT)
        broken["spec"]["template"]["spec"]["containers"][0][wrong] = {"grpc": {"port": "grpc"}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, version, strict=True)


def test_the_gpu_variant_changes_image_and_resources_only() -> None:
    """Lost otherwise: a GPU variant that starts without its probes, its folders or its rights."""
    [container] = merged(DEPLOYMENT, GPU)["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and container["image"] == "lumen-clip:cuda"
    changed = {key for key in container if container[key] != CONTAINER.get(key)}
    assert changed == {"image", "resources"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    for image in (CONTAINER["image"], container["image"]):
        assert re.search(rf"^FROM base AS {image.partition(':')[2]}$", dockerfile, re.MULTILINE)


def test_the_objects_belong_together() -> None:
    """Lost otherwise: a Service without pods, a volume that nobody mounts, or a budget that protects nothing."""
    service, claim, budget, _ = MANIFESTS
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    [spread] = POD["topologySpreadConstraints"]
    for chosen in (budget["spec"]["selector"], DEPLOYMENT["spec"]["selector"], spread["labelSelector"]):
        assert chosen == {"matchLabels": service["spec"]["selector"]} == {"matchLabels": labels}
    assert service["spec"]["clusterIP"] == "None"
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes.keys()
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert len({manifest["metadata"]["name"] for manifest in (service, budget, DEPLOYMENT)}) == 1


def test_the_pod_starts_the_daemon_as_it_is() -> None:
    """Lost otherwise: a pod that is never ready, is killed while it loads or drains, or cannot write its data."""
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    probes = {name: CONTAINER[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")}
    assert all(probe["port"] == ports["grpc"] == lumen_clip.parse_arguments([]).port for probe in probes.values())
    assert probes["startup"].get("service", "") == probes["readiness"].get("service", "") == ""
    assert probes["liveness"]["service"] == security.LIVENESS
    assert POD["terminationGracePeriodSeconds"] > lumen_clip.DRAIN_S
    environment = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    settings = Settings.from_environment(environment)
    assert (settings.lumen_metrics_port, settings.clip_mdns_type) == (ports["metrics"], ())
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = POD["securityContext"]["runAsUser"]
    assert f"USER {user}:{POD['securityContext']['runAsGroup']}\n" in dockerfile
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert f"LUMEN_DATA_DIR={mounts['data']}\n" in dockerfile and mounts["models"] == f"{mounts['data']}/models"


def test_pods_that_start_together_share_the_downloaded_models(tmp_path: Path, hub: FakeHub, tiny_onnx: Path) -> None:
    """Lost otherwise: the first start of three pods, whose downloads destroy each other on a volume that they share."""
    files = hub.repos["org/model"] = folder_content(tiny_onnx)
    hub.pace = sum(map(len, files.values())) // 4  # so that they overlap
    (tmp_path / "claim").mkdir()
    settings: dict[str, Any] = one_model(Path("hf-hub:org/model"))
    nodes = []
    for name in "abc":
        data = write_labels(tmp_path / name)
        (data / "models").symlink_to(tmp_path / "claim")
        nodes.append(Node(data, HF_ENDPOINT=hub.url, HF_HOME=data / "hub", **settings))
    found = [tuple(node.ready().result("clip_embed", b"a dog")["vector"]) for node in nodes]
    assert len(set(found)) == 1
    assert [path.name for path in (tmp_path / "claim").iterdir()] == ["org--model"]
    for node in nodes:
        assert node.stop() == 0
    again = Node(nodes[0].data, **settings).ready()  # without the hub
    assert again.stop() == 0
