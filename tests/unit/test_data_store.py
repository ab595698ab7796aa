"""The store's files: read as written, short or missing ones named, nothing half-written taken for whole."""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from tests.unit.data_corpus import make_config, write_texts
from torchxihe.data import store as module
from torchxihe.data.manifests import Counts
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.prepare.shard_writer import ShardWriter, committed_shard
from torchxihe.data.store import Rows, TokenFile, digest, open_prepared
from torchxihe.errors import UserError
from torchxihe.utils.files import write_json

REPORT: dict[str, Any] = {"rows": 0, "dropped": {}, "bad": {}, "examples": {}, "max_tokens": 0}


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Two rows over three files, the second of which has a header; tokens are 0, 1, 2, ... from end to end."""
    files = [TokenFile(tmp_path / "a", 0, 5), TokenFile(tmp_path / "b", 6, 4), TokenFile(tmp_path / "c", 0, 6)]
    for file, first in zip(files, (0, 5, 9), strict=True):
        tokens = np.arange(first, first + file.tokens, dtype="<u2").tobytes()
        file.path.write_bytes(bytes(file.start) + tokens)
    np.array([0, 2, 5], "<i8").tofile(tmp_path / "train.rows")
    np.array([[3, 2], [5, 3], [14, 1], [0, 2], [8, 1]], "<i8").tofile(tmp_path / "train.pieces")
    return Rows(tmp_path, "train", files, np.dtype("<u2"), 5)


@pytest.fixture
def masked(tmp_path: Path, rows: Rows) -> Rows:
    """The same rows with masks: tokens that are not divisible by three carry a loss."""
    files = [replace(file, mask=file.path.with_suffix(".msk")) for file in rows._files]
    for file, first in zip(files, (0, 5, 9), strict=True):
        file.mask.write_bytes(bytes(int(token % 3 != 0) for token in range(first, first + file.tokens)))
    return Rows(tmp_path, "train", files, np.dtype("<u2"), 5)


@pytest.mark.parametrize("limit", [1, 2, 128])
def test_pieces_are_read_from_whatever_file_they_lie_in(rows: Rows, limit: int) -> None:
    rows._most = limit
    out = np.full(6, 99, "<u2")
    assert rows.read(1, out) == (1, 2, 1) and out.tolist() == [14, 0, 1, 8, 99, 99]
    assert rows.read(0, out) == (2, 3) and out.tolist() == [3, 4, 5, 6, 7, 99]
    assert len(rows._open) <= limit
    descriptors = list(rows._open.values())
    rows.close()
    for descriptor in descriptors:
        with pytest.raises(OSError):
            os.fstat(descriptor)
    assert rows.read(0, out) == (2, 3)


@pytest.mark.parametrize("limit", [1, 2, 128])
def test_masks_go_with_their_tokens(rows: Rows, masked: Rows, limit: int) -> None:
    """Fragments from the middle of files, too. Seen to fail with the masks of the file before."""
    assert masked.masked and not rows.masked
    masked._most = limit
    out, mask = np.full(6, 99, "<u2"), np.full(6, 9, np.uint8)
    assert masked.read(1, out, mask) == (1, 2, 1) and out.tolist() == [14, 0, 1, 8, 99, 99]
    assert mask.tolist() == [1, 0, 1, 1, 9, 9]
    assert masked.read(0, out, mask) == (2, 3) and mask.tolist() == [0, 1, 1, 0, 1, 9]
    assert len(masked._open) <= limit


@pytest.mark.parametrize("name", ["a", "b", "c", "c.msk", "train.rows", "train.pieces"])
def test_a_file_that_is_too_short_or_gone_is_named(masked: Rows, tmp_path: Path, name: str) -> None:
    out, mask = np.empty(6, "<u2"), np.empty(6, np.uint8)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:3])
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: damaged: ends at byte 3; delete it and run `torchxihe"):
        masked.read(0, out, mask), masked.read(1, out, mask)
    masked.close()
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}: missing; run `torchxihe prepare CONFIG` again$"):
        masked.read(0, out, mask), masked.read(1, out, mask)


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "00000", "<u4") as writer:
        writer.add("train", [np.arange(5)], 9)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [] and committed_shard(tmp_path, "00000") is None
    with ShardWriter(tmp_path, "00000", "<u4") as writer:
        writer.add("train", [np.arange(5), np.arange(2)], 9)
        writer.add("valid", [np.arange(3)], 4)
        entry = writer.commit(REPORT | {"rows": 2})
    assert committed_shard(tmp_path, "00000") == entry
    assert np.fromfile(tmp_path / "train-00000.bin", "<u4").tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert np.fromfile(tmp_path / "valid-00000.idx", "<i8").tolist() == [0, 3]
    assert entry.train == Counts(documents=1, tokens=7, targets=7, bytes=9)
    assert not list(tmp_path.glob("*.tmp"))


def test_two_that_write_the_same_shard_share_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with one name for both: the second empties what the first has written, and the hole is committed."""
    with ShardWriter(tmp_path, "00000", "<u4") as writer:
        writer.add("train", [np.arange(500_000)], 9)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            ShardWriter(tmp_path, "00000", "<u4").__enter__()  # and is killed
        entry = writer.commit(REPORT)
    assert committed_shard(tmp_path, "00000") == entry
    assert np.fromfile(tmp_path / "train-00000.bin", "<u4").tolist() == list(range(500_000))


def test_a_shard_with_masks(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "00000", "<u4", kinds=("bin", "idx", "msk")) as writer:
        writer.add("train", [np.arange(5)], 9, np.array([False, True, True, False, True]))
        writer.add("train", [np.arange(2)], 3, np.array([False, False]))
        entry = writer.commit(REPORT)
    assert (tmp_path / "train-00000.msk").read_bytes() == bytes([0, 1, 1, 0, 1, 0, 0])
    assert entry.train == Counts(documents=2, tokens=7, targets=3, bytes=12)
    assert entry.xxh3_128["train-00000.msk"] == xxh3_128_hexdigest(bytes([0, 1, 1, 0, 1, 0, 0]))
    assert committed_shard(tmp_path, "00000") == entry
    (tmp_path / "train-00000.msk").write_bytes(bytes(6))
    assert committed_shard(tmp_path, "00000") is None


def test_a_digest_is_the_same_everywhere() -> None:
    assert digest({"b": 1, "a": [2.5, "é"]}) == digest({"a": [2.5, "é"], "b": 1}) == "47c43d9f1494769891248fbe6bd1b40e"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "folder", {})
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "folder"]


def test_opening_takes_milliseconds_and_looks_at_no_source(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", [f"some text {i}" for i in range(40)])
    config = make_config(tmp_path / "cache", source, validation={"fraction": 0.5})
    made = prepare(config)
    Path(source["path"]).unlink()
    started = time.perf_counter()
    opened = open_prepared(config)
    assert time.perf_counter() - started < 0.1
    assert opened.rows == made.rows and opened.sources == made.sources
    assert opened.tokenizer_dir == made.tokenizer_dir


def test_what_changes_the_recipe(tmp_path: Path) -> None:
    source = {"path": "x"}
    base = make_config(tmp_path, source)
    same = make_config(tmp_path, {**source, "weight": 3.0}, data={"document_mask": False, "max_epochs": 3})
    assert module.recipe_path(base) == module.recipe_path(same)
    others = [
        make_config(tmp_path, source, seq_len=8),
        make_config(tmp_path, {**source, "template": "{a}"}),
        make_config(tmp_path, source, data={"packing": "concat"}),
        make_config(tmp_path, source, tokenizer={"vocab_size": 999}),
        make_config(tmp_path, source, validation={"fraction": 0.1}),
    ]
    assert len({module.recipe_path(config) for config in [base, *others]}) == 6


def test_equal_relative_paths_of_two_projects_are_two_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cache, directly or by a link. Seen to fail with paths taken as written: the second project's documents
    were trained on in the first."""
    counts = {"a": 3, "b": 5}
    (tmp_path / "cache").mkdir()
    for name, count in counts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "link").symlink_to(tmp_path / "cache")
        monkeypatch.chdir(tmp_path / name)
        write_texts(Path("x.jsonl"), ["abc"] * count)
        for cache in ("../cache", "link"):
            prepare(make_config(Path(cache), {"path": "x.jsonl"}, tokenizer={"vocab_size": 257}))
    for name in counts:
        monkeypatch.chdir(tmp_path / name)
        for cache in ("../cache", "link"):
            opened = open_prepared(make_config(Path(cache), {"path": "x.jsonl"}, tokenizer={"vocab_size": 257}))
            assert opened.sources[0].documents == counts[name]
    paths: list[dict[str, Any]] = [
        {"tokenizer": {"path": "t"}}, {"tokenizer": {"chat_template": "t"}}, {"validation": {"sets": [{"path": "t"}]}}
    ]  # fmt: skip
    recipes = set[Path]()
    for name in counts:
        monkeypatch.chdir(tmp_path / name)
        recipes |= {module.recipe_path(make_config(tmp_path / "cache", {"path": "{stdlib}"}, **what)) for what in paths}
    assert len(recipes) == 6


def test_a_hub_id_is_the_same_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder that looks like one is not another project's. Seen to fail with all paths seen from the cache, and
    without the places in the recipe."""
    hub = make_config(tmp_path / "cache", {"path": "owner/name"}, tokenizer={"path": "openai-community/gpt2"})
    names = set[Path]()
    for project in ("a", "b"):
        (tmp_path / project / "owner/name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / project)
        write_texts(Path("owner/name/x.jsonl"), [f"{project} {i}" for i in range(9)])
        names.add(module.recipe_path(hub))
    assert len(names) == 1
    local = make_config(tmp_path / "cache", {"path": "owner/name"}, tokenizer={"vocab_size": 257})
    prepare(local)
    assert open_prepared(local).sources[0].documents == 9
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(UserError, match="nothing is prepared for this config"):
        open_prepared(local)
    monkeypatch.chdir(tmp_path)  # the text is gone
    assert open_prepared(local).sources[0].documents == 9


def test_a_project_moves_with_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with absolute paths."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = make_config(Path("cache"), write_texts(Path("x.jsonl"), ["abc"]))
    made = prepare(config)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert open_prepared(config).rows == made.rows


def test_a_store_that_is_gone_says_what_to_do(tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["some text"] * 9))
    [source] = prepare(config).sources
    (source.index / "index.json").unlink()
    with pytest.raises(UserError, match=r"index.json: missing; run `torchxihe prepare CONFIG` again"):
        open_prepared(config)


def spoil(file: Path, how: str) -> None:
    data = file.read_bytes()
    half = len(data) // 2
    file.write_bytes({"empty": b"", "half": data[:half], "null": b"null"}.get(how) or bytes(half) + data[half:])


@pytest.mark.parametrize("how", ["empty", "half", "null", "zeros"])
@pytest.mark.parametrize("name", ["hashes", "recipes/*", "manifest", "index", "torchxihe", "bytes_per_token"])
def test_a_damaged_small_file_is_a_line_and_prepare_makes_it_anew(tmp_path: Path, name: str, how: str) -> None:
    """Seen to fail, all of it, with a traceback and for good."""
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["some text"] * 9))
    made = prepare(config)
    [file] = tmp_path.glob(f"cache/**/{name}.*")
    before = file.read_bytes()
    spoil(file, how)
    if name != "hashes":
        with pytest.raises(
            UserError, match=r"^\S*/cache/\S+: (damaged: |nothing is prepared).* `torchxihe prepare CONFIG`"
        ):
            open_prepared(config)
    assert prepare(config).rows == made.rows and (name == "hashes" or file.read_bytes() == before)


@pytest.mark.parametrize("how", ["zeros"])
def test_a_damaged_index_of_documents_is_named(tmp_path: Path, how: str) -> None:
    """Seen to fail without the comparison: the documents that it lacks were lost without a word."""
    source = write_texts(tmp_path / "a.jsonl", ["some text"] * 9)
    made = prepare(make_config(tmp_path / "cache", source))
    file = made.sources[0].store / "train-00000.idx"
    spoil(file, how)
    with pytest.raises(
        UserError,
        match=rf"^{file}: damaged: its content differs from what was written; delete it and run `torchxihe prep",
    ):
        prepare(make_config(tmp_path / "cache", source, seq_len=8))
    file.unlink()
    assert prepare(make_config(tmp_path / "cache", source, seq_len=8)).sources[0].manifest == made.sources[0].manifest


@pytest.mark.parametrize("at", [0, 8, 16])
@pytest.mark.parametrize("name", ["rows", "pieces"])
def test_a_flipped_bit_in_a_row_index_is_named(rows: Rows, tmp_path: Path, name: str, at: int) -> None:
    """Seen to fail without the bounds: MemoryError, a file that is none, or another row's tokens."""
    data = bytearray((tmp_path / f"train.{name}").read_bytes())
    for byte in (1, 6, 7):
        flipped = data.copy()
        flipped[at + byte] ^= 0x80
        (tmp_path / f"train.{name}").write_bytes(flipped)
        rows.close()
        with pytest.raises(UserError, match=rf"train.{name}: damaged: row [01] has .*; delete it and run"):
            rows.read(0, np.empty(6, "<u2")), rows.read(1, np.empty(6, "<u2"))


def test_whose_folder_is_to_be_deleted(tmp_path: Path, rows: Rows) -> None:
    """Not that of somebody's token files, which were used where they lie. Seen to fail with one remedy for both."""
    index = tmp_path / "stores/key/rows/concat-5"
    index.mkdir(parents=True)
    (tmp_path / "train.rows").rename(index / "train.rows")
    (tmp_path / "train.pieces").rename(index / "train.pieces")
    of_user = "changed (ends at byte 0): not the file that was prepared; run"
    ours = "damaged: ends at byte 0; delete it and run"
    for file, what in ((tmp_path / "a", of_user), (index.parents[1] / "a", ours)):
        file.write_bytes(b"")
        reader = Rows(index, "train", [TokenFile(file, 0, 16)], np.dtype("<u2"))
        with pytest.raises(UserError, match=re.escape(f"{file}: {what} `torchxihe prepare CONFIG` again")):
            reader.read(0, np.empty(6, "<u2"))


def test_an_error_of_reading_names_the_file(tmp_path: Path, rows: Rows) -> None:
    """As of a folder in a file's place, which can be opened. Seen to fail: "a file: Is a directory"."""
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}/a"):
        rows.read(0, np.empty(6, "<u2"))
