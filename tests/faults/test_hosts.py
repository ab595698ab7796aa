"""Several hosts: network namespaces, each of which runs the real run_train.sh."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Workspace
from tests.faults.hosts import REPOSITORY, Network, needs_namespaces, run

pytestmark = [needs_namespaces, pytest.mark.timeout(900)]


@pytest.fixture
def network(workspace: Workspace) -> Iterator[Network]:
    """Two hosts in a workspace."""
    made = Network(workspace.root, 2)
    yield made
    made.close()


def start(network: Network, *args: str, second: tuple[str, ...] = (), numbered: bool = True, **env: str) -> None:
    """On both hosts, with host 1 as the endpoint, by its name; `second` and `env` for host 2."""
    for rank, host in enumerate(network.hosts):
        place = {"NNODES": "2", "RDZV_ENDPOINT": "host1:29500"} | ({"NODE_RANK": str(rank)} if numbered else {})
        host.start(*args, *(second if rank else ()), **(place | (env if rank else {})))


@pytest.mark.parametrize("numbered", [True, pytest.param(False, marks=pytest.mark.long)])
def test_two_hosts_whose_names_resolve_to_a_loopback_address(
    numbered: bool, network: Network, workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """Seen to fail without GLOO_SOCKET_IFNAME: "connectFullMesh failed"."""
    start(network, numbered=numbered)
    assert [host.wait(120) for host in network.hosts] == [0, 0], network.logs()
    assert "host host1: eth0 (10.77.0.1) reaches host1:29500" in network.hosts[0].text
    assert "host host2: eth0 (10.77.0.2) reaches host1:29500" in network.hosts[1].text
    assert workspace.files(20) == unbroken(2).files(20)


@pytest.mark.long
def test_two_hosts_that_share_a_bucket_and_no_cache(
    network: Network, workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """Seen to fail without `data.remote`: "data.cache_dir: host host1 does not see what host host2 wrote there"."""
    bucket = f"--data.remote=file://{workspace.root}/bucket"
    command = [sys.executable, "-m", "torchxihe", "prepare", "config.toml", bucket, "--upload"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=workspace.root, env=env, check=True)
    start(network, bucket, PRIVATE="../cache")
    assert [host.wait(120) for host in network.hosts] == [0, 0], network.logs()
    assert workspace.files(20) == unbroken(2).files(20)


@pytest.fixture
def other_code(tmp_path: Path) -> str:
    """A checkout with one more line."""
    copy = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "torchxihe", copy / "torchxihe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_train.sh", "environment.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, copy / name)
    with (copy / "torchxihe" / "trainer.py").open("a") as file:
        file.write("# changed\n")
    return str(copy)


WRONG = {
    "interface": ({"GLOO_SOCKET_IFNAME": "lo"}, "host host2 (127.0.0.1, lo): host host1 cannot connect to it"),
    "no such interface": ({"GLOO_SOCKET_IFNAME": "ib0"}, "GLOO_SOCKET_IFNAME=ib0: host host2 has no such interface"),
    "code": ({"REPOSITORY": "other_code"}, "host host2 has torchxihe's code"),
    "torch": ({"TORCH_VERSION": "2.11.0"}, "host host2 has torch 2.11.0, host host1 has"),
    "config": ({}, "host host2 has training.steps = 10, host host1 has 20"),
    "clock": ({"CLOCK_SHIFT": "600"}, "host host2: its clock is 600 s ahead of that of host host1"),
    "clock behind": ({"CLOCK_SHIFT": "-600"}, "host host2: its clock is 600 s behind that of host host1"),
    "run directory": ({"PRIVATE": "runs"}, "run.dir: host host1 does not see what host host2 wrote there"),
    "cache": ({"PRIVATE": "../cache"}, "data.cache_dir: host host1 does not see what host host2 wrote there"),
    "number": ({"NODE_RANK": "1"}, "host host2: NODE_RANK=1 is that of host host1"),
}


IN_CI = ("no such interface", "config")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what in IN_CI else pytest.mark.long) for what in WRONG]
)
def test_a_wrong_host(what: str, network: Network, other_code: str) -> None:
    """One line that names it, on all hosts, within 60 s. Seen to fail (config) with no comparison."""
    env, line = WRONG[what]
    env = {name: other_code if value == "other_code" else value for name, value in env.items()}
    begun = time.monotonic()
    if what == "number":  # neither is 0, so that the store is elsewhere
        network.start_store()
        for host in network.hosts:
            host.start(NNODES="2", NODE_RANK="1", RDZV_ENDPOINT="store:29500")
    else:
        start(network, second=("--training.steps=10",) if what == "config" else (), **env)
    assert network.hosts[1].wait(60) == 1, network.logs()
    print(f"{what}: {time.monotonic() - begun:.0f} s")
    lines = network.hosts[1].text.splitlines()
    assert line in lines[-1] and "Traceback" not in network.hosts[1].text, network.logs()
    if what != "no such interface":  # before anything is said to the others
        assert network.hosts[0].wait(30) == 1, network.logs()
        if what != "number":
            assert line in network.hosts[0].text.splitlines()[-1], network.logs()


FIREWALLS = {
    "no packet passes": ("blackhole", "10.77.0.1"),
    "the port's packets are dropped": ("blackhole", "10.77.0.1", "ipproto", "tcp", "dport", "29500"),
    "the port's packets are rejected": ("prohibit", "10.77.0.1", "ipproto", "tcp", "dport", "29500"),
}


@pytest.mark.long
@pytest.mark.parametrize("what", FIREWALLS)
def test_an_endpoint_that_cannot_be_reached(what: str, network: Network) -> None:
    """One line after 45 s, and the time to start. Seen to fail with one that waits as for a refused connection."""
    kind, *which = FIREWALLS[what]
    run("ip", "-n", network.router, "rule", "add", "pref", "10", "to", *which, kind)
    begun = time.monotonic()
    network.hosts[1].start(NNODES="2", NODE_RANK="1", RDZV_ENDPOINT="host1:29500")
    assert network.hosts[1].wait(75) == 1, network.logs()
    line = network.hosts[1].text.splitlines()[-1]
    print(f"{what}: {time.monotonic() - begun:.0f} s: {line}")
    assert "RDZV_ENDPOINT=host1:29500: host host2 (10.77.0.2, eth0) does not reach it: " in line, line
    assert "Traceback" not in network.hosts[1].text


@pytest.mark.long
def test_an_endpoint_that_refuses_connections_is_waited_for(network: Network) -> None:
    """Its host has not started, or a firewall answers for it: a line says so, and the run begins once it is open."""
    place = {"NNODES": "2", "RDZV_ENDPOINT": "host1:29500"}
    begun = time.monotonic()
    network.hosts[1].start(NODE_RANK="1", **place)
    line = "host host2 (10.77.0.2, eth0) waits for RDZV_ENDPOINT=host1:29500: nothing listens there yet"
    while line not in network.hosts[1].text:
        assert time.monotonic() - begun < 60, network.logs()
        time.sleep(0.2)
    print(f"refused: {time.monotonic() - begun:.0f} s")
    assert "firewall" in network.hosts[1].text
    network.hosts[0].start(NODE_RANK="0", **place)
    assert [host.wait(120) for host in network.hosts] == [0, 0], network.logs()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["blackhole", "prohibit"])
def test_a_host_with_closed_ports(kind: str, network: Network) -> None:
    """It reaches the endpoint, but its own ports, which gloo and NCCL choose, are dropped or rejected."""
    rule = ("ip", "-n", network.router, "rule", "add", "pref")
    run(*rule, "10", "to", "10.77.0.2", "ipproto", "tcp", "sport", "29500", "lookup", "main")
    run(*rule, "20", "to", "10.77.0.2", "ipproto", "tcp", "dport", "1024-65534", kind)
    begun = time.monotonic()
    start(network)
    assert [host.wait(60) for host in network.hosts] == [1, 1], network.logs()
    print(f"{kind}: {time.monotonic() - begun:.0f} s")
    for host in network.hosts:
        line = host.text.splitlines()[-1]
        assert "host host2 (10.77.0.2, eth0): host host1 cannot connect to it: " in line, network.logs()
        assert "open the ports" in line and "Traceback" not in host.text
