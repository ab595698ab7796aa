"""Files that are read back must be regular, bounded in size and match their schema."""

import os
from pathlib import Path

import pytest

from torchxihe.errors import UserError
from torchxihe.utils.files import locked
from torchxihe.utils.log import rank_log
from torchxihe.utils.records import DamagedError, Record, parse_record, read_bounded, read_record


class Point(Record):
    x: int
    names: tuple[str, ...] = ()


def test_a_record_is_exactly_its_schema(tmp_path: Path) -> None:
    file = tmp_path / "point.json"
    file.write_text('{"x": 1, "names": ["a"]}')
    assert read_record(file, Point) == Point(x=1, names=("a",))
    assert parse_record(b"[1, 2]", tuple[int, ...]) == (1, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is not JSON"),
        (b'{"x": 1', "is not JSON"),
        (b'{"x": "1"}', "x: Input should be a valid integer"),
        (b'{"x": 1.0}', "x: Input should be a valid integer"),
        (b'{"x": true}', "x: Input should be a valid integer"),
        (b'{"x": 1, "y": 2}', "y: Extra inputs are not permitted"),
        (b"{}", "x: Field required"),
        (b"[]", "Input should be an object"),
        (b"\xff", "is not JSON"),
        (b"[" * 10**6, "is not JSON"),
    ],
)
def test_anything_else_is_damage(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "point.json").write_bytes(text)
    with pytest.raises(DamagedError, match=why):
        read_record(tmp_path / "point.json", Point)


def test_a_large_file_takes_no_memory_and_a_fifo_does_not_block(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(DamagedError, match="more than"):
        read_bounded(tmp_path / "large", limit=1000)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(DamagedError, match="not a regular file"):
            read_bounded(path)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none")


def test_a_lock_that_is_damaged(tmp_path: Path) -> None:
    """Its content is only a name for messages. Seen to fail as it was: UnicodeDecodeError; a FIFO was waited for."""
    lock = tmp_path / ".lock"
    lock.write_bytes(b"process 1\n on \xff" + b"x" * 10**6)
    with locked(lock, lambda holder: None) as earlier:
        assert earlier.startswith("process 1 on \ufffdx") and len(earlier) <= 200
        assert lock.read_text().startswith("process ")
        with pytest.raises(InterruptedError, match=f"^process {os.getpid()} on"), locked(lock, _refuse):
            pass
    assert lock.read_text() == ""
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(UserError, match=r"\.lock: not a regular file; delete it"), locked(lock, _refuse):
        pass


def _refuse(holder: str) -> None:
    raise InterruptedError(holder)


@pytest.mark.timeout(20)
def test_a_log_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    """Seen to fail as it was."""
    os.mkfifo(tmp_path / "rank-00000.log")
    with pytest.raises(OSError, match="No such device or address"), rank_log(tmp_path, lambda: ""):
        pass
