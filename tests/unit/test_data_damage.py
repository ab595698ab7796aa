"""Damage anywhere in a cache: the unbroken data, or one line that names the file and the remedy; nothing else."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data_corpus import make_config, write_lines, write_texts
from torchxihe.config.options import Config
from torchxihe.data import loader as loader_module
from torchxihe.data import verify as module
from torchxihe.data.loader import BatchSpec, Loader, validation_batches
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.data.verify import Verification, files_of_cache, files_of_config, flaws_in
from torchxihe.errors import UserError

SEQ_LEN = 16
CPU = torch.device("cpu")


def make(folder: Path) -> Config:
    """A config of two sources, one of token files used in place, and a validation set; with two row indexes."""
    texts = [f"some text {i} " * (1 + i % 9) for i in range(80)]
    text = {**write_texts(folder / "a.jsonl", texts), "name": "text"}
    other = {**write_texts(folder / "b.jsonl", [f"{i} held out" for i in range(20)]), "name": "set"}
    of_text = make_config(folder / "cache", text)
    tokenizer = {"path": str(prepare(of_text).tokenizer_dir)}
    random = np.random.default_rng(0)
    tokens = np.append(random.integers(0, 200, 3000), 0).astype("<u2")
    (folder / "tokens.bin").write_bytes(tokens.tobytes())
    own = shutil.copytree(tokenizer["path"], folder / "tokenizer")
    place = {"path": str(folder / "tokens.bin"), "format": "tokens", "name": "place"}
    return make_config(
        folder / "cache", text, place, tokenizer={"path": str(own)}, seq_len=SEQ_LEN,
        validation={"fraction": 0.2, "every": 5, "sets": [other]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, bytes]:
    folder = tmp_path_factory.mktemp("intact")
    config = make(folder)
    prepare(config)
    return folder, config, data_of(config)


def data_of(config: Config) -> bytes:
    """What training and validation with `config` read: the first batches and everything held out."""
    prepared = open_prepared(config)
    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, BatchSpec(SEQ_LEN, 8, CPU))
    out = [prepared.bytes_per_token.tobytes(), f"{prepared.eos_id} {prepared.bos_id}".encode()]
    try:
        batches = [next(loader) for _ in range(8)]
    finally:
        loader.close()
    batches += list(validation_batches(prepared, BatchSpec(SEQ_LEN, 8, CPU), 0))
    for batch in batches:
        assert batch.cu_seqlens is not None
        out += [batch.tokens.numpy().tobytes(), batch.targets.numpy().tobytes(), batch.cu_seqlens.numpy().tobytes()]
    return b"".join(out)


def files_below(cache: Path) -> list[str]:
    return sorted(
        str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


MUTATIONS: dict[str, Callable[[bytes, Random], bytes]] = {
    "bit": lambda data, random: _flip(data, random.randrange(8 * len(data))) if data else b"\1",
    "byte": lambda data, random: _replace(data, random.randrange(len(data) or 1), random.randbytes(1)),
    "cut": lambda data, random: data[: random.randrange(len(data) or 1)],
    "longer": lambda data, random: data + random.randbytes(3),
}


def _flip(data: bytes, bit: int) -> bytes:
    return _replace(data, bit // 8, bytes([data[bit // 8] ^ 1 << bit % 8]))


def _replace(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + 1 :]


def outcome(action: Callable[[], Any], word: str = "torchxihe prepare") -> tuple[Any, str]:
    """The result, or the error's one line; any other exception fails the test."""
    try:
        return action(), ""
    except UserError as error:
        assert "\n" not in str(error) and word in str(error), error
        return None, str(error)


def restore(folder: Path, backup: Path) -> None:
    shutil.rmtree(folder / "cache")
    shutil.copytree(backup, folder / "cache")


@pytest.mark.parametrize("again", [False, True], ids=["train", "prepare"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_damage_is_never_other_data(
    intact: tuple[Path, Config, bytes], tmp_path: Path, mutation: str, again: bool
) -> None:
    """Each file of a cache in turn, with `prepare` before training or without.

    Seen to fail: other tokens, other rows, other masks and a source that began at row 0 again, all without a message;
    tracebacks for a flipped bit in JSON.
    """
    folder, config, expected = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    random = Random(f"{mutation} {again}")
    silent = 0
    for name in files_below(folder / "cache"):
        path = folder / "cache" / name
        path.write_bytes(MUTATIONS[mutation](path.read_bytes(), random))
        made, line = outcome(lambda: prepare(config)) if again else (True, "")
        data = None
        if made:
            data, line = outcome(lambda: data_of(config))
        assert data in (None, expected), name
        assert data or str(path) in line or "nothing is prepared" in line, (name, line)
        silent += data is not None
        restore(folder, tmp_path / "backup")
    assert silent  # what this config does not read, or what was made again


def test_what_is_deleted_is_made_again(intact: tuple[Path, Config, bytes], tmp_path: Path) -> None:
    """The remedy in every message: delete the file, prepare again, and the data is the same."""
    folder, config, expected = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    names = files_below(folder / "cache")
    assert {".bin", ".idx", ".rows", ".pieces", ".json", ".npy"} <= {Path(name).suffix for name in names}
    for name in names:
        (folder / "cache" / name).unlink()
        data, line = outcome(lambda: data_of(config))
        assert data == expected or f"{folder}/cache/" in line
        assert data or "missing; run `torchxihe prepare" in line or "prepare CONFIG` " in line
        prepare(config)
        assert data_of(config) == expected
        restore(folder, tmp_path / "backup")


def test_a_file_is_hashed_once_per_machine_and_content(
    intact: tuple[Path, Config, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = intact
    prepared = open_prepared(config)
    hashed: list[str] = []
    check = module.check_content
    monkeypatch.setattr(
        module, "check_content", lambda file, *more: (hashed.append(file.path.name), check(file, *more))
    )

    def verify() -> list[str]:
        hashed.clear()
        verification = Verification(prepared)
        verification.wait()
        verification.close()
        verification.check()
        return list(hashed)

    for mark in (folder / "cache").glob("verified-*.json"):
        mark.unlink()
    assert len(verify()) == len(module.files_of(prepared)) and verify() == []
    file = prepared.sources[0].store / "train-00000.bin"
    stat = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `rsync --times` leaves a file
    assert verify() == ["train-00000.bin"]
    [mark] = (folder / "cache").glob("verified-*.json")
    mark.write_bytes(mark.read_bytes().replace(b"size", b"sizf", 1))  # damaged marks count for nothing
    assert len(verify()) == len(module.files_of(prepared))


def test_damage_that_is_found_while_training_ends_it(
    intact: tuple[Path, Config, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store too large to be verified before the first batch."""
    folder, config, _ = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    prepared = open_prepared(config)
    file = prepared.sources[0].store / "train-00000.bin"
    file.write_bytes(_flip(file.read_bytes(), 5))
    check = module.check_content
    monkeypatch.setattr(loader_module, "VERIFIED_FIRST", 0.0)
    monkeypatch.setattr(module, "check_content", lambda *args: (time.sleep(0.2), check(*args)))
    loader = Loader(prepared, Order(plan_stages(config, prepared), prepared.rows), BatchSpec(SEQ_LEN, 2, CPU))
    next(loader)
    with pytest.raises(UserError, match=f"^{file}: damaged: its content differs .*; delete it and run `torchxihe prep"):
        for _ in range(10_000):
            next(loader)
            time.sleep(0.001)
    loader.close()
    restore(folder, tmp_path / "backup")


def test_verification_stops_when_the_loader_closes(
    intact: tuple[Path, Config, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = intact
    for mark in (folder / "cache").glob("verified-*.json"):
        mark.unlink()
    prepared = open_prepared(config)
    large = tmp_path / "large"
    large.write_bytes(bytes(64 << 20))
    file = module.ExpectedFile(large, 64 << 20, "0" * 32)
    monkeypatch.setattr(module, "files_of", lambda prepared: [file])
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    verification = Verification(prepared)
    started = time.perf_counter()
    verification.close()
    assert time.perf_counter() - started < 2
    verification.check()


def test_verify_on_request(intact: tuple[Path, Config, bytes], tmp_path: Path) -> None:
    folder, config, _ = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    files, flaws = files_of_cache(folder / "cache")
    assert not flaws and not list(flaws_in(files))
    assert set(files_of_config(config)) - set(files) == {
        file for file in files_of_config(config) if file.path == folder / "tokens.bin"
    }
    file = files[0].path
    file.write_bytes(_flip(file.read_bytes(), 0))
    [line] = flaws_in(files)
    assert line.startswith(f"{file}: damaged: its content differs from what was written; delete it and run")
    [manifest, *_] = sorted((folder / "cache").glob("stores/*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"documents": ', '"documents": 1', 1))
    _, flaws = files_of_cache(folder / "cache")
    assert len(flaws) == 1 and flaws[0].startswith(f"{manifest}: damaged: ")
    with pytest.raises(UserError, match="not a cache of prepared data"):
        files_of_cache(tmp_path)
    restore(folder, tmp_path / "backup")


def test_files_of_earlier_versions_have_no_checksums(intact: tuple[Path, Config, bytes], tmp_path: Path) -> None:
    """Their stores are used without being encoded again; what they lack is made by `prepare`."""
    folder, config, expected = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    for path in (folder / "cache").rglob("*.json"):
        value = json.loads(path.read_text())
        if isinstance(value, dict) and value.pop("checksum", None):
            if path.name in ("torchxihe.json", "index.json"):
                del value["xxh3_128"]
            path.write_text(json.dumps(value, indent=1))
    before = {path: path.stat().st_ino for path in (folder / "cache").glob("stores/*/*.bin")}
    prepare(config)
    assert data_of(config) == expected
    assert {path: path.stat().st_ino for path in before} == before
    restore(folder, tmp_path / "backup")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_regular_file_is_not_waited_for(
    intact: tuple[Path, Config, bytes], tmp_path: Path, kind: str
) -> None:
    """With and without `prepare`. Seen to fail for FIFOs that should be empty files: `prepare` waited for ever."""
    folder, config, expected = intact
    shutil.copytree(folder / "cache", tmp_path / "backup")
    for name in files_below(folder / "cache"):
        for again in (False, True):
            path = folder / "cache" / name
            path.unlink()
            os.mkfifo(path) if kind == "fifo" else path.mkdir()
            made, _ = outcome(lambda: prepare(config), word="") if again else (True, "")
            data, line = outcome(lambda: data_of(config)) if made else (None, "")
            assert data in (None, expected) and (data or not made or f"{folder}/cache" in line)
            restore(folder, tmp_path / "backup")


def test_a_bad_bit_in_the_hashes_of_inputs_starts_no_source_again(tmp_path: Path) -> None:
    """Seen to fail: the flipped digest gave the source another key, under which it began at row 0, silently."""
    config = make_config(tmp_path / "cache", write_lines(tmp_path / "a.jsonl", [{"text": "abc"}] * 30))
    key = prepare(config).sources[0].key
    hashes = tmp_path / "cache" / "hashes.json"
    text = hashes.read_text()
    at = text.index('"xxh3_128": "') + len('"xxh3_128": "')
    hashes.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    prepared: Prepared = prepare(config)
    assert prepared.sources[0].key == key and hashes.read_text() == text
