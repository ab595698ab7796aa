"""Hosts that are lost and return during one run (NNODES=2:4), on network namespaces with the real run_train.sh."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Workspace, token_ledger
from tests.faults.hosts import Host, Network, needs_namespaces, run
from torchxihe.commands.status import read_status

pytestmark = [needs_namespaces, pytest.mark.timeout(3600)]
LIMIT_SECONDS = 60
"""A loss or a return may keep the run from training for this long."""
ELASTIC = {"NNODES": "2:4", "RDZV_ENDPOINT": "store:29500"}


@pytest.fixture
def network(workspace: Workspace) -> Iterator[Network]:
    """Four hosts, and a store outside of them."""
    made = Network(workspace.root, 4)
    made.start_store()
    (workspace.root / "slow").touch()
    yield made
    made.close()


def rows_of_steps(folder: Path) -> dict[int, str]:
    """The hash of every global batch; a step that was made several times must have read the same rows."""
    steps: dict[int, dict[str, dict[int, str]]] = {}
    for path in folder.glob("ledger-host*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # not cut off by a kill
                entry = json.loads(line)
                rows = steps.setdefault(entry["step"], {"rows": {}})["rows"]
                for g, digest in entry["rows"].items():
                    assert rows.setdefault(int(g), digest) == digest, f"step {entry['step']} saw another sample {g}"
    return token_ledger(steps)


def read_status_of(workspace: Workspace) -> dict[str, Any]:
    """What `torchxihe status --json` prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        return read_status(Path("runs/config"))


class Story:
    """What happens to the hosts, and how long the others need to continue."""

    def __init__(self, network: Network, flags: tuple[str, ...]) -> None:
        self.network, self.flags = network, flags
        self.up = set(network.hosts)
        self.seconds: list[tuple[str, float]] = []

    def start(self, host: Host) -> None:
        host.start(*self.flags, **ELASTIC)

    def note(self, what: str, begun: float, world: int) -> None:
        """Wait until a world of this size has made a step."""
        seconds = self.network.wait_for_step(begun, LIMIT_SECONDS, world=world)
        self.seconds.append((what, seconds))
        print(f"{what}: {seconds:.0f} s", flush=True)

    def lose(self, host: Host, how: str) -> None:
        begun = time.time()
        if how == "link":
            host.link("down")
        else:
            host.signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        self.up.remove(host)
        self.note(f"{host.name} lost ({how})", begun, len(self.up))

    def restore(self, host: Host, how: str) -> None:
        """As a scheduler would: what has ended is started again."""
        begun = time.time()
        if how == "link":
            host.link("up")
        elif how == "stop":
            host.signal(signal.SIGCONT)
        assert host.process
        time.sleep(1)
        if host.process.poll() is not None:
            self.start(host)
        self.up.add(host)
        self.note(f"{host.name} back ({how})", begun, len(self.up))

    def finish(self) -> None:
        """At full speed."""
        (self.network.folder / "slow").unlink()
        codes = {host.name: host.wait(1200) for host in self.network.hosts}
        assert set(codes.values()) == {0}, f"{codes}\n{self.network.logs()}"


@pytest.mark.long  # four hosts on the cores of one machine: minutes
@pytest.mark.parametrize("losses", [3, 20])
def test_random_losses_and_returns(
    losses: int, network: Network, workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """The token ledger is the unbroken run's, no step is twice in the metrics, and each is over within 60 s."""
    steps = 400 if losses < 20 else 1500  # about a third of them pass while hosts come and go
    flags = (f"--training.steps={steps}", "--checkpoint.every=10")
    chooser, story = random.Random(losses), Story(network, flags)
    begun = time.time()
    for host in network.hosts:
        story.start(host)
    print(f"start: {network.wait_for_step(begun, 120, world=4):.0f} s")
    away: list[tuple[Host, str]] = []
    lost = 0
    while lost < losses or away:
        if away and (lost == losses or len(story.up) == 2 or chooser.random() < 0.5):
            story.restore(*away.pop(chooser.randrange(len(away))))
        else:
            host = chooser.choice(sorted(story.up, key=lambda host: host.name))
            how = ["kill", "stop", "link"][lost % 3] if losses < 20 else chooser.choice(["kill", "stop", "link"])
            story.lose(host, how)
            away.append((host, how))
            lost += 1
        time.sleep(chooser.uniform(1, 5))
    story.finish()
    assert rows_of_steps(network.folder) == token_ledger(unbroken(1, *flags).ledger())
    lines = [json.loads(line) for line in (workspace.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    status = read_status_of(workspace)
    assert status["state"] == "finished" and status["step"] == steps and len(status["hosts"]) == 4
    assert status["starts"] > losses and 0 < status["goodput"] < 1
    print({key: status[key] for key in ("starts", "elapsed_seconds", "goodput")})


@pytest.mark.long
def test_a_launcher_that_is_killed_at_the_end(network: Network, workspace: Workspace) -> None:
    """Its workers end at once; the others end well and do not wait for it.

    torchrun's agent waits 300 s where the survivor's process has succeeded; where it fails, it is started again.
    """
    (workspace.root / "slow").unlink()
    flags = ("--training.steps=20",)
    for host in network.hosts[:2]:
        host.start(*flags, **ELASTIC | {"NNODES": "1:2"})
    victim, other = network.hosts[:2]
    while not list((workspace.run_dir / "checkpoints").glob("step-00000020")):
        time.sleep(0.01)
        assert victim.process and victim.process.poll() is None, network.logs()
    assert victim.process
    victim.process.kill()
    begun = time.time()
    while run("ip", "netns", "pids", victim.namespace).split():
        assert time.time() - begun < 5, "its workers live on"
        time.sleep(0.1)
    code = other.wait(120)
    print(f"exit code {code} after {time.time() - begun:.0f} s")
    assert code == 0, network.logs()


@pytest.mark.long
def test_a_host_that_is_asked_to_stop_leaves(network: Network, workspace: Workspace) -> None:
    """It saves with the others and exits with 0; they continue. Seen to fail with workers that exit with 0: all end."""
    flags = ("--training.steps=100",)
    begun = time.time()
    for host in network.hosts[:3]:
        host.start(*flags, **ELASTIC)
    network.wait_for_step(begun, 120, world=3)
    begun = time.time()
    assert network.hosts[1].process
    network.hosts[1].process.send_signal(signal.SIGTERM)
    assert network.hosts[1].wait(60) == 0, network.logs()
    print(f"two hosts continue after {network.wait_for_step(begun, LIMIT_SECONDS, world=2):.0f} s")
    (workspace.root / "slow").unlink()
    assert [network.hosts[i].wait(120) for i in (0, 2)] == [0, 0], network.logs()
    assert "host host2 has left the run" in network.hosts[1].text
