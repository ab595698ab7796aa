"""`torchxihe verify`: what its table says, and its exit code."""

import io
import os
import sys
from pathlib import Path

import pytest

from tests.unit.saved_runs import write_training
from tests.unit.test_checkpoint import flip, replace_file, saved
from torchxihe.__main__ import run
from torchxihe.commands.verify import main
from torchxihe.components.checkpoint.manifest import CORRUPT, read_manifest, step_flaws
from torchxihe.components.checkpoint.storage import Location
from torchxihe.errors import UserError


def test_a_sound_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "checkpoints", 10, 20)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000020"):
        main([str(path)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split()[:2] == ["20", "valid"] and "model, optim" in lines[1]
    assert len(lines) == 2


def test_damage_is_printed_and_nothing_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 10, 20, 30, 40)
    flip(tmp_path / "step-00000010" / "__0_0.distcp")
    (tmp_path / "step-00000020" / CORRUPT).write_text("marked by hand\n")
    os.rename(tmp_path / "step-00000040", tmp_path / "step-00000040.tmp")
    before = sorted(tmp_path.rglob("*"))
    main([str(tmp_path)])  # the newest committed one is sound
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "unfinished" in states["40"] and "valid" in states["30"]
    assert "CORRUPT" in states["20"] and "marked by hand" in states["20"]
    assert "CORRUPT" in states["10"] and "__0_0.distcp differs from what was written" in states["10"]
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "step-00000030" / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="the newest checkpoint is CORRUPT"):
        main([str(tmp_path)])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    saved(tmp_path, 10)
    monkeypatch.setattr(sys, "stderr", stream())
    main([str(tmp_path)])
    text = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert ("step-00000010:   0%" in text and text.endswith("\r")) if stream is Terminal else text == ""


def test_progress_gets_every_byte(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    step, seen = Location(tmp_path / "step-00000010"), []
    assert step_flaws(step, progress=seen.append) == []
    assert sum(seen) == sum(size for size, _ in read_manifest(step).files.values())


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no such directory"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="verify: .* required: PATH"):
        main([])


def test_data_of_a_config_and_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each damaged file is named. Seen to fail as it was: "holds no checkpoint"."""
    path = write_training(tmp_path)
    run(["prepare", str(path)])
    for place in (str(path), str(tmp_path / "cache")):
        capsys.readouterr()
        main([place])
        assert "0 damaged" in capsys.readouterr().out
    main([str(path), "--optimizer.lr=0.1"])
    damaged = next((tmp_path / "cache").rglob("train-*.bin"))
    flip(damaged)
    for place in (str(path), str(tmp_path / "cache")):
        capsys.readouterr()
        with pytest.raises(UserError, match="1 damaged file"):
            main([place])
        assert f"{damaged}: " in capsys.readouterr().out
    with pytest.raises(UserError, match="overrides belong to a config"):
        main([str(tmp_path / "cache"), "--optimizer.lr=0.1"])


def test_what_no_run_has_written_is_corrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though its hash is right. Seen to fail without reading metadata and train_state."""
    saved(tmp_path, 10)
    replace_file(Location(tmp_path / "step-00000010"), "train_state.json", b"{}")
    with pytest.raises(UserError, match="the newest checkpoint is CORRUPT"):
        main([str(tmp_path)])
    assert "train_state.json is not what a run saves" in capsys.readouterr().out


def test_a_mark_that_cannot_be_read_is_a_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail as it was: waiting for a FIFO, a traceback for a directory."""
    saved(tmp_path, 10, 20, 30)
    os.mkfifo(tmp_path / "step-00000010" / CORRUPT)
    (tmp_path / "step-00000020" / CORRUPT).mkdir()
    main([str(tmp_path)])
    assert capsys.readouterr().out.count("CORRUPT") == 2
