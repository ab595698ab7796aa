"""Hosts that are lost and return during one run (NNODES=2:4), on network namespaces with the real run_train.sh."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Workspace, token_ledger
from tests.faults.hosts import Host, Network, needs_namespaces

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
        codes = {host.name: host.wait(180) for host in self.network.hosts}
        assert set(codes.values()) == {0}, f"{codes}\n{self.network.logs()}"


@pytest.mark.parametrize("losses", [3, pytest.param(20, marks=pytest.mark.long)])
def test_random_losses_and_returns(
    losses: int, network: Network, workspace: Workspace, unbroken: Callable[..., Workspace]
) -> None:
    """The token ledger is the unbroken run's, no step is twice in the metrics, and each is over within 60 s."""
    steps = 400 if losses < 20 else 4000
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
