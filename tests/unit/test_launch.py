"""run_train.sh and `torchxihe launch`, with stand-ins for the interpreter, `prepare` and `train`."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchxihe.commands import launch
from torchxihe.commands.launch import Launch, read_environment
from torchxihe.components.checkpoint.manifest import TRAIN_STATE, Manifest, write_manifest
from torchxihe.components.checkpoint.storage import Location
from torchxihe.config.load import load_config
from torchxihe.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "xihe_debug.toml")


def start(*args: str, cwd: Path, script: Path = ROOT / "run_train.sh", **env: str) -> "subprocess.Popen[str]":
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(script), *args], cwd=cwd, env=environment, text=True, start_new_session=True, **pipes)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# The environment


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """An interpreter that can run the project, as far as anyone asks, and prints what it is told to run."""
    return str(executable(tmp_path / "echo", '#!/bin/sh\n[ "$1" = - ] || echo "$@"\n'))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], [CONFIG]),
        (["--training.steps=3"], [CONFIG, "--training.steps=3"]),
        (["my.toml"], ["my.toml"]),
        (["my.toml", "--metrics.sample_prompt=a b"], ["my.toml", "--metrics.sample_prompt=a b"]),
        (["--training.steps", "3", "my.toml"], ["--training.steps", "3", "my.toml"]),
        (["--training.steps", "3"], [CONFIG, "--training.steps", "3"]),
        (["my.toml", "--help"], ["--help"]),
    ],
)
def test_arguments(args: list[str], told: list[str], echo: str, tmp_path: Path) -> None:
    assert finish(start(*args, cwd=tmp_path, PYTHON=echo)) == (0, f"-m torchxihe launch {' '.join(told)}\n", "")


def test_interpreters_that_do_not_do(tmp_path: Path) -> None:
    bare = executable(tmp_path / "bare" / "python3", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    code, _, err = finish(start(cwd=tmp_path, PYTHON=str(bare)))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "lacks torch>=2.11, datasets" in err
    assert "pip install -c" in err
    code, _, err = finish(start(cwd=tmp_path, PYTHON="/nowhere/python"))
    assert (code, err.splitlines()[-1]) == (1, "run_train.sh: PYTHON=/nowhere/python does not run")


def test_ctrl_c_while_interpreters_are_looked_at_is_silent(tmp_path: Path) -> None:
    """Seen to fail, with the interpreter's traceback, without the trap in `lacks`."""
    slow = f'#!/bin/sh\necho >{tmp_path}/asked\nexec {sys.executable} -c "import time; time.sleep(2); print(1)"\n'
    python = executable(tmp_path / "slow", slow)
    process = start(cwd=tmp_path, PYTHON=str(python))
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    time.sleep(0.5)  # the interpreter sleeps
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert finish(process) == (-signal.SIGINT, "", "")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, as far as the launcher sees it, without any interpreter on the PATH."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("run_train.sh", "environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    for tool in ("bash", "sh", "dirname", "basename", "cat", "cksum", "flock", "tee", "mkdir", "cp", "rm"):
        executable(tmp_path / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n')
    return clone


PYTHON_WITHOUT_TORCH = """#!/bin/sh
case "$*" in
-\\ *) echo "torch>=2.11" ;;
-c*ensurepip*) exit $NO_VENV ;;
-m\\ venv*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
*pip*) echo "pip: $*" ;;
-m\\ torchxihe*) echo "run by $0" ;;
esac
"""


def in_clone(clone: Path, python: str = "", args: tuple[str, ...] = (), **env: str) -> tuple[int, str, str]:
    folder = clone.parent / "bin"
    if python:
        executable(folder / "python3", python)
    return finish(start(*args, cwd=clone, script=clone / "run_train.sh", PATH=str(folder), **env))


def test_no_python_an_old_one_and_one_without_venv(clone: Path) -> None:
    nothing = (1, "", "run_train.sh: no Python 3.10 or newer found; install one, or set PYTHON\n")
    assert in_clone(clone) == nothing
    assert in_clone(clone, '#!/bin/sh\necho "Python 3.10 or newer"\n') == nothing
    assert in_clone(clone, "#!/bin/sh\nexit 1\n") == nothing
    code, _, err = in_clone(clone, PYTHON_WITHOUT_TORCH, NO_VENV="1")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "cannot make a virtual environment" in err


def test_a_newer_python_beside_an_old_one_serves(clone: Path) -> None:
    executable(clone.parent / "bin" / "python3.12", '#!/bin/sh\n[ "$1" = - ] || echo "run by $0"\n')
    code, out, _ = in_clone(clone, '#!/bin/sh\necho "Python 3.10 or newer"\n')
    assert (code, out) == (0, f"run by {clone.parent}/bin/python3.12\n")


def test_a_virtual_environment_is_made_once_and_kept_up_to_date(clone: Path) -> None:
    code, out, err = in_clone(clone, PYTHON_WITHOUT_TORCH, NO_VENV="0")
    assert (code, err) == (0, "")
    assert f"-c {clone}/constraints.txt -e {clone}\n" in out
    assert out.endswith(f"run by {clone}/.venv/bin/python\n")
    assert in_clone(clone, NO_VENV="0") == (0, f"run by {clone}/.venv/bin/python\n", "")
    (clone / "constraints.txt").write_text("torch==2.11.0\n")
    assert "pip: " in in_clone(clone, NO_VENV="0")[1]
    assert "pip: " not in in_clone(clone, NO_VENV="0")[1]


def test_a_failed_installation_is_tried_again(clone: Path) -> None:
    broken = PYTHON_WITHOUT_TORCH.replace('echo "pip: $*"', "exit 1")
    assert in_clone(clone, broken, NO_VENV="0")[0] == 1
    shutil.copy(executable(clone.parent / "bin" / "python3", PYTHON_WITHOUT_TORCH), clone / ".venv" / "bin" / "python")
    assert "pip: " in in_clone(clone, NO_VENV="0")[1]


def test_help_installs_nothing(clone: Path) -> None:
    """Seen to fail: it made .venv and installed PyTorch."""
    code, out, err = in_clone(clone, PYTHON_WITHOUT_TORCH, args=("--help",), NO_VENV="0")
    assert (code, out, err) == (0, f"run by {clone.parent}/bin/python3\n", "")
    assert not (clone / ".venv").exists()


def test_uv_serves_where_it_is_installed(clone: Path) -> None:
    uv = """#!/bin/sh
echo "uv: $*"
[ "$1" != venv ] || for last; do :; done
[ "$1" != venv ] || { mkdir -p "$last/bin" && cp "$(command -v python3)" "$last/bin/python"; }
"""
    executable(clone.parent / "bin" / "uv", uv)
    code, out, err = in_clone(clone, PYTHON_WITHOUT_TORCH, NO_VENV="1")
    assert (code, err) == (0, "") and "pip: " not in out
    assert f"uv: pip install --python {clone}/.venv/bin/python -c {clone}/constraints.txt -e {clone}\n" in out
    assert out.endswith(f"run by {clone}/.venv/bin/python\n")


# Launching


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A working directory whose `torchxihe` is the real one with other `prepare` and `train` commands."""
    package = tmp_path / "torchxihe"
    (package / "commands").mkdir(parents=True)
    for path in (ROOT / "torchxihe").iterdir():
        if path.name not in ("commands", "__pycache__"):
            (package / path.name).symlink_to(path)
    for name in ("__init__.py", "launch.py", "config.py"):
        (package / "commands" / name).symlink_to(ROOT / "torchxihe" / "commands" / name)
    command(tmp_path, "prepare", "say('prepared', *args)")
    return tmp_path


def command(fake: Path, name: str, body: str) -> None:
    lines = "\n    ".join(body.splitlines())
    # Whole lines, because two processes may print at once.
    say = "def say(*words):\n    os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"
    head = f"import os, signal, sys, time\nfrom torchxihe.errors import UserError\n{say}"
    (fake / "torchxihe" / "commands" / f"{name}.py").write_text(f"{head}\ndef main(args):\n    {lines}\n")


def launched(fake: Path, *args: str, **env: str) -> "subprocess.Popen[str]":
    return start(*args, cwd=fake, PYTHON=sys.executable, **env)


WAITS = """
def stop(number, frame):
    say('got', signal.Signals(number).name, 'on', os.environ.get('RANK'))
    sys.exit(CODE)
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
say("ready")
time.sleep(60)
"""


def send_when_ready(process: "subprocess.Popen[str]", number: int, ready: int = 1) -> None:
    assert process.stdout
    while ready:
        line = process.stdout.readline()
        assert line, "ended before it was ready"
        ready -= line == "ready\n"
    process.send_signal(number)


def test_one_process_runs_without_torchrun(fake: Path) -> None:
    command(fake, "train", "say('train', *args, 'RANK' in os.environ, os.environ['PYTORCH_ALLOC_CONF'])")
    code, out, err = finish(launched(fake, "--training.steps=3"))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"prepared {CONFIG} --training.steps=3",
        f"train {CONFIG} --training.steps=3 False expandable_segments:True",
    ]


@pytest.mark.parametrize("code", [0, 1, 7])
def test_one_process_gives_its_exit_code_and_gets_the_signals(fake: Path, code: int) -> None:
    command(fake, "train", WAITS.replace("CODE", str(code)))
    process = launched(fake)
    send_when_ready(process, signal.SIGUSR1)
    assert finish(process) == (code, "got SIGUSR1 on None\n", "")


def test_a_mistake_in_prepare_is_its_line_and_no_training(fake: Path) -> None:
    command(fake, "prepare", "raise UserError('data.sources.0.path: no such file')")
    command(fake, "train", "say('train')")
    assert finish(launched(fake, NGPU="2")) == (1, "", "data.sources.0.path: no such file\n")


@pytest.mark.parametrize(
    ("args", "env", "line"),
    [
        (["gone.toml"], {}, "gone.toml: no such file"),
        (
            ["--parallelism.dp_shard=3"],
            {"NGPU": "2"},
            "--parallelism.dp_shard: parallelism.dp_replicate × parallelism.dp_shard = 1 × 3 does not match",
        ),
        ([], {"NGPU": "two"}, "NGPU=two: must be a whole number"),
        ([], {"NNODES": "2"}, "NNODES=2: needs RDZV_ENDPOINT=host:port"),
    ],
)
def test_mistakes_are_one_line_within_ten_seconds(fake: Path, args: list[str], env: dict[str, str], line: str) -> None:
    begin = time.monotonic()
    code, out, err = finish(launched(fake, *args, **env))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith(line)
    assert time.monotonic() - begin < 10


def test_another_runs_config_is_refused_before_the_data_is_prepared(fake: Path) -> None:
    """And before torch is imported; a damaged checkpoint is training's to judge. Seen to fail without the check, and,
    with it, when nothing compares the hash."""
    step = Location(fake / "runs" / "xihe_debug" / "checkpoints" / "step-00000005")
    step.make()
    with (step / TRAIN_STATE).create() as file:
        config = load_config(CONFIG).model_dump(mode="json")
        state = {"step": 5, "stages": [], "config": config, "changes": [], "tokenizer": "", "origin": ""}
        file.write(json.dumps(state).encode())
    write_manifest(step, Manifest(5, {TRAIN_STATE: file.digest()}, ("model",)))
    command(fake, "train", "say('train')")
    code, out, err = finish(launched(fake, "--training.seed=5", PYTHONPROFILEIMPORTTIME="1"))
    lines = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (code, out, len(lines)) == (1, "", 1)
    assert lines[0].startswith("training.seed: was 0 when this run was saved, is 5; a run keeps it: ")
    assert " torchxihe.config\n" in err and " torch\n" not in err
    assert finish(launched(fake, "--optimizer.lr=1e-5"))[0] == 0
    saved = Path(step) / TRAIN_STATE
    saved.write_text(saved.read_text().replace('"seed": 0', '"seed": 4'))
    assert finish(launched(fake))[1].splitlines() == [f"prepared {CONFIG}", "train"]


def test_a_signal_while_preparing_ends_it(fake: Path) -> None:
    command(fake, "prepare", "say('ready')\ntime.sleep(60)")
    command(fake, "train", "say('train')")
    process = launched(fake)
    send_when_ready(process, signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, out, err) == (128 + signal.SIGTERM, "", "prepare was killed by SIGTERM\n")


def test_several_processes_have_torchruns_environment(fake: Path) -> None:
    names = "'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS'"
    command(fake, "train", f"say(*(os.environ[n] for n in ({names})), *args)")
    code, out, err = finish(launched(fake, "--training.steps=3", NGPU="2"))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [
        f"0 0 2 {threads} {CONFIG} --training.steps=3",
        f"1 1 2 {threads} {CONFIG} --training.steps=3",
        f"prepared {CONFIG} --training.steps=3",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_ends_well_on_a_signal_is_a_success(fake: Path, number: int) -> None:
    command(fake, "train", WAITS.replace("CODE", "0"))
    process = launched(fake, NGPU="2")
    send_when_ready(process, number, ready=2)
    code, out, err = finish(process)
    name = signal.Signals(number).name
    assert (code, sorted(out.splitlines()), err) == (0, [f"got {name} on 0", f"got {name} on 1"], "")


def test_a_mistake_on_all_ranks_is_one_line(fake: Path) -> None:
    command(fake, "train", "raise UserError('runs/x: was started with another seed')")
    code, _, err = finish(launched(fake, NGPU="2"))
    assert (code, err) == (1, "runs/x: was started with another seed\n")


def test_a_mistake_on_one_rank_names_it(fake: Path) -> None:
    command(fake, "train", "if os.environ['RANK'] == '1': raise UserError('0001.bin: short read')\ntime.sleep(60)")
    code, _, err = finish(launched(fake, NGPU="2"))
    assert (code, err) == (1, "[rank 1] 0001.bin: short read\n")


def test_a_crash_is_its_traceback_and_nothing_else(fake: Path) -> None:
    command(fake, "train", "if os.environ['RANK'] == '1': 1 / 0\ntime.sleep(60)")
    code, _, err = finish(launched(fake, NGPU="2"))
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_a_death_without_words_is_reported(fake: Path) -> None:
    command(fake, "train", "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    code, _, err = finish(launched(fake, NGPU="2"))
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("rank 1 (process ")
    assert "was killed by SIGKILL; out of memory is the usual reason" in err


@pytest.mark.parametrize("with_rank", [True, False])
def test_two_machines(fake: Path, with_rank: bool) -> None:
    command(fake, "train", "say(os.environ['RANK'], os.environ['WORLD_SIZE'])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    machines = []
    for rank in ("0", "1"):
        env = {"NODE_RANK": rank} if with_rank else {}
        machines.append(launched(fake, NGPU="1", NNODES="2", RDZV_ENDPOINT=endpoint, **env))
    done = [finish(machine) for machine in machines]
    assert [code for code, _, _ in done] == [0, 0], done
    ranks = [out.splitlines()[-1] for _, out, _ in done]
    assert (ranks if with_rank else sorted(ranks)) == ["0 2", "1 2"]


# Reading the environment


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(("PET_", "MASTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "_gpu_count", lambda: 0)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "gpus", "expected"),
    [
        ({}, 0, Launch(1, 1, -1, "")),
        ({}, 8, Launch(8, 1, -1, "")),
        ({"NGPU": "2"}, 8, Launch(2, 1, -1, "")),
        ({"PET_NPROC_PER_NODE": "gpu"}, 8, Launch(8, 1, -1, "")),
        ({"PET_NPROC_PER_NODE": "4", "NGPU": "2"}, 8, Launch(2, 1, -1, "")),
        ({"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "a:1"}, 8, Launch(8, 2, 1, "a:1")),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a"}, 8, Launch(8, 2, -1, "a:29500")),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}, 1, Launch(1, 2, -1, "a:7")),
        ({"PET_NNODES": "2:4", "PET_RDZV_ENDPOINT": "a"}, 8, Launch(8, 4, -1, "a:29500", 2)),
    ],
)
def test_environment(environment: pytest.MonkeyPatch, variables: dict[str, str], gpus: int, expected: Launch) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(launch, "_gpu_count", lambda: gpus)
    assert read_environment() == expected


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"NGPU": "9"}, "NGPU=9: this machine has 8 GPUs"),
        ({"NNODES": "2", "NODE_RANK": "2", "RDZV_ENDPOINT": "a:1"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NGPU": "0"}, "NGPU=0: must be a whole number, 1 or more"),
        ({"NGPU": "-1"}, "NGPU=-1: must be a whole number, 1 or more"),
        ({"NNODES": "0"}, "NNODES=0: must be a whole number, 1 or more"),
        ({"NODE_RANK": "-2"}, "NODE_RANK=-2: must be a whole number, 0 or more"),
        ({"NNODES": "4:2", "RDZV_ENDPOINT": "a:1"}, "NNODES=4:2: must be a number, or LEAST:MOST, such as 2:4"),
        ({"PET_NNODES": "2:x"}, "NNODES=2:x: must be a number, or LEAST:MOST, such as 2:4"),
        ({"PET_NNODES": "x"}, "PET_NNODES=x: must be a whole number"),
    ],
)
def test_environment_mistakes(environment: pytest.MonkeyPatch, variables: dict[str, str], why: str) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(launch, "_gpu_count", lambda: 8)
    with pytest.raises(UserError, match=why):
        read_environment()


# Signals, and processes that are killed


def wait_for_end(pid: int, seconds: float = 10) -> bool:
    """Whether a process that is not our child ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize(("phase", "count"), [("prepare", 1), ("train", 2)])
def test_a_killed_launcher_leaves_no_process(fake: Path, phase: str, count: int) -> None:
    """SIGKILL cannot be forwarded. Seen to fail: the workers trained on."""
    command(fake, phase, "say('pid', os.getpid())\ntime.sleep(60)")
    process = launched(fake, NGPU="2")
    assert process.stdout
    pids: list[int] = []
    while len(pids) < count:
        line = process.stdout.readline()
        assert line
        pids += [int(line.split()[1])] if line.startswith("pid ") else []
    process.kill()
    process.wait()
    ended = [wait_for_end(pid) for pid in pids]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert all(ended)


def test_a_signal_after_the_workers_have_ended_changes_nothing(fake: Path) -> None:
    """Seen to fail: the exit code was 143."""
    command(fake, "train", "pass")
    late = """
import os, sys
import torch.distributed.run as torchrun
from torchxihe.commands import launch
run = torchrun.run
def run_and_be_stopped(args):
    run(args)
    os.kill(os.getpid(), 15)
torchrun.run = run_and_be_stopped
launch.main(sys.argv[1:])
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(fake), "PYTHONPATH": str(fake), "NGPU": "2"}
    done = subprocess.run(
        [sys.executable, "-c", late, CONFIG], cwd=fake, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_in_the_first_second_is_one_line(fake: Path) -> None:
    """Whatever is being imported. Seen to fail with tracebacks. While Python itself starts, it has no effect."""
    command(fake, "train", "import torch\nsay('train')")
    for delay in (0.1, 0.2, 0.4, 0.8):
        process = launched(fake, NGPU="2")
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, _, err = finish(process)
        assert err in ("", "interrupted\n", "prepare was killed by SIGINT\n"), delay
