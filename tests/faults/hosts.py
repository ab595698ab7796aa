"""Network namespaces as hosts: each with a hostname, an interface, and a hostname that resolves to 127.0.1.1, as on
Debian. They share the file system and run the real run_train.sh."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUTER = "10.77.0.254"
REPOSITORY = Path(__file__).parents[2]
SITE = """
import os, sys, time
if shift := float(os.environ.get("CLOCK_SHIFT", "0")):
    real = time.time
    time.time = lambda: real() + shift
if version := os.environ.get("TORCH_VERSION"):
    import torch
    torch.__version__ = version
if "RANK" in os.environ and "train" in sys.orig_argv:
    from pathlib import Path
    from tests.faults.observed import observe
    observe(Path(os.environ["OBSERVED"]))
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Why there are no network namespaces here; "" if there are."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this machine has no network namespaces"
    pair = ["ip", "-n", name, "link", "add", "name", "v0", "type", "veth", "peer", "name", "v1"]
    made = subprocess.run(pair, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if made else "this machine has no veth pairs"


class Host:
    """One namespace."""

    def __init__(self, network: "Network", number: int) -> None:
        self.network, self.number, self.name = network, number, f"host{number}"
        self.namespace, self.address = f"{network.prefix}h{number}", f"10.77.0.{number}"
        self.log = network.folder / f"{self.name}.txt"
        self.process: subprocess.Popen[bytes] | None = None
        run("ip", "netns", "add", self.namespace)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "-n", network.router, "link", "add", "name", f"p{number}", *pair)
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/32", "dev", "eth0")
        run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        self.link("up")
        run("ip", "-n", self.namespace, "route", "add", ROUTER, "dev", "eth0")
        run("ip", "-n", self.namespace, "route", "add", "default", "via", ROUTER, "src", self.address)
        etc = Path("/etc/netns") / self.namespace
        etc.mkdir(parents=True)
        names = [f"10.77.0.{n} host{n}" for n in range(1, 5) if n != number] + [f"{ROUTER} store"]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {self.name}", *names, ""]))

    def start(self, *args: str, **env: str) -> None:
        """Run run_train.sh there."""
        everything = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/root"),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(self.network.site), str(REPOSITORY)]),
            "OBSERVED": str(self.network.folder),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "NGPU": "1",
            **env,
        }
        private = 'if [ -n "${PRIVATE:-}" ]; then mkdir -p "$PRIVATE"; mount -t tmpfs none "$PRIVATE"; fi'
        script = f'hostname {self.name}; {private}; exec "$0" "$@"'
        repository = everything.pop("REPOSITORY", str(REPOSITORY))
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c", script]
        command += [f"{repository}/run_train.sh", "config.toml", *args]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.network.folder,
                env=everything,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        """To every process of this host."""
        for pid in run("ip", "netns", "pids", self.namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)

    def link(self, state: str) -> None:
        """ "up" or "down", at the router."""
        run("ip", "-n", self.network.router, "link", "set", f"p{self.number}", state)
        if state == "up":
            run("ip", "-n", self.network.router, "route", "replace", self.address, "dev", f"p{self.number}")

    def wait(self, seconds: float) -> int:
        """For the end of run_train.sh; its exit code."""
        assert self.process
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end in {seconds:.0f} s\n{self.network.logs()}") from None

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Network:
    """Hosts, and a router between them, at which a store can run."""

    def __init__(self, folder: Path, hosts: int) -> None:
        self.folder, self.prefix = folder, f"t{os.getpid()}{abs(hash(str(folder))) % 1000}"
        self.router, self.site = f"{self.prefix}s", folder / "site"
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(SITE)
        run("ip", "netns", "add", self.router)
        run("ip", "-n", self.router, "link", "set", "lo", "up")
        run("ip", "-n", self.router, "addr", "add", f"{ROUTER}/32", "dev", "lo")
        run("ip", "netns", "exec", self.router, "sysctl", "-w", "net.ipv4.ip_forward=1")
        self.hosts = [Host(self, number + 1) for number in range(hosts)]
        self._store: subprocess.Popen[bytes] | None = None

    def start_store(self) -> None:
        """A store for the rendezvous, outside the hosts."""
        self._store = subprocess.Popen(
            ["ip", "netns", "exec", self.router, sys.executable, str(REPOSITORY / "cluster" / "store.py")]
        )

    def logs(self) -> str:
        """Of all hosts."""
        return "\n".join(f"--- {host.name}\n{host.text[-6000:]}" for host in self.hosts)

    def close(self) -> None:
        for host in self.hosts:
            host.signal(signal.SIGKILL)
            if host.process:
                host.process.wait()
        if self._store:
            self._store.kill()
            self._store.wait()
        for name in [*(host.namespace for host in self.hosts), self.router]:
            subprocess.run(["ip", "netns", "del", name])
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def steps(self) -> list[dict[str, float]]:
        """What was recorded, in order of time."""
        lines = [line for path in self.folder.glob("steps-*.jsonl") for line in path.read_text().splitlines()]
        return sorted((json.loads(line) for line in lines if line.endswith("}")), key=lambda line: line["time"])

    def wait_for_step(self, after: float, seconds: float, *, world: int = 0, host: str = "") -> float:
        """Until a step was made after `after` (in a world of this size, by this host); seconds that it took."""
        while True:
            for line in self.steps():
                if line["time"] > after and world in (0, line["world"]) and host in ("", line["host"]):
                    return line["time"] - after
            assert time.time() - after < seconds, f"no step in {seconds:.0f} s (world {world})\n{self.logs()}"
            time.sleep(0.2)


needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not() or "has them")
