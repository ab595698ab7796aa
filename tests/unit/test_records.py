"""Files that are read back must be regular, bounded in size and match their schema."""

import os
from pathlib import Path

import pytest

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
