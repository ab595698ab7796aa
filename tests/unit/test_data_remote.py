"""Prepared data in object storage (data.remote), through fsspec's file:// and memory://, and through a file system that
fails as told."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.unit.data_corpus import make_config, write_texts
from torchxihe.commands import data as data_command
from torchxihe.commands import prepare as prepare_command
from torchxihe.commands import verify as verify_command
from torchxihe.config.load import dump_config
from torchxihe.config.options import Config
from torchxihe.data import loader as loader_module
from torchxihe.data import remote as remote_module
from torchxihe.data.loader import Batch, BatchSpec, Loader, validation_batches
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare import encode
from torchxihe.data.prepare import sources as sources_module
from torchxihe.data.prepare import upload as upload_module
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.prepare.upload import upload
from torchxihe.data.remote import Bucket
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.data.verify import files_of, flaws_in
from torchxihe.errors import UserError
from torchxihe.utils import files as files_module

SEQ_LEN = 16
BLOCK = 256
"""Bytes: many blocks in a small corpus."""
SPEC = BatchSpec(SEQ_LEN, 3, torch.device("cpu"), data_rank=1, data_ranks=2)

Expected = tuple[list[Batch], list[Batch]]


class Unreliable(LocalFileSystem):
    """The local disk as an object store that fails as told, and that counts what is read of it."""

    protocol = "unreliable"
    fails: ClassVar[dict[str, list[Exception]]] = {}
    """By a part of the name: the errors of the next reads of such files; the last one stays."""
    reads: ClassVar[list[str]] = []
    seconds: ClassVar[float] = 0.0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        if start is not None:
            self.reads.append(f"{path}:{start}")
            threading.Event().wait(self.seconds)  # `time.sleep` is shortened
        for part, errors in self.fails.items():
            if part in path and errors:
                error = errors[0] if len(errors) == 1 and error_stays(errors[0]) else errors.pop(0)
                raise error
        return super().cat_file(path, start, end)


def error_stays(error: Exception) -> bool:
    return "always" in str(error)


fsspec.register_implementation("unreliable", Unreliable, clobber=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(sources_module, "SMALLEST_SHARD", 3000)  # several shards a source
    monkeypatch.setattr(loader_module, "AHEAD_ROWS", 50)
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    Unreliable.fails, Unreliable.reads, Unreliable.seconds = {}, [], 0.0


@pytest.fixture
def local(tmp_path: Path) -> Config:
    """Two sources of several shards, on this machine."""
    random = np.random.default_rng(0)
    sources = []
    for name, most in (("long", 60), ("short", 9)):
        texts = [" ".join(map(str, random.integers(0, 9, random.integers(1, most)))) for _ in range(400)]
        sources.append({**write_texts(tmp_path / f"{name}.jsonl", texts), "name": name})
    return make_config(
        tmp_path / "cache", *sources, seq_len=SEQ_LEN, validation={"fraction": 0.1}, training={"global_batch_size": 6}
    )


def with_remote(config: Config, url: str, gib: float = 1.0, cache: Path | None = None) -> Config:
    data: dict[str, Any] = {"remote": url, "remote_cache_gib": gib}
    data |= {"cache_dir": str(cache)} if cache else {}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.fixture
def expected(local: Config) -> Expected:
    """Batches of training and of a validation, from the local store."""
    prepared = prepare(local)
    return train_batches(prepared, local), list(validation_batches(prepared, SPEC, 0))


@pytest.fixture
def remote(local: Config, expected: Expected, tmp_path: Path) -> Config:
    """The same, uploaded, with a host that has an empty cache at the same place, and no documents."""
    config = with_remote(local, f"unreliable://{tmp_path}/bucket/prepared")
    upload(config)
    (tmp_path / "cache").rename(tmp_path / "there")
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    return config


def train_batches(prepared: Prepared, config: Config, count: int = 60) -> list[Batch]:
    loader = Loader(prepared, Order(plan_stages(config, prepared), prepared.rows), SPEC, step=3)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def check_equal(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert batch.samples == other.samples and batch.valid == other.valid and batch.pairs == other.pairs
        assert batch.cu_seqlens is not None and other.cu_seqlens is not None
        for name in ("tokens", "targets", "cu_seqlens", "sources"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name


def blocks_of(prepared: Prepared) -> dict[Path, int]:
    folder = prepared.cache / "blocks"
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["unreliable", "file", "memory"])
def test_batches_are_those_of_the_local_store(scheme: str, local: Config, expected: Expected, tmp_path: Path) -> None:
    """Bitwise, in training and validation, from an empty cache and from a full one, of any protocol."""
    url = f"{scheme}://{tmp_path}/bucket/prepared"
    config = with_remote(local, url)
    upload(config)
    (train, valid), prepared, opened = expected, open_prepared(local), open_prepared(config)
    assert opened.rows == prepared.rows and opened.names == prepared.names
    assert not blocks_of(opened)
    check_equal(train_batches(opened, config), train)
    check_equal(list(validation_batches(opened, SPEC, 0)), valid)
    assert len(blocks_of(opened)) > 50
    reads = len(Unreliable.reads)
    check_equal(train_batches(open_prepared(config), config), train)
    if scheme == "unreliable":
        assert 0 < reads <= len(Unreliable.reads) < reads * 1.5  # what is read ahead differs a little
        assert len(set(Unreliable.reads)) == len(Unreliable.reads), "a block was read twice"


def test_a_host_needs_only_the_bucket(remote: Config, expected: Expected, tmp_path: Path) -> None:
    """Neither the documents nor the cache of the host that prepared; `prepare` then only checks and prints."""
    assert prepare(remote).rows and not (tmp_path / "cache" / "stores").exists()
    train, valid = expected
    prepared = open_prepared(remote)
    check_equal(train_batches(prepared, remote), train)
    check_equal(list(validation_batches(prepared, SPEC, 0)), valid)


def test_the_cache_stays_within_its_limit(remote: Config, expected: Expected) -> None:
    """At every moment, and what is counted is what is there."""
    train, _ = expected
    limit = 20 * BLOCK
    small = with_remote(remote, remote.data.remote, limit / 2**30)
    prepared = open_prepared(small)
    stop, most = threading.Event(), [0]

    def watch() -> None:
        cache = remote_module.BlockCache(prepared.cache / "blocks", limit)
        while not stop.is_set():
            with cache._sized() as size:
                there = sum(blocks_of(prepared).values())
                assert size.bytes == there
                most[0] = max(most[0], there)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    check_equal(train_batches(prepared, small), train)
    stop.set()
    thread.join()
    assert limit // 2 < most[0] <= limit
    assert 0 < sum(blocks_of(prepared).values()) <= limit


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    """Seen to fail with eviction in the order of names, and with reads that leave no trace."""
    (tmp_path / "blocks").mkdir()
    cache = remote_module.BlockCache(tmp_path / "blocks", 1000)
    paths = [tmp_path / "blocks" / "file" / f"{i:06}" for i in range(12)]
    for i, path in enumerate(paths[:10]):
        cache.add(path, bytes([i]) * 100)
        os.utime(path, ns=(i, i))
    view = bytearray(5)
    assert cache.read(paths[0], 3, memoryview(view)) and view == bytes(5)  # used now
    cache.add(paths[10], b"x" * 100)
    left = [path for path in paths if path.exists()]
    assert left == [paths[0], *paths[3:11]]  # down to nine tenths
    assert not cache.read(paths[1], 0, memoryview(view))
    (tmp_path / "blocks.size").write_text("99999")  # of processes that were killed: counted anew
    cache.add(paths[11], b"y" * 100)
    assert paths[11].exists() and paths[10].exists()


WORKER = """
import sys, torch
from tests.unit.test_data_remote import BLOCK, SEQ_LEN
from torchxihe.config.load import load_config
from torchxihe.data.loader import BatchSpec, Loader
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.store import open_prepared
config = load_config(sys.argv[1])
prepared = open_prepared(config)
loader = Loader(prepared, Order(plan_stages(config, prepared), prepared.rows),
                BatchSpec(SEQ_LEN, 3, torch.device("cpu"), data_rank=int(sys.argv[2]), data_ranks=2), step=3)
for _ in range(60):
    batch = next(loader)
    print(batch.samples, batch.tokens.tolist(), batch.targets.tolist())
loader.close()
"""


def test_two_processes_share_a_cache_that_is_too_small(remote: Config, expected: Expected, tmp_path: Path) -> None:
    """Both get the right batches, while each deletes blocks that the other has just written."""
    train, _ = expected
    url = remote.data.remote.replace("unreliable", "file")
    small = with_remote(remote, url, 20 * BLOCK / 2**30)
    (tmp_path / "small.toml").write_text(dump_config(small))
    command = [sys.executable, "-c", WORKER, str(tmp_path / "small.toml")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([*command, rank], stdout=subprocess.PIPE, env=environment, text=True) for rank in "011"
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert outputs[1] == outputs[2] == [f"{b.samples} {b.tokens.tolist()} {b.targets.tolist()}" for b in train]
    assert len(outputs[0]) == 60 and outputs[0] != outputs[1]
    assert 0 < sum(blocks_of(open_prepared(small)).values()) <= 20 * BLOCK


def test_reads_that_fail_twice_are_tried_again(remote: Config, expected: Expected) -> None:
    """Errors of the network and of drivers, whose types are their own."""
    train, _ = expected
    Unreliable.fails = {
        ".bin": [TimeoutError("slow"), RuntimeError("botocore")],
        "manifest.json": [ConnectionResetError("reset"), ConnectionResetError("reset")],
    }
    check_equal(train_batches(open_prepared(remote), remote), train)
    assert Unreliable.fails == {".bin": [], "manifest.json": []}


@pytest.mark.parametrize("name", ["train-00000.bin", "train.pieces", "train-00001.bin.blocks.json", "manifest.json"])
def test_a_read_that_never_works_is_one_line_with_the_url(name: str, remote: Config) -> None:
    Unreliable.fails = {name: [RuntimeError("always\nthe same")]}
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"^{remote.data.remote}/.*{name}(.blocks.json)?: RuntimeError: always the same$"
    ):
        train_batches(open_prepared(remote), remote)
    assert time.monotonic() - started < 30


def test_a_loader_that_waits_for_the_network_can_be_closed(remote: Config) -> None:
    Unreliable.seconds = 20.0
    prepared = open_prepared(remote)
    loader = Loader(prepared, Order(plan_stages(remote, prepared), prepared.rows), SPEC)
    time.sleep(0.5)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("memory://nowhere/prepared", r"^data.remote: memory://nowhere/prepared: does not exist, or has nothing that"),
        ("nosuch://bucket/x", "^data.remote: nosuch://bucket/x: Protocol not known: nosuch"),
        ("oci://bucket/x", r"^data.remote: oci://bucket/x: .*[Ii]nstall"),
    ],
)
def test_a_wrong_url_is_one_line(url: str, line: str, remote: Config) -> None:
    """No such bucket, no such protocol, its package missing."""
    with pytest.raises(UserError, match=line) as caught:
        open_prepared(with_remote(remote, url))
    assert "\n" not in str(caught.value)


def stored(tmp_path: Path, pattern: str) -> Path:
    return sorted((tmp_path / "bucket" / "prepared").glob(pattern))[0]


def test_damage_in_the_bucket_is_found_when_it_is_read(remote: Config, tmp_path: Path) -> None:
    """One flipped bit. `verify` finds it, too."""
    file = stored(tmp_path, "stores/*/train-00000.bin")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    name = file.relative_to(tmp_path / "bucket" / "prepared")
    prepared = open_prepared(remote)
    where = f"{remote.data.remote}/{name}: damaged: "
    assert list(flaws_in(files_of(prepared))) == [
        f"{where}its content differs from what was written; delete it and run {remote_module.UPLOAD} again"
    ]
    with pytest.raises(UserError, match=rf"^{where}bytes 0 to {BLOCK}: other bytes than were written; delete it"):
        train_batches(prepared, remote, 400)
    file.write_bytes(content[:100])
    with pytest.raises(UserError, match=rf"^{where}100 bytes instead of [\d,]+; delete it"):
        raise UserError(next(flaws_in(files_of(prepared))))
    with pytest.raises(UserError, match=rf"^{where}bytes 0 to {BLOCK}: 100 bytes; delete it"):
        train_batches(open_prepared(remote), remote, 400)


def test_a_damaged_block_on_the_local_disk_is_read_again(remote: Config, expected: Expected) -> None:
    train, _ = expected
    check_equal(train_batches(open_prepared(remote), remote), train)
    paths = list(blocks_of(open_prepared(remote)))
    for i, path in enumerate(paths):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if i % 2 else bytes(len(content)))
    Unreliable.reads.clear()
    check_equal(train_batches(open_prepared(remote), remote), train)
    assert len(Unreliable.reads) > len(paths) // 2


def test_hashes_of_another_file_are_refused(remote: Config, tmp_path: Path) -> None:
    one, other = (stored(tmp_path, f"stores/*/train-0000{i}.bin.blocks.json") for i in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"train-00000.bin.blocks.json: of another file; delete both and run"):
        train_batches(open_prepared(remote), remote, 400)


def test_only_what_is_missing_or_different_is_uploaded(
    local: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_remote(local, f"file://{tmp_path}/bucket/prepared")
    upload(config)
    assert "34 data files, 0.000 GiB; 34 of them are new" in capsys.readouterr().out
    assert not list((tmp_path / "bucket").rglob("*.idx"))
    upload(config)
    assert capsys.readouterr().out.endswith("0 of them are new\n")
    stored(tmp_path, "stores/*/train-00000.bin").unlink()
    stored(tmp_path, "stores/*/rows/*/train.rows").write_bytes(b"")
    stored(tmp_path, "stores/*/train-00001.bin.blocks.json").write_bytes(b"{")
    upload(config)
    assert capsys.readouterr().out.endswith("3 of them are new\n")
    assert list(flaws_in(files_of(open_prepared(config)))) == []


def test_upload_needs_a_place_and_a_store(local: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--upload: data.remote names no place"):
        upload(local)
    (np.arange(1000) % 200).astype("<u2").tofile(tmp_path / "tokens.bin")
    tokenizer = {"path": str(prepare(local).tokenizer_dir)}
    in_place = make_config(
        tmp_path / "cache", {"path": str(tmp_path / "tokens.bin"), "format": "tokens"}, tokenizer=tokenizer
    )
    with pytest.raises(UserError, match=r"^--upload: tokens: token files that are used in place are not copied"):
        upload(with_remote(in_place, f"file://{tmp_path}/bucket"))


def test_the_commands(local: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`prepare --upload`, and then `prepare`, `data` and `verify` from an empty cache."""
    (tmp_path / "c.toml").write_text(dump_config(with_remote(local, f"file://{tmp_path}/bucket")))
    prepare_command.main([str(tmp_path / "c.toml"), "--upload"])
    (tmp_path / "cache").rename(tmp_path / "there")
    capsys.readouterr()
    for command, text in ((prepare_command, "400 documents"), (data_command, "400"), (verify_command, "34 data files")):
        command.main([str(tmp_path / "c.toml")])
        assert text in capsys.readouterr().out
    assert not (tmp_path / "cache" / "stores").exists()


def test_a_full_disk_is_one_line(remote: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    prepared = open_prepared(remote)
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(UserError, match=r"^data.remote_cache_gib: .*: No space left on device; lower it$"):
        train_batches(prepared, remote)


def test_a_bucket_says_where(tmp_path: Path) -> None:
    bucket = Bucket(f"file://{tmp_path}/")
    assert bucket.where("a/b") == f"file://{tmp_path}/a/b" and bucket.size("a/b") == -1
    bucket.write("a/b", b"12345")
    assert bucket.size("a/b") == 5 and bucket.read("a/b") == b"12345"
    with pytest.raises(UserError, match=rf"^file://{tmp_path}/c: does not exist; run"):
        bucket.read("c")
