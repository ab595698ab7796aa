"""The files in cluster/: what can be checked of them without a cluster."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sbatch")), ids=lambda path: path.name)
def test_shell_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def pod_specs() -> list[tuple[str, dict[str, Any]]]:
    job = documents("kubernetes_job.yaml")[1]
    replicas = documents("kubernetes_pytorchjob.yaml")[0]["spec"]["pytorchReplicaSpecs"]["Worker"]
    return [("job", job["spec"]["template"]["spec"]), ("pytorchjob", replicas["template"]["spec"])]


@pytest.mark.parametrize(("name", "spec"), pod_specs())
def test_pods(name: str, spec: dict[str, Any]) -> None:
    """Not as root, with time to save, and every mount has its volume."""
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["terminationGracePeriodSeconds"] > 30
    volumes = {volume["name"] for volume in spec["volumes"]}
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert (ROOT / container["args"][0].removeprefix("/opt/torchxihe/")).exists()


def test_the_indexed_job_finds_its_first_pod() -> None:
    service, job = documents("kubernetes_job.yaml")
    spec = job["spec"]
    template = spec["template"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    env = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
    assert env["NNODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert env["RDZV_ENDPOINT"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"


def test_the_pytorchjob_is_elastic() -> None:
    (job,) = documents("kubernetes_pytorchjob.yaml")
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] < policy["maxReplicas"] == worker["replicas"]
    assert [container["name"] for container in worker["template"]["spec"]["containers"]] == ["pytorch"]


def test_skypilot() -> None:
    (task,) = documents("skypilot.yaml")
    assert task["resources"]["use_spot"] and (ROOT / task["envs"]["CONFIG"]).exists()
    script = subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, capture_output=True)
    assert script.returncode == 0, script.stderr
    assert all(folder in task["run"] for folder in task["file_mounts"])


def test_the_image_does_not_run_as_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER torchxihe"]
    assert not [line for line in lines[lines.index("USER torchxihe") :] if line.startswith("RUN ")]
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
