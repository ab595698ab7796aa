"""cluster/slurm.sbatch on a SLURM of this machine's own: two nodes, Debian's packages slurm-wlm and munge."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import free_port
from tests.faults.harness import Workspace
from tests.faults.hosts import REPOSITORY, SITE

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
missing = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs SLURM (slurm-wlm, munge); missing: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
    pytest.mark.timeout(900),
    pytest.mark.long,
]

CONF = """
ClusterName=px
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=30
JobRequeue=1
ReturnToService=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=main Nodes=n0,n1 Default=YES State=UP OverSubscribe=FORCE:4
"""


class Slurm:
    """A controller and two nodes."""

    def __init__(self, folder: Path) -> None:
        self.conf = folder / "slurm.conf"
        for name in ("state", "spool.n0", "spool.n1"):
            (folder / name).mkdir(parents=True)
        values = {"host": socket.gethostname(), "folder": folder, "cpus": os.cpu_count()}
        self.conf.write_text(CONF.format(ports=[free_port() for _ in range(3)], **values))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--{what}={folder}/munge.{what.removesuffix('-file')}" for what in ("socket", "pid-file", "log-file")]
        own += [f"--key-file={key}", f"--seed-file={folder}/munge.seed", "--force", "--foreground"]
        commands = [
            ["munged", *own],
            ["slurmctld", "-D", "-c", "-f", str(self.conf)],
            *(["slurmd", "-D", "-f", str(self.conf), "-N", name] for name in ("n0", "n1")),
        ]
        self.processes: list[subprocess.Popen[bytes]] = []
        with (folder / "daemons.txt").open("wb") as log:
            for command in commands:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1)
        self.log = folder / "daemons.txt"

    def call(self, *command: str, **options: str) -> str:
        env = os.environ | {"SLURM_CONF": str(self.conf)} | options
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.log.read_text()[-3000:]}"
        return done.stdout

    def state(self, job: str) -> str:
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word for word in words if word.startswith("JobState=")).partition("=")[2]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    made = Slurm(tmp_path / "slurm")
    yield made
    made.close()


def test_preempted_requeued_finished(slurm: Slurm, workspace: Workspace, unbroken: Callable[..., Workspace]) -> None:
    """USR1, which SLURM sends 120 s before the limit: saved, requeued, and bitwise the unbroken run."""
    site = workspace.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    (workspace.root / "slow").touch()
    env = {
        "PYTHON": sys.executable,
        "TORCHXIHE": str(REPOSITORY),
        "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]),
        "OBSERVED": str(workspace.root),
        "NGPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    submit = ["sbatch", "--parsable", "--nodes=2", f"--chdir={workspace.root}", f"{REPOSITORY}/cluster/slurm.sbatch"]
    job = slurm.call(*submit, "config.toml", **env).strip()
    log = workspace.root / f"slurm-{job}.out"

    def wait_for(what: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{slurm.state(job)}\n{log.read_text() if log.exists() else ''}"
            time.sleep(0.3)

    wait_for(lambda: log.exists() and "step  5/20" in log.read_text(), 120)
    slurm.call("scancel", "--signal=USR1", job)
    wait_for(lambda: "stopped after step" in log.read_text(), 60)
    assert (workspace.run_dir / "PREEMPTED").exists()
    (workspace.root / "slow").unlink()
    wait_for(lambda: "resuming from" in log.read_text(), 180)
    wait_for(lambda: slurm.state(job) == "COMPLETED", 120)
    assert workspace.files(20) == unbroken(2).files(20)
    assert not (workspace.run_dir / "PREEMPTED").exists()
