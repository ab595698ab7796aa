"""config/ and the commands around it: what is read, what is refused, and with which message."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchxihe
from torchxihe.__main__ import run as run_here
from torchxihe.commands.config import DOCS, reference
from torchxihe.config.checks import data_degrees, find_warnings, micro_batch_limit
from torchxihe.config.load import dump_config, join_values, load_config
from torchxihe.config.options import Config, Parallelism
from torchxihe.errors import UserError
from torchxihe.parsers import parse

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs" / "xihe_debug.toml"
PRESETS = sorted((ROOT / "configs").glob("*.toml"))

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 4096,
}
COLUMNS_ONLY = "only column names may be in braces; write {{ and }} for literal braces"
NO_TOML = "is not valid TOML; put strings in \"quotes\", and the value in 'quotes' for the shell"
SMALL: dict[str, Any] = {
    "model": MODEL,
    "data": {"sources": [{"path": "{stdlib}", "glob": "**/*.py"}], "seq_len": 64},
    "training": {"steps": 10, "global_batch_size": 4},
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A valid config file in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(tomli_w.dumps(SMALL))
    return "small.toml"


def mistakes(*args: Any, **kwargs: Any) -> list[str]:
    """The lines of the UserError that loading raises."""
    with pytest.raises(UserError) as caught:
        load_config(*args, **kwargs)
    return str(caught.value).splitlines()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchxihe", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
    )


# Reading


def test_defaults_and_the_name_of_the_run(small: str) -> None:
    config = load_config(small)
    assert (config.run.name, config.run_dir) == ("small", Path("runs/small"))
    assert config.optimizer.betas == (0.9, 0.95)
    assert load_config(small, ["--run.name=other"]).run_dir == Path("runs/other")


def test_a_file_of_a_windows_editor(tmp_path: Path, small: str) -> None:
    """That begins with a byte-order mark and ends its lines with CRLF."""
    file = tmp_path / "windows" / "small.toml"
    file.parent.mkdir()
    file.write_bytes(b"\xef\xbb\xbf" + Path(small).read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(str(file)) == load_config(small)


def test_a_tilde_is_the_home_directory(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    places = ["run.dir", "tokenizer.path", "data.cache_dir", "data.sources.0.path", "checkpoint.dir", "checkpoint.load"]
    config = load_config(small, [f"--{place}=~/{place}" for place in places])
    dumped = dump_config(config)
    assert all(f'"/home/x/{place}"' in dumped for place in places) and "~" not in dumped
    assert config.run_dir == Path("/home/x/run.dir/small")
    monkeypatch.setenv("HOME", str(Path(small).resolve().parent))
    Path("child.toml").write_text('extends = "~/small.toml"')
    assert load_config("child.toml").model == config.model


def test_the_horizon_in_steps_or_tokens(small: str) -> None:
    assert load_config(small).total_steps == 10
    tokens = ["--training.steps=0", "--training.tokens=1025"]  # 4 * 64 a step
    assert load_config(small, tokens).total_steps == 5
    for ramp, steps in (("[[2, 3]]", 6), ("[[2, 9]]", 9), ("[[2, 8], [3, 9]]", 9), ("[[2, 3], [8, 4]]", 5)):  # 17 rows
        config = load_config(small, [*tokens, f"--training.batch_ramp={ramp}"])
        assert config.total_steps == steps
        rows = [config.batch_size(step) for step in range(steps)]
        assert sum(rows[:-1]) < 17 <= sum(rows)
    for flags in (["--training.tokens=5"], ["--training.steps=0"]):
        assert mistakes(small, flags)[0].endswith(
            "training.steps: give training.steps or training.tokens, one of the two (0: not given)"
        ) or mistakes(small, flags)[0].startswith("--training.steps: give")


def test_extends_merges_tables_and_replaces_lists(small: str) -> None:
    child = {
        "extends": "../small.toml",  # relative to the file it stands in
        "model": {"hidden_size": 32},
        "data": {"sources": [{"path": "a.txt"}, {"path": "b.txt"}]},
    }
    Path("sub").mkdir()
    Path("sub/child.toml").write_text(tomli_w.dumps(child))
    config = load_config("sub/child.toml")
    assert (config.model.hidden_size, config.model.head_dim, config.run.name) == (32, 16, "child")
    assert [source.path for source in config.data.sources] == ["a.txt", "b.txt"]


def test_overrides_are_toml_values_or_bare_words(small: str) -> None:
    config = load_config(
        small,
        [
            "--optimizer.lr=1e-3",
            "--optimizer.betas=[0.8, 0.9]",
            "--training.compile=false",
            "--training.dtype=float32",
            "--data.seq-len=32",
            "--data.sources.0.weight=2",
            "--data.sources.0.subset=20231101",  # a number, but the option is a string
            '--metrics.sample_prompt="a b"',
            "--metrics.sample_prompt=2026-11-24",
            "--data.sources.0.template={a}\n{b}",
        ],
    )
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.8, 0.9))
    assert (config.training.compile, config.training.dtype, config.data.seq_len) == (False, "float32", 32)
    source = config.data.sources[0]
    assert (source.weight, source.subset, source.template, source.glob) == (2.0, "20231101", "{a}\n{b}", "**/*.py")
    assert config.metrics.sample_prompt == "2026-11-24"


def test_configs_do_not_change(small: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(small).training.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_survive_the_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.toml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.run.name == path.stem


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(path=texts, prompt=texts, lr=st.floats(1e-300, 1e300), betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_any_values_survive_the_round_trip(
    path: str, prompt: str, lr: float, betas: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = SMALL | {
        "data": {"seq_len": 64, "sources": [{"path": path}]},
        "metrics": {"sample_prompt": prompt},
        "optimizer": {"lr": lr, "betas": betas},
        "run": {"name": "x"},
    }
    config = Config.model_validate(values)
    copy = tmp_path_factory.mktemp("copy") / "config.toml"
    copy.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(copy) == config


# Refusing: the wording is the interface here


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--training.stepz=3", "unknown key; did you mean training.steps?"),
        ("--trainig.steps=3", "trainig: unknown key; did you mean training?"),
        ("--steps=3", "unknown key; did you mean training.steps?"),
        ("--model.seq_len=3", "unknown key; did you mean data.seq_len?"),
        ("--model.zzz=3", "unknown key; docs/config.md lists all of them"),
        ("--training.steps=many", "must be an integer, got 'many'"),
        ("--training.steps=2.5", "must be an integer, got 2.5"),
        ("--training.steps=true", "must be an integer, got True"),
        ("--training.steps=-1", "must be at least 0, got -1"),
        ("--training.compile=no", "must be true or false, got 'no'"),
        ("--training.steps=1e40", "must be an integer, got 1e+40"),
        (f"--training.steps=1{'0' * 40}", f"must be at most 9.0072e+15, got 1{'0' * 40}"),
        (f"--training.steps=1{'0' * 5000}", "must be an integer, got '1" + "0" * 74 + " ..."),
        ("--model.hidden_size=9223372036854775807", "must be at most 9.0072e+15, got 9223372036854775807"),
        ("--optimizer.betas=" + "[" * 5000, "[" * 76 + f" ... {NO_TOML}"),
        ("--data.sources=[{" + "a." * 5000 + "a=1}]", "[{" + "a." * 37 + f" ... {NO_TOML}"),
        ("--training.compile=1", "must be true or false, got 1"),
        ("--training.dtype=bf16", "must be 'bfloat16' or 'float32', got 'bf16'"),
        ("--data.loss_roles=[]", 'names no role; the usual one is ["assistant"]'),
        ('--data.loss_roles=["user"]', 'is for conversations; set data.format = "chat", or remove it'),
        ("--optimizer.lr=0", "must be greater than 0, got 0"),
        ("--optimizer.lr=inf", "must be a finite number, got inf"),
        ("--optimizer.betas=0.9", "must be a list, got 0.9"),
        ("--optimizer.betas=[0.9,0.99", f"[0.9,0.99 {NO_TOML}"),
        ("--checkpoint.load_only=model", "must be a list such as [\"model\"], got 'model'"),
        ("--checkpoint.load_only=[model]", f"[model] {NO_TOML}"),
        ("--data.sources=[{path=x}]", f"[{{path=x}}] {NO_TOML}"),
        ("--optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: must be less than 1, got 1.0"),
        ("--optimizer.weight_decay=inf", "must be a finite number, got inf"),
        (
            "--model.hidden_size=250",
            "250 is not a multiple of model.num_attention_heads = 4, which transformers requires of a Llama; "
            "change one of them, or set model.qk_norm = true (Qwen3)",
        ),
        ("--model=3", "must be a table, got 3"),
        ("--model.head_dim=5", "must be a multiple of 2, got 5"),
        ("--model.num_key_value_heads=3", "3 does not divide model.num_attention_heads = 4"),
        ("--tokenizer.vocab_size=5000", "5000 is more than model.vocab_size = 4096"),
        ("--parallelism.dp_shard=0", "must be -1 or at least 1, got 0"),
        (
            "--run.name=a/b",
            "must consist of letters, digits, '.', '_' and '-', and begin with a letter or digit; "
            "it is the file's stem unless --run.name=NAME is given, got 'a/b'",
        ),
        ("--data.sources=[]", "needs at least one entry"),
        ("--data.sources=[{path='x', pth='y'}]", "data.sources.0.pth: unknown key; did you mean data.sources.0.path?"),
        ("--data.sources.0.pth=x", "unknown key; did you mean data.sources.0.path?"),
        ("--data.sources.1.path=x", "data.sources has 1 entry, counted from 0; there is no 1"),
        ("--data.sources.0=x", "an entry of a list cannot be replaced as such; name a key of it"),
        ("--data.seq_len.x=1", "data.seq_len is a single value and has no keys"),
        ("--data.sources.0.path=", "must not be empty"),
        ("--data.sources.0.template=plain", "names no column; write one in braces, such as {text}, got 'plain'"),
        ("--data.sources.0.template={}", f"{COLUMNS_ONLY}, got '{{}}'"),
        ("--data.sources.0.template={a!r}", f"{COLUMNS_ONLY}, got '{{a!r}}'"),
        ("--data.sources.0.template={a:>5}", f"{COLUMNS_ONLY}, got '{{a:>5}}'"),
        (
            "--data.sources.0.template={a",
            "expected '}' before end of string; write {{ and }} for literal braces, got '{a'",
        ),
        ("--training.batch_ramp=[[8, 5], [9, 5]]", "its pairs are [sequences, until step]; the steps must rise"),
        ("--data.sources.0.stream=true", "a streamed source has no end of its own; give max_tokens"),
        ("--training.steps", "has no value; write --training.steps=VALUE"),
    ],
)
def test_a_wrong_override_is_one_line(small: str, flag: str, why: str) -> None:
    assert mistakes(small, [flag]) == [f"{flag.split('=')[0]}: {why}"]


def test_all_mistakes_of_file_and_flags_at_once(small: str) -> None:
    values = SMALL | {"training": {"stepz": 10, "global_batch_size": "4"}, "optimiser": {"lr": 1.0}}
    del values["data"]
    Path(small).write_text(tomli_w.dumps(values))
    assert mistakes(small, ["--metrics.log_every=0", "--nonsense"]) == [
        "--nonsense: not understood; overrides look like --section.key=value",
        "small.toml: data: required, but missing",
        "small.toml: training.global_batch_size: must be an integer, got '4'",
        "small.toml: training.stepz: unknown key; did you mean training.steps?",
        "--metrics.log_every: must be at least 1, got 0",
        "small.toml: optimiser: unknown key; did you mean optimizer?",
    ]


def test_a_mistake_names_the_file_it_stands_in(small: str) -> None:
    Path("child.toml").write_text('extends = "small.toml"\n[training]\nsteps = "9"\n[model]\nhead_dim = 3\n')
    Path(small).write_text(tomli_w.dumps(SMALL | {"metrics": {"log_every": 0}}))
    assert mistakes("child.toml") == [
        "child.toml: model.head_dim: must be a multiple of 2, got 3",
        "child.toml: training.steps: must be an integer, got '9'",
        "small.toml: metrics.log_every: must be at least 1, got 0",
    ]


def test_files_that_cannot_be_read(small: str) -> None:
    assert mistakes("smal.toml") == ["smal.toml: no such file; did you mean small.toml?"]
    Path("broken.toml").write_text("[model\n")
    assert mistakes("broken.toml")[0].startswith("broken.toml: not valid TOML: ")
    Path("latin.toml").write_bytes(b'a = "\xe9"')
    assert mistakes("latin.toml") == ["latin.toml: not UTF-8 at byte 5"]
    Path("folder.toml").mkdir()
    assert mistakes("folder.toml") == ["folder.toml: Is a directory"]
    Path("orphan.toml").write_text('extends = "gone/away.toml"')
    assert mistakes("orphan.toml")[0].startswith("orphan.toml: extends: gone/away.toml: no such file")
    Path("a.toml").write_text('extends = "b.toml"')
    Path("b.toml").write_text('extends = "./a.toml"')
    assert mistakes("a.toml") == [
        "b.toml: extends: a.toml: the files extend each other in a circle; remove one `extends`"
    ]
    Path("pipeline.yaml").write_text("model:\n  hidden_size: 64\n")
    Path("yaml.toml").write_text("# a comment\nmodel:\n  hidden_size: 64\n")
    for file in ("pipeline.yaml", "yaml.toml"):
        assert mistakes(file)[0].startswith(f"{file}: not TOML but YAML or JSON; write it as TOML")
    Path("twice.toml").write_text("[training]\nsteps = 3\n\nsteps = 4\n")
    assert mistakes("twice.toml") == ["twice.toml: line 4: steps = 4 gives a key a second time; keep one of the two"]
    Path("twice.toml").write_text("[training]\nsteps = 3\n[model]\n[training]\n")
    assert mistakes("twice.toml") == ["twice.toml: line 4: [training] gives a table a second time; keep one of the two"]
    Path("list.toml").write_text('extends = ["small.toml"]')
    assert mistakes("list.toml") == ["list.toml: extends: must be the path of one TOML file, relative to this one"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = " + "[" * 100_000, "not valid TOML: nested too deeply"),
        ("a = " + "[" * 30 + "]" * 30, "not valid TOML: nested too deeply"),
        (".".join(["a"] * 100_000) + " = 1", "not valid TOML: nested too deeply"),  # took tens of gigabytes
        ("a = {" + ".".join(["a"] * 30) + " = 1}", "not valid TOML: nested too deeply"),
        ("a = 1" + "0" * 5000, "not valid TOML: Exceeds the limit (4300"),
        ("# " + "x" * 2**20, "has more than 1,048,576 bytes; a config is a small TOML file"),
    ],
)
def test_absurd_files(tmp_path: Path, text: str, why: str) -> None:
    """Seen to fail with RecursionError, ValueError, and for want of memory."""
    file = tmp_path / "absurd.toml"
    file.write_text(text)
    assert mistakes(file)[0].startswith(f"{file}: {why}")


@pytest.mark.timeout(20)
def test_files_that_are_none(tmp_path: Path) -> None:
    """Seen to fail: a FIFO was waited for, a device was read without end."""
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    for file in (str(fifo), "/dev/zero"):
        assert mistakes(file) == [f"{file}: is not a regular file; a config is a small TOML file"]


def test_two_sources_of_one_name(small: str) -> None:
    sources = '--data.sources=[{path="a", name="x"}, {path="b", name="x"}]'
    assert mistakes(small, [sources]) == [
        "--data.sources: data.sources.1.name: two sources or sets are named 'x'; names must differ"
    ]


def test_more_tokens_than_can_be_counted(small: str) -> None:
    assert mistakes(small, ["--training.global_batch_size=9007199254740992"]) == [
        "small.toml: training.steps: the run would have more than 2^62 tokens"
    ]


def test_validation_needs_documents(small: str) -> None:
    flags = ["--validation.every=5", "--validation.fraction=0"]
    assert mistakes(small, flags)[0].startswith("--validation.fraction: 0 holds no documents out")


def command_line(*args: str) -> Config:
    options = parse("train", list(args))
    return load_config(options.config, options.overrides)


def test_command_lines(small: str) -> None:
    assert command_line("--training.steps=3", small).training.steps == 3
    with pytest.raises(UserError, match="^train: more than one config file: small.toml small.toml; "):
        command_line(small, small)
    with pytest.raises(UserError, match="^train: the following arguments are required: CONFIG; "):
        command_line()


def test_values_after_a_blank_and_without_one(small: str) -> None:
    """Seen to fail: "more than one config file", "not understood", "must be an integer, got 1000.0"."""
    for args in (["--training.steps", "3", small], [small, "--training.steps", "3"]):
        assert command_line(*args).training.steps == 3
    for args in (["--training.deterministic", small], [small, "--training.deterministic", "True"]):
        assert command_line(*args).training.deterministic
    assert not command_line(
        small, "--training.compile", "--training.steps=1", "--training.compile=False"
    ).training.compile
    assert command_line(small, "--training.steps=1e3").training.steps == 1000
    assert command_line(small, "--parallelism.dp_shard", "-1").parallelism.dp_shard == -1
    assert command_line(small, "--metrics.sample_prompt", "a b").metrics.sample_prompt == "a b"
    for args, why in (
        (["--training.steps", small], "--training.steps: has no value; write --training.steps=VALUE"),
        (["--training.steps", "2.5", small], "--training.steps: must be an integer, got 2.5"),
        (["--training.stepz", "2", small], "--training.stepz: unknown key; did you mean training.steps?"),
        (["--steps", "2", small], "train: unknown argument --steps; see torchxihe train --help"),
    ):
        with pytest.raises(UserError) as caught:
            command_line(*args)
        assert str(caught.value).startswith(why) or "required: CONFIG" in str(caught.value)
    assert join_values(["--rows", "2", "--x.y", "1"]) == ["--rows", "2", "--x.y=1"]


# Options that a run is too short for


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (
            "lr_scheduler.warmup_steps=10",
            "lr_scheduler.warmup_steps: 10 is beyond the run's 10 steps: there is no decay",
        ),
        (
            "lr_scheduler.warmup_steps=5 lr_scheduler.decay_fraction=0.6",
            "lr_scheduler.decay_fraction: 0.6 of 10 steps is more than the 5 after the warmup: "
            "the decay is shortened to these",
        ),
        ("validation.every=11", "validation.every: 11 is beyond the run's 10 steps: nothing is validated"),
        ("checkpoint.every=11", "checkpoint.every: 11 is beyond the run's 10 steps: only the last step is saved"),
        (
            "checkpoint.every=4 checkpoint.export_every=12",
            "checkpoint.export_every: 12 is beyond the run's 10 steps: only the last step is exported",
        ),
        ("checkpoint.keep_every=11", "checkpoint.keep_every: 11 is beyond the run's 10 steps: keep_last decides which"),
        ("checkpoint.keep_best=1", "checkpoint.keep_best: nothing is validated, so no checkpoint is the best"),
        (
            "metrics.log_every=11",
            "metrics.log_every: 11 is beyond the run's 10 steps: only the first and the last step",
        ),
        ("metrics.sample_every=11", "metrics.sample_every: 11 is beyond the run's 10 steps: only the last step has"),
        ("profiler.first_step=11", "profiler.first_step: 11 is beyond the run's 10 steps: nothing is traced"),
        ("profiler.first_step=9", "profiler.steps: steps 9 to 11 reach beyond the run's 10 steps: the trace ends with"),
        (
            "training.batch_ramp=[[2,5],[3,10]]",
            "training.batch_ramp: step 10 is beyond the run's 10 steps: no step has",
        ),
    ],
)
def test_what_a_run_is_too_short_for(small: str, flags: str, warning: str) -> None:
    """Seen to fail: all of it was accepted silently."""
    [found] = find_warnings(load_config(small, [f"--{flag}" for flag in flags.split()]))
    assert found.startswith(warning)


def test_a_run_that_is_long_enough_has_no_warning(small: str) -> None:
    flags = "lr_scheduler.warmup_steps=2 lr_scheduler.decay_fraction=0.8 validation.every=10 checkpoint.every=10"
    flags += " checkpoint.export_every=10 checkpoint.keep_every=10 checkpoint.keep_best=1 metrics.log_every=10"
    flags += " metrics.sample_every=10 profiler.first_step=8 training.batch_ramp=[[2,9]]"
    assert find_warnings(load_config(small, [f"--{flag}" for flag in flags.split()])) == []
    for preset in PRESETS:
        assert find_warnings(load_config(preset)) == []


# Parallelism


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size", "degrees"),
    [(1, -1, 1, (1, 1)), (1, -1, 8, (1, 8)), (2, -1, 8, (2, 4)), (8, 1, 8, (8, 1)), (2, 4, 8, (2, 4))],
)
def test_degrees(replicate: int, shard: int, world_size: int, degrees: tuple[int, int]) -> None:
    assert data_degrees(Parallelism(dp_replicate=replicate, dp_shard=shard), world_size) == degrees


@pytest.mark.parametrize(
    ("replicate", "shard", "world_size"), [(3, -1, 8), (16, -1, 8), (1, 1, 8), (2, 8, 8), (1, 2, 1)]
)
def test_degrees_that_do_not_fit(replicate: int, shard: int, world_size: int) -> None:
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    valid = rf"valid combinations \(dp_replicate × dp_shard\): 1 × {world_size}"
    with pytest.raises(UserError, match=f"does not match {processes}; {valid}"):
        data_degrees(Parallelism(dp_replicate=replicate, dp_shard=shard), world_size)


def test_degrees_are_checked_with_the_file(small: str) -> None:
    load_config(small, ["--parallelism.dp_replicate=2"], world_size=4)
    assert mistakes(small, ["--parallelism.dp_replicate=3"], world_size=4) == [
        "--parallelism.dp_replicate: parallelism.dp_replicate × parallelism.dp_shard = 3 × -1 does not match "
        "4 processes; valid combinations (dp_replicate × dp_shard): 1 × 4, 2 × 2, 4 × 1"
    ]


# Commands


def test_docs_are_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), "run `torchxihe config --docs`"


def test_every_option_is_documented() -> None:
    assert "|  |" not in reference()


def test_config_prints_what_can_be_run_again(small: str) -> None:
    done = run("config", small, "--training.steps=3")
    assert (done.returncode, done.stderr) == (0, "")
    Path("again.toml").write_text(done.stdout)
    assert load_config("again.toml") == load_config(small, ["--training.steps=3"])


def test_a_mistake_is_lines_on_stderr_and_exit_code_1(small: str) -> None:
    done = run("config", small, "--training.stepz=3", "--optimizer.lr=x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "--training.stepz: unknown key; did you mean training.steps?",
        "--optimizer.lr: must be a number, got 'x'",
    ]


def test_unknown_commands_and_help() -> None:
    done = run("confg")
    assert (done.returncode, done.stderr) == (1, "confg: no such command; did you mean config?\n")
    done = run("--help")
    assert done.returncode == 0
    for path in (ROOT / "torchxihe" / "commands").glob("[a-z]*.py"):
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [path.stem])
        assert len(line.split()) > 2 and len(line) < 120, f"{path.stem} has no help, or a long one"
    assert "usage: torchxihe config [-h] [--docs] [CONFIG]" in run("config", "--help").stdout


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("verify", "verify: the following arguments are required: PATH; see torchxihe verify --help"),
        ("verify a b", "verify: unknown argument b; see torchxihe verify --help"),
        ("generate", "generate: the following arguments are required: MODEL; "),
        ("generate a --seed x", "generate: argument --seed: invalid int value: 'x'; "),
        ("plot a --b step", "plot: unknown argument --b; did you mean --by?"),
        ("data --row 2 a.toml", "data: unknown argument --row; did you mean --rows?"),
        ("eval a --max_tokens=2", "eval: unknown argument --max_tokens; did you mean --max-tokens?"),
        ("completion fish", "completion: argument shell: invalid choice: 'fish' (choose from "),
        ("export a --out b --dtype fp16", "export: argument --dtype: invalid choice: 'fp16' (choose from "),
        ("import a", "import: the following arguments are required: --out; "),
        ("launch", "launch: the following arguments are required: CONFIG; "),
        ("config", "no config file; expected CONFIG"),
        ("prepare --shard 0/2", "prepare: the following arguments are required: CONFIG; "),
        ("data --rows 2 a.toml b.toml", "data: more than one config file: a.toml b.toml; "),
        ("data --rows x a.toml", "data: argument --rows: invalid int value: 'x'; "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_like_those_in_a_config(args: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        run_here(args.split())
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_version() -> None:
    """The GPU's line is that of the machine; the kernels are those of an unchanged preset."""
    lines = run("--version").stdout.splitlines()
    gpus = torch.cuda.device_count()
    assert lines[0] == f"torchxihe {torchxihe.__version__}"
    assert re.fullmatch(r"Python 3\.\S+, torch \S+, (CUDA|ROCm) \S+", lines[1]) and torch.__version__ in lines[1]
    assert lines[2].startswith(f"GPU: {gpus} × " if gpus else "GPU: none")
    assert re.fullmatch(r"kernels of xihe_120m: attention .*, QK-norm/RoPE .*, SwiGLU .*, loss chunked", lines[3])


def test_reading_a_config_is_lean(small: str) -> None:
    code = "import sys, torchxihe.__main__ as m; m.run(['config', 'small.toml']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    assert not {"torch", "numpy", "datasets", "dotenv"} & set(done.stderr.split())


def test_dotenv_is_read_and_the_environment_wins(small: str) -> None:
    Path(".env").write_text("HF_TOKEN=file\nWANDB_API_KEY=file\n")
    code = "import os, torchxihe.__main__ as m; m.run(['config', 'small.toml'])\n"
    code += "print(os.environ['HF_TOKEN'], os.environ['WANDB_API_KEY'])"
    environment = {"PYTHONPATH": str(ROOT), "HF_TOKEN": "shell"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "shell file"
    assert "HF_TOKEN" not in done.stdout


def test_weights_that_cannot_be_added() -> None:
    with pytest.raises(UserError, match=r"data.sources.0.weight: must be at most 1e\+09, got 1e\+308"):
        load_config(DEBUG, ["--data.sources=[{path = 'a', weight = 1e308}, {path = 'b', weight = 1e308}]"])


def test_bytes_of_the_command_line_that_are_no_text() -> None:
    with pytest.raises(UserError, match="^--metrics.sample_prompt: not UTF-8$"):
        load_config(DEBUG, ["--metrics.sample_prompt=caf\udce9"])


def test_a_budget_needs_the_compiler() -> None:
    with pytest.raises(UserError, match="activation_checkpointing: .* needs training.compile"):
        load_config(DEBUG, ["--parallelism.activation_checkpointing=budget", "--training.compile=false"])


@pytest.mark.parametrize(
    ("flags", "world_size", "line"),
    [
        ("tp=2", 3, "parallelism.tp = 2 does not divide 3 processes; valid: 1, 3"),
        ("tp=3", 3, "3 does not divide model.num_key_value_heads = 2; valid: 1, 2"),
        (
            "tp=2 dp_replicate=3",
            4,
            r"(× tp = 2) does not match 4 processes; valid combinations (dp_replicate × dp_shard)",
        ),
        ("cp=2 tp=2", 6, "parallelism.cp = 2 does not divide 6 processes / tp = 3; valid: 1, 3"),
        (
            "cp=8 cp_method=ulysses",
            8,
            "8 does not divide data.seq_len = 256, or exceeds 2 key-value heads and is no multiple of these that "
            "divides 4 query heads; valid: 1, 2, 4",
        ),
        (
            "cp=4 tp=2 cp_method=ulysses",
            8,
            "exceeds 1 key-value heads a tensor-parallel rank and is no multiple of these that divides 2 query "
            "heads; valid: 1, 2",
        ),
        ("cp=3", 3, "3 does not divide data.seq_len = 256; valid: 1, 2, 4, 8, 16, 32, 64, 128"),
        (
            "cp=256 cp_method=gather",
            256,
            "256 does not divide data.seq_len = 256 into two chunks a rank; valid: 1, 2, 4, 8, 16, 32, 64, 128",
        ),
        ("pp=3", 4, "parallelism.pp = 3 does not divide 4 processes; valid: 1, 2, 4"),
        ("pp=3 tp=2 cp=2", 8, "parallelism.pp = 3 does not divide 8 processes / tp / cp = 2; valid: 1, 2"),
        ("pp=8", 8, "8 stages need as many layers, model.num_hidden_layers = 4"),
        ("pp=2 pp_stages_per_rank=2", 2, 'must be 1 with pp_schedule = "1F1B", got 2'),
        ("pp=2 pp_schedule=interleaved", 2, 'must be at least 2 with pp_schedule = "interleaved", got 1'),
        (
            "pp=4 pp_schedule=interleaved pp_stages_per_rank=2",
            4,
            "4 × pp_stages_per_rank = 8 stages need as many layers, model.num_hidden_layers = 4",
        ),
        ("cp=2 dp_shard=3", 4, "(× cp = 2) does not match 4 processes; valid combinations (dp_replicate × dp_shard)"),
    ],
)
def test_degrees_of_model_parallelism_that_do_not_fit(flags: str, world_size: int, line: str) -> None:
    overrides = [f"--parallelism.{flag}" for flag in flags.split()]
    with pytest.raises(UserError) as error:
        load_config("configs/xihe_debug.toml", overrides, world_size)
    assert any(found.startswith("--parallelism") and line in found for found in str(error.value).splitlines())


def test_rows_that_pytorch_would_mislay_are_refused() -> None:
    """Seen to end in a traceback: 4,097 rows are 2,049 and 2,048, and over four ranks 510 and 512 at the end."""
    flags = ["--parallelism.tp=2", "--parallelism.dp_shard=4", "--model.vocab_size=4097"]
    with pytest.raises(UserError, match=r"model.vocab_size: 4097 rows cannot .* then over .* = 4 .* multiple of 8"):
        load_config(DEBUG, flags, 8)
    for size in (4096, 4098, 4101):
        load_config(DEBUG, [*flags[:2], f"--model.vocab_size={size}"], 8)


@pytest.mark.parametrize(
    ("flags", "data_ranks", "rows"),
    [
        ([], 1, 8),  # no pipeline
        (["--parallelism.pp=2"], 1, 4),
        (["--parallelism.pp=2"], 4, 1),
        (["--parallelism.pp=2", "--training.micro_batch_size=3"], 1, 3),  # three micro-batches, the last padded
        (["--parallelism.pp=2", "--training.batch_ramp=[[4, 9]]"], 1, 2),
        (["--parallelism.pp=4"], 4, 0),
    ],
)
def test_a_pipeline_gets_enough_micro_batches(flags: list[str], data_ranks: int, rows: int) -> None:
    assert micro_batch_limit(load_config(DEBUG, flags), data_ranks) == rows


def test_the_interleaved_schedule_gets_full_rounds() -> None:
    """Of 24 rows in micro-batches of at most 5 rows: 6 of 4 rows (5 would be no multiple of two)."""
    flags = ["pp=2", "pp_schedule=interleaved", "pp_stages_per_rank=2"]
    overrides = [f"--parallelism.{flag}" for flag in flags] + ["--training.global_batch_size=24"]
    assert micro_batch_limit(load_config(DEBUG, [*overrides, "--training.micro_batch_size=5"]), 1) == 4


def test_a_batch_too_small_for_the_pipeline_is_refused() -> None:
    with pytest.raises(UserError, match=r"training.global_batch_size: a step of 8 sequences on 4 data-par"):
        load_config(DEBUG, ["--parallelism.pp=4"], 16)


def test_float8_with_a_scale_per_row_is_refused_with_tensor_parallelism() -> None:
    load_config("configs/llama_1b.toml", ["--parallelism.tp=2", "--float8.recipe=tensorwise"])
    with pytest.raises(UserError, match=r'float8.recipe: "rowwise" is not supported with parallelism.tp > 1; use'):
        load_config("configs/llama_1b.toml", ["--parallelism.tp=2", "--float8.recipe=rowwise"])
