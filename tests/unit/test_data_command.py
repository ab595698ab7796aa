"""`torchxihe data` and `torchxihe prepare`, as they are called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_corpus import make_config, write_lines, write_texts
from torchxihe.commands import data as data_command
from torchxihe.commands import prepare as prepare_command
from torchxihe.config.load import dump_config
from torchxihe.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> str:
    sources = [
        {**write_texts(tmp_path / "words.jsonl", ["Hello!", "two", "", "x" * 30]), "name": "words", "weight": 3.0},
        {**write_texts(tmp_path / "digits.jsonl", ["123", "4"]), "name": "digits", "weight": 1.0},
    ]
    made = make_config(
        tmp_path / "cache", *sources, tokenizer={"vocab_size": 257}, data={"packing": "concat"},
        training={"steps": 4, "global_batch_size": 4},
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(dump_config(made))
    return str(tmp_path / "config.toml")


def test_summary_and_rows(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"run `torchxihe prepare CONFIG` first"):
        data_command.main([config])
    prepare_command.main([config])
    assert capsys.readouterr().out == (
        "words: 3 documents, 42 tokens, 0.93 bytes per token; 3 rows to train on, 0 held out, 1 dropped (empty)\n"
        "digits: 2 documents, 6 tokens, 0.67 bytes per token; 1 row to train on, 0 held out\n"
    )
    data_command.main([config, "--rows", "2"])
    summary, *rows = capsys.readouterr().out.split("\n\n")
    assert summary.splitlines() == [
        "source  documents  tokens  bytes/token  rows  held out   share  epochs  dropped",
        "words           3      42         0.93     3         0  75.00%    4.00  1 empty",
        "digits          2       6         0.67     1         0  25.00%    4.00  none",
    ]
    assert [row.splitlines()[0].split(",")[0] for row in rows] == ["=== sample 0: words", "=== sample 1: words"]


def test_epochs_under_a_batch_size_ramp(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_command.main([config])
    capsys.readouterr()
    data_command.main([config, "--training.batch_ramp=[[16, 2]]"])  # 2 steps of 16 rows, 2 of 4
    assert [line.split()[7] for line in capsys.readouterr().out.splitlines()[1:]] == ["10.00", "10.00"]


def test_a_row_shows_boundaries_and_what_is_masked(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_command.main([config])
    capsys.readouterr()
    data_command.main([config, "--rows", "8"])
    rows = capsys.readouterr().out.split("\n\n")[1:]
    heads = {row.splitlines()[0].split(": ", 1)[1]: row.splitlines()[1:] for row in rows}
    assert heads["words, row 0, epoch 0, 3 documents, 17 tokens"] == [
        "--- document 0: 7 tokens starting at 0",
        "⟦H⟧ello!⏹",
        "--- document 1: 4 tokens starting at 7",
        "⟦t⟧wo⏹",
        "--- document 2: 6 tokens starting at 11",
        "⟦x⟧xxxxx …",
    ]
    assert heads["digits, row 0, epoch 1, 2 documents, 6 tokens"][2:] == [
        "--- document 1: 2 tokens starting at 4",
        "⟦4⟧⏹",
        "--- ⟦11 tokens of padding⟧",
    ]


def test_a_conversation_shows_what_the_assistant_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [[("user", "a\nb"), ("assistant", "c")], [("user", "d"), ("assistant", "e"), ("user", "f")]]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]
    source = write_lines(tmp_path / "a.jsonl", rows)
    made = make_config(
        tmp_path / "cache", source, seq_len=64, tokenizer={"vocab_size": 257}, data={"format": "chat"},
        training={"steps": 4, "global_batch_size": 4},
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(dump_config(made))
    prepare_command.main([str(tmp_path / "config.toml")])
    capsys.readouterr()
    data_command.main([str(tmp_path / "config.toml"), "--rows", "1"])
    assert capsys.readouterr().out.split("\n\n")[1].splitlines() == [
        "=== sample 0: a, row 0, epoch 0, 2 documents, 47 tokens",
        "--- document 0: 26 tokens starting at 0",
        *("⟦user", "d⏹assistant", "⟧e⏹⟦user", "f⏹⟧"),
        "--- document 1: 21 tokens starting at 26",
        *("⟦user", "a", "b⏹assistant", "⟧c⏹"),
        "--- ⟦18 tokens of padding⟧",
    ]


def test_parts(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("2/2", "x", "1", "1/0", "²/4"):
        with pytest.raises(UserError, match=rf"--shard={part}: must be I/N with I from 0 to N - 1, such as 0/4"):
            prepare_command.main([config, "--shard", part])
    prepare_command.main([config, "--shard", "0/2"])
    prepare_command.main([config, "--shard=1/2", "--data.seq_len=16"])
    assert "part 0 of 2: 2 shards are done; after the last part, run" in capsys.readouterr().out
    prepare_command.main([config])


@pytest.mark.parametrize("flags", [["--first=-5"], ["--rows=-1"], [f"--first={10**30}"]])
def test_rows_that_there_are_not(config: str, flags: list[str]) -> None:
    with pytest.raises(UserError, match="data: --rows and --first are 0 or more"):
        data_command.main([config, "--rows=1", *flags])


def test_a_reader_that_has_seen_enough(config: str) -> None:
    """Such as `head -1`: no traceback."""
    prepare_command.main([config])
    command = f"{sys.executable} -m torchxihe data {config} --rows 3000 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("source") and not done.stderr
