"""One process: what is chosen, what is refused, what is kept, and that nothing half-written is ever believed."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import pickle
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tests.unit.saved_runs import LLAMA, make_config, state_of
from torchxihe.components.checkpoint import tensor_files
from torchxihe.components.checkpoint.checkpointer import Checkpointer
from torchxihe.components.checkpoint.manifest import (
    CORRUPT,
    MANIFEST,
    check_fresh_start,
    checkpoints_of,
    is_committed,
    read_manifest,
    step_of,
    write_manifest,
)
from torchxihe.components.checkpoint.saved_run import open_saved
from torchxihe.components.checkpoint.state import flat_state, load_model_only, resolve
from torchxihe.components.checkpoint.storage import HashedFile, Location
from torchxihe.components.checkpoint.tensor_files import TensorReader
from torchxihe.components.optimizer.adamw import create_state
from torchxihe.config.load import dump_config
from torchxihe.config.options import Checkpoint
from torchxihe.errors import UserError
from torchxihe.utils import files

KEEP_ALL = Checkpoint(mode="sync", keep_last=0)
FILES = [".metadata", "__0_0.distcp", "train_state.json", MANIFEST]


def toy(seed: int = 0, width: int = 16) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model and optimizer that have made one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def saved(directory: Path, *steps: int, config: Checkpoint | None = None) -> dict[int, dict[str, Tensor]]:
    """Checkpoints of `steps`, each of its own weights, and those weights."""
    checkpointer = Checkpointer(directory, config or KEEP_ALL)
    states = {step: flat_state(*toy(step)) for step in steps}
    for step, state in states.items():
        checkpointer.save(step, state, state_of(step))
    checkpointer.close()
    return states


def loaded(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a new process resumes from."""
    checkpointer = Checkpointer(directory, KEEP_ALL)
    state = flat_state(*toy(99))
    newest = checkpointer.newest()
    assert newest is not None
    return checkpointer.load(newest, state), state


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_is_saved_comes_back_bitwise(tmp_path: Path) -> None:
    states = saved(tmp_path, 10, 20)
    train_state, state = loaded(tmp_path)
    assert train_state == state_of(20)
    assert equal(state, states[20])
    assert not equal(state, states[10])


def test_optimizer_state_exists_before_the_first_step_and_changes_nothing() -> None:
    """Seen to fail with `step` of 1: the third update then differs."""
    finals = []
    for prepared in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if prepared:
            create_state(optimizer, torch.float32)
            assert len(flat_state(model, optimizer)) == 2 + 2 * 3
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        finals.append(model.weight.detach().clone())
    assert torch.equal(finals[0], finals[1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "flipped", "removed"])
def test_a_damaged_checkpoint_is_marked_and_skipped(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail when `step_flaws` compares nothing."""
    states = saved(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020" / name)
    train_state, state = loaded(tmp_path)
    assert train_state == state_of(10)
    assert equal(state, states[10])
    reason = (tmp_path / "step-00000020" / CORRUPT).read_text()
    assert name in reason
    assert "step-00000020" in caplog.text and name in caplog.text
    # The mark stays, and the next start does not read the files again to know.
    damage(tmp_path / "step-00000010" / name)
    with pytest.raises(UserError, match="no checkpoint to resume from.*step-00000020 is marked.*step-00000010"):
        Checkpointer(tmp_path, KEEP_ALL).newest()


def test_no_checkpoint_is_a_fresh_start_and_drafts_are_swept(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "new", KEEP_ALL).newest() is None
    saved(tmp_path, 10)
    os.rename(tmp_path / "step-00000010", tmp_path / "step-00000010.tmp")
    assert Checkpointer(tmp_path, KEEP_ALL).newest() is None
    assert list(tmp_path.iterdir()) == []


def test_half_deleted_steps_are_ignored_and_swept_only_below_a_valid_one(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    (tmp_path / "step-00000020" / MANIFEST).unlink()
    (tmp_path / "notes").mkdir()
    newest = Checkpointer(tmp_path, KEEP_ALL).newest()
    assert newest is not None and newest.name == "step-00000030"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000010", "step-00000030"]


def test_a_lost_manifest_is_no_half_deletion(tmp_path: Path) -> None:
    """Without it a run whose only manifest is lost would start afresh, silently. Seen to fail so."""
    saved(tmp_path, 10)
    (tmp_path / "step-00000010" / MANIFEST).unlink()
    with pytest.raises(UserError, match="MANIFEST.json is missing"):
        Checkpointer(tmp_path, KEEP_ALL).newest()
    assert (tmp_path / "step-00000010" / "__0_0.distcp").exists()


def test_a_committed_step_is_never_written_again(tmp_path: Path) -> None:
    states = saved(tmp_path, 10)
    Checkpointer(tmp_path, KEEP_ALL).save(10, flat_state(*toy(5)), state_of(10))
    assert equal(loaded(tmp_path)[1], states[10])


def test_a_corrupt_step_is_replaced_when_the_run_gets_there_again(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    flip(tmp_path / "step-00000020" / "__0_0.distcp")
    checkpointer = Checkpointer(tmp_path, KEEP_ALL)
    checkpointer.newest()
    state = flat_state(*toy(7))
    checkpointer.save(20, state, state_of(20))
    assert equal(loaded(tmp_path)[1], state)


def test_retention_keeps_the_last_and_the_round_ones(tmp_path: Path) -> None:
    saved(tmp_path, *range(10, 80, 10), config=Checkpoint(mode="sync", keep_last=2, keep_every=30))
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [30, 60, 70]


def test_a_linked_step_is_kept_where_it_is(tmp_path: Path) -> None:
    """A step moved to another disk, or one of another run: the link is deleted, not its target.

    Seen to fail without the look for a link: the manifest there is deleted, then `rmtree` refuses.
    """
    directory, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saved(directory, 1)
    (directory / "step-00000001").rename(elsewhere)
    (directory / "step-00000001").symlink_to(elsewhere)
    assert Checkpointer(directory, KEEP_ALL).newest() == Location(directory / "step-00000001")
    saved(directory, 2, 3, config=Checkpoint(mode="sync", keep_last=2))
    assert sorted(os.listdir(directory)) == ["step-00000002", "step-00000003"]
    assert sorted(os.listdir(elsewhere)) == sorted(FILES)


def test_retention_counts_committed_steps_only(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / CORRUPT).write_text("made so\n")
    saved(tmp_path, 30, config=Checkpoint(mode="sync", keep_last=2))
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [10, 20, 30]


def break_writes(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Every write into files of that name fails with that errno, as write(2) does: without a file name."""
    create = Location.create

    def write(self: HashedFile, data: Any) -> int:
        raise OSError(number, os.strerror(number))

    def create_broken(self: Location) -> Any:
        if self.name.startswith(name):
            patch.setattr(HashedFile, "write", write)
        return create(self)

    patch.setattr(Location, "create", create_broken)


@pytest.mark.parametrize("name", FILES)
def test_a_failed_write_names_the_file_commits_nothing_and_deletes_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = saved(tmp_path, 10)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{name}.*No space left"):
        break_writes(patch, name, errno.ENOSPC)
        Checkpointer(tmp_path, Checkpoint(mode="sync", keep_last=1)).save(20, flat_state(*toy()), state_of(20))
    assert not (tmp_path / "step-00000020").exists()
    assert equal(loaded(tmp_path)[1], states[10])


def failing_reads(monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.EIO) -> list[str]:
    """The first `times` openings of tensors' files fail; returns the growing list of them."""
    original, failed = Location.open, []

    def open_(self: Location) -> Any:
        if self.name.endswith(".distcp") and len(failed) < times:
            failed.append(str(self))
            raise OSError(number, os.strerror(number), str(self))
        return original(self)

    monkeypatch.setattr(Location, "open", open_)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return failed


def test_a_read_error_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = saved(tmp_path, 10, 20)
    failed = failing_reads(monkeypatch, times=2)
    assert equal(loaded(tmp_path)[1], states[20])
    assert len(failed) == 2


def test_a_lasting_read_error_stops_and_demotes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10, 20)
    failing_reads(monkeypatch, times=1000)
    with pytest.raises(UserError, match=r"step-00000020/__0_0.distcp: Input/output error"):
        Checkpointer(tmp_path, KEEP_ALL).newest()
    assert is_committed(Location(tmp_path / "step-00000020"))


def test_a_read_error_between_verifying_and_loading_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = saved(tmp_path, 10)
    checkpointer, state = Checkpointer(tmp_path, KEEP_ALL), flat_state(*toy(99))
    newest = checkpointer.newest()
    assert newest is not None
    failing_reads(monkeypatch, times=2)
    checkpointer.load(newest, state)
    assert equal(state, states[10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("optim.0.bias.exp_avg"), r"1 not in this run \(optim.0.bias.exp_avg\)"),
        (lambda state: state.update({"model.2.weight": torch.zeros(1)}), r"1 missing.*\(model.2.weight\)"),
        (lambda state: state.update({"model.0.bias": torch.zeros(17)}), r"float32\[16\], here float32\[17\]"),
        (lambda state: state.update({"model.0.bias": torch.zeros(16).half()}), r"float32\[16\], here float16\[16\]"),
    ],
    ids=["extra", "missing", "shape", "dtype"],
)
def test_a_checkpoint_must_fit_exactly(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    """DCP alone loads the extra key and the other dtype without a word. Seen to fail without `_compare`."""
    saved(tmp_path, 10)
    state = flat_state(*toy())
    change(state)
    with pytest.raises(UserError, match=message):
        Checkpointer(tmp_path, KEEP_ALL).load(tmp_path / "step-00000010", state)


def test_only_the_model(tmp_path: Path) -> None:
    states = saved(tmp_path, 10)
    model, _ = toy(99)
    optimizer = torch.optim.AdamW(model.parameters())
    create_state(optimizer, torch.float32)
    state = flat_state(model, optimizer)
    Checkpointer(tmp_path / "other", KEEP_ALL).load(tmp_path / "step-00000010", state, only=("model",))
    assert torch.equal(state["model.0.weight"], states[10]["model.0.weight"])
    assert not state["optim.0.weight.exp_avg"].any()


def test_load_model_only(tmp_path: Path) -> None:
    states = saved(tmp_path / "checkpoints", 10)
    model, _ = toy(99)
    assert load_model_only(tmp_path, model) == state_of(10)
    assert torch.equal(model[0].weight, states[10]["model.0.weight"])  # type: ignore[index]
    with pytest.raises(UserError, match="of another shape"):
        load_model_only(tmp_path, toy(width=17)[0])
    flip(tmp_path / "checkpoints" / "step-00000010" / "__0_0.distcp")
    with pytest.raises(UserError, match="__0_0.distcp differs from what was written"):
        load_model_only(tmp_path, model)


def test_load_verifies_what_newest_has_not(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    flip(tmp_path / "step-00000010" / "__0_0.distcp")
    with pytest.raises(UserError, match="__0_0.distcp differs from what was written"):
        Checkpointer(tmp_path / "other", KEEP_ALL).load(tmp_path / "step-00000010", flat_state(*toy()))
    assert not (tmp_path / "step-00000010" / CORRUPT).exists()  # not our run: nothing is written there


def replace_file(directory: Location, name: str, content: bytes) -> None:
    """Another content under a manifest that fits it, as an attacker or a bug would leave it."""
    with (directory / name).create() as file:
        file.write(content)
    manifest = read_manifest(directory)
    write_manifest(directory, dataclasses.replace(manifest, files=manifest.files | {name: file.digest()}))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch exploded",)


def test_no_code_runs_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is in order: whoever planted the pickle wrote that too. Seen to fail with `pickle.Unpickler`."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    replace_file(directory, ".metadata", pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="it asks for posix.system"):
        loaded(tmp_path)
    assert not (tmp_path / "exploded").exists()


class Reach:
    """Something else than an enumeration's member, by `getattr`."""

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (torch.Size, "__init__")


def test_metadata_of_any_python_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.2 (Debian 12) pickles an enumeration's members as attributes. Seen to fail without `_member`."""
    with monkeypatch.context() as patch:
        patch.setattr(Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
        states = saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    assert b"getattr" in (directory / ".metadata").read()
    assert equal(loaded(tmp_path)[1], states[10])
    replace_file(directory, ".metadata", pickle.dumps(Reach()))
    with pytest.raises(UserError, match="it asks for an attribute __init__"):
        loaded(tmp_path)


def test_metadata_may_not_point_outside_the_manifest(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    replace_file(directory, ".metadata", (directory / ".metadata").read().replace(b"__0_0.distcp", b"../evil.dist"))
    with pytest.raises(UserError, match="points at ../evil.dist"):
        loaded(tmp_path)


def test_every_class_of_the_metadata_is_known() -> None:
    assert {module for module, _ in tensor_files.METADATA_CLASSES} == {
        "torch.serialization",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.metadata",
    }


def edited_metadata(directory: Location, edit: Callable[[Any], Any]) -> bytes:
    """`.metadata` after `edit` of the object in it, which may return another one."""
    metadata = pickle.loads((directory / ".metadata").read())
    return pickle.dumps(edit(metadata) or metadata)


def tensor_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.0.weight"]  # [16, 8]


def set_chunks(metadata: Any, *chunks: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """The tensor's chunks, all of them in the place of the only one."""
    tensor_of(metadata).chunks[:] = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    place = metadata.storage_data.pop(MetadataIndex("model.0.weight", (0, 0)))
    metadata.storage_data |= {MetadataIndex("model.0.weight", offsets): place for offsets, _ in chunks}


COVER = "do not cover every element exactly once"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: set_chunks(m), COVER),
        (lambda m: set_chunks(m, ((0, 0), (8, 8))), COVER),
        (lambda m: set_chunks(m, ((0, 0), (8, 8)), ((4, 0), (12, 8))), COVER),
        (lambda m: set_chunks(m, ((0, 0), (8, 8)), ((9, 0), (7, 8))), COVER),
        (lambda m: set_chunks(m, ((0, 0), (8, 8)), ((8, 0), (9, 8))), COVER),
        (lambda m: set_chunks(m, ((0, 0), (8, 4)), ((8, 4), (8, 4))), COVER),
        (lambda m: set_chunks(m, ((0, 0), (16, 4)), ((0, 4), (8, 4)), ((8, 4), (8, 4))), COVER),
        (
            lambda m: m.storage_data.pop(MetadataIndex("model.0.weight", (0, 0))) and None,
            r"at \[0, 0\] is not in a file",
        ),
        (lambda m: set_chunks(m, ((0, 0), (16, 2**40))), r"the chunk at \[0, 0\] is not in a file"),
        (lambda m: setattr(tensor_of(m), "size", torch.Size([2**40, 8])), COVER),
        (lambda m: setattr(tensor_of(m), "chunks", tensor_of(m).chunks * 1000), "not every chunk is in a file"),
        (lambda m: setattr(tensor_of(m), "size", [16, 8]), "is not tensor metadata"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "length", 2**50), "is not in a file"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "offset", -1), "is not in a file"),
        (lambda m: setattr(m, "storage_data", [1]), "is not tensor metadata"),
        (lambda m: m.state_dict_metadata, "is not tensor metadata"),
    ],
)
def test_every_element_of_every_tensor_is_covered_exactly_once(
    tmp_path: Path, edit: Callable[[Any], Any], message: str
) -> None:
    """Seen to fail as it was: most of these load, onto memory that nothing has filled; the others are tracebacks."""
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    replace_file(directory, ".metadata", edited_metadata(directory, edit))
    with pytest.raises(UserError, match=f"step-00000010: corrupt: .metadata.*{message}"):
        loaded(tmp_path)


def test_chunks_may_be_a_grid(tmp_path: Path) -> None:
    """Of two sharded dimensions, with an empty chunk where a rank has nothing."""
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    grid = [((i, j), (8, 2)) for i in (0, 8) for j in (0, 2, 4, 6)] + [((16, 0), (0, 8))]
    replace_file(directory, ".metadata", edited_metadata(directory, lambda m: set_chunks(m, *grid)))
    assert TensorReader(directory).metadata


def zip_bomb() -> bytes:
    """A tensor's archive whose data unpack to a thousand times their size."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**20), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return packed.getvalue()


def saved_alone(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (zip_bomb(), "a compressed archive"),
        (saved_alone(torch.zeros(16, 8, dtype=torch.int32)), "is not the tensor that .metadata describes"),
        (saved_alone(torch.zeros(128)), "is not the tensor that .metadata describes"),
        (pickle.dumps([1]) + bytes(9999), "cannot be read"),
        (bytes(9999), "cannot be read"),
    ],
    ids=["bomb", "dtype", "shape", "pickle", "zeros"],
)
def test_a_file_of_tensors_holds_what_metadata_says(tmp_path: Path, archive: bytes, message: str) -> None:
    """Seen to fail as it was: the bomb unpacks, another dtype is cast without a word, the others are tracebacks."""
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")

    content = (directory / "__0_0.distcp").read()

    def point_at_it(metadata: Any) -> None:
        place = metadata.storage_data[MetadataIndex("model.0.weight", (0, 0))]
        place.offset, place.length = len(content), len(archive)

    replace_file(directory, "__0_0.distcp", content + archive)
    replace_file(directory, ".metadata", edited_metadata(directory, point_at_it))
    with pytest.raises(UserError, match=f"corrupt: __0_0.distcp: .*{message}"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04r\xff\xff\xff\x7f.", "opcode b'r'"),  # LONG_BINPUT: a memo of 2^32 entries
        (b"\x80\x05\x96" + (2**45).to_bytes(8, "little") + b".", "opcode"),  # BYTEARRAY8
        (b"\x80\x04\x8d" + (2**45).to_bytes(8, "little") + b"a.", "no end"),  # BINUNICODE8
        (b"\x80\x04N", "no end"),
        (b"", "no end"),
        (pickle.dumps([torch.Size(range(1000))]), "a tensor of 1,000 dimensions"),
    ],
)
def test_loading_metadata_takes_memory_in_proportion_to_its_length(
    tmp_path: Path, content: bytes, message: str
) -> None:
    """Seen to fail with `pickle.Unpickler` alone: the first takes 32 GiB."""
    saved(tmp_path, 10)
    replace_file(Location(tmp_path / "step-00000010"), ".metadata", content)
    with pytest.raises(UserError, match=f"corrupt: .metadata is not tensor metadata .*{message}"):
        loaded(tmp_path)


def test_one_dict_is_not_copied_into_every_object() -> None:
    """Seen to fail with the classes themselves: each gets all of the dict's entries."""
    state = {f"key {i}": 0 for i in range(1000)}
    chunks = [ChunkStorageMetadata(torch.Size(), torch.Size()) for _ in range(100)]
    for chunk in chunks:
        chunk.__dict__ = state
    with pytest.raises(pickle.UnpicklingError, match="fields that ChunkStorageMetadata does not have"):
        tensor_files._Unpickler(io.BytesIO(pickle.dumps(chunks))).load()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "a\0b", "", "a\nb"])
def test_a_manifest_lists_plain_file_names(tmp_path: Path, name: str) -> None:
    """Seen to fail as it was: the file outside is hashed and accepted, a NUL is a traceback."""
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    (tmp_path / "x").write_bytes(b"")
    manifest = read_manifest(directory)
    files = manifest.files | {name: (0, "99aa06d3014798d86001c324468d497f")}
    write_manifest(directory, dataclasses.replace(manifest, files=files))
    with pytest.raises(UserError, match="MANIFEST.json is damaged: files") as caught:
        Checkpointer(tmp_path, KEEP_ALL).newest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"format": 1}', b'{"format": "1"}', b"[" * 10**6, b"\xff", b'{"format": 1e400}', b"NaN"]
)
def test_a_manifest_is_of_its_schema(tmp_path: Path, content: bytes) -> None:
    """Seen to fail as it was, with tracebacks: RecursionError, KeyError, OverflowError."""
    saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020" / MANIFEST).write_bytes(content)
    assert loaded(tmp_path)[0]["step"] == 10


STAGE = {"g": 0, "step": 0, "global_batch": 2, "seed": 0, "sources": ["a"], "quotas": [2048], "first": [0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "10"}, "step: Input should be a valid integer"),
        ({"step": 11}, "is of step 11, but the directory is named step-00000010"),
        ({"step": 2**70}, "step: Input should be less than"),
        ({"stages": [STAGE | {"quotas": [2048, 1]}]}, "do not fit each other"),
        ({"stages": [STAGE | {"global_batch": 0}]}, "global_batch: Input should be greater than 0"),
        ({"stages": [STAGE, STAGE]}, "the stages are not in order"),
        ({"stages": [STAGE | {"more": 1}]}, "more: Extra inputs"),
        ({"config": {}}, "config.run: Field required"),
        ({"config": state_of(10)["config"] | {"optimizer": 3}}, "optimizer is not a table"),
        ({"tokenizer": None}, "tokenizer: Input should be a valid string"),
        ({"changes": [{}]}, "changes.0"),
    ],
)
def test_train_state_is_of_its_schema(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The hash fits: it was written so. Seen to fail as it was: a KeyError or TypeError later, or nothing."""
    saved(tmp_path, 10)
    directory = Location(tmp_path / "step-00000010")
    replace_file(directory, "train_state.json", json.dumps(state_of(10) | change).encode())
    for path in (tmp_path, directory):
        with pytest.raises(UserError, match=f"step-00000010: corrupt: train_state.json.*{message}") as caught:
            loaded(tmp_path) if path == tmp_path else open_saved(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "socket"])
@pytest.mark.timeout(20)
def test_what_is_not_a_file_is_neither_opened_nor_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    """Seen to fail as it was: a FIFO is waited for without end, as is /dev/zero."""
    saved(tmp_path, 10, 20)
    path = tmp_path / "step-00000020" / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    if kind == "socket":
        with pytest.raises(UserError, match=f"{name}: No such device or address"):
            Checkpointer(tmp_path, KEEP_ALL).newest()
    else:
        assert loaded(tmp_path)[0]["step"] == 10


def test_a_file_of_a_steps_name_is_no_step(tmp_path: Path) -> None:
    """Seen to fail as it was: NotADirectoryError."""
    saved(tmp_path, 10)
    (tmp_path / "step-00000020").write_text("")
    assert loaded(tmp_path)[0]["step"] == 10
    saved(tmp_path, 20)
    assert loaded(tmp_path)[0]["step"] == 20


def test_resolve(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    saved(checkpoints, 10, 20, 30)
    (checkpoints / "step-00000030" / CORRUPT).write_text("made so\n")
    for path in (tmp_path / "run", checkpoints, checkpoints / "step-00000020"):
        assert resolve(str(path)) == checkpoints / "step-00000020"
    with pytest.raises(UserError, match="step-00000030: is marked CORRUPT"):
        resolve(checkpoints / "step-00000030")
    with pytest.raises(UserError, match="nowhere: no such directory"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no committed checkpoint"):
        resolve(tmp_path)


def test_resolve_names_what_is_there(tmp_path: Path) -> None:
    """The steps beside one that is not, the runs below a directory that is none. Seen to fail as it was."""
    saved(tmp_path / "runs" / "a" / "checkpoints", 10, 20)
    saved(tmp_path / "runs" / "b c" / "checkpoints", 30)
    (tmp_path / "runs" / "empty").mkdir()
    steps = tmp_path / "runs" / "a" / "checkpoints"
    with pytest.raises(UserError, match=f"step-00000015: no such directory; the steps in {steps} are 10, 20$"):
        resolve(steps / "step-00000015")
    (steps / "step-00000020" / CORRUPT).write_text("")
    with pytest.raises(UserError, match=f"is marked CORRUPT.*the steps in {steps} are 10$"):
        resolve(steps / "step-00000020")
    runs = tmp_path / "runs"
    there = f"the runs in {runs} with checkpoints are {runs}/a, {runs}/b c$"
    with pytest.raises(UserError, match=f"{runs}: holds no committed checkpoint; {there}"):
        resolve(runs)
    with pytest.raises(UserError, match=f"{runs}/A: no such directory; {there}"):
        resolve(runs / "A")


def test_a_damaged_config_hides_no_checkpoints(tmp_path: Path) -> None:
    """config.toml says where they are. Seen to fail as it was: the run would start from step 0."""
    config = make_config(tmp_path, LLAMA)
    config.run_dir.mkdir()
    (config.run_dir / "config.toml").write_text(dump_config(config)[:-40] + '"')
    with pytest.raises(UserError, match=r"small/config.toml: cannot be read \(.*\); restore it, or delete it"):
        check_fresh_start(Location(config.run_dir / "checkpoints"), config.run_dir)


def test_resolve_what_is_named_from_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    saved(checkpoints, 10, 20)
    (tmp_path / "latest").symlink_to(checkpoints / "step-00000010")
    assert step_of(resolve(tmp_path / "latest").name) == 10
    for place, path, step in ((checkpoints, "step-00000010", 10), (checkpoints, ".", 20), (tmp_path, "run/.", 20)):
        monkeypatch.chdir(place)
        assert step_of(resolve(path).name) == step
        assert os.path.samefile(resolve(path).parent.parent, tmp_path / "run")
    monkeypatch.chdir(checkpoints / "step-00000010")
    assert step_of(resolve(".").name) == 10 and resolve(".").parent == checkpoints


def test_where_a_run_keeps_its_checkpoints(tmp_path: Path) -> None:
    """Its own before the original's that it is a copy of; elsewhere if `checkpoint.dir` says so; never forgotten.

    Seen to fail as it was: with the directory of the config's `run`, copied or not, and a start from step 0.
    """
    config = make_config(tmp_path, LLAMA)
    for run_dir, step in ((config.run_dir, 20), (tmp_path / "copy", 10)):
        saved(run_dir / "checkpoints", step)
        (run_dir / "config.toml").write_text(dump_config(config))
        assert step_of(resolve(run_dir).name) == step
    elsewhere = config.model_copy(update={"checkpoint": Checkpoint(dir=str(tmp_path / "disk"))})
    moved, run_dir = checkpoints_of(elsewhere), elsewhere.run_dir
    with pytest.raises(UserError, match=f"no checkpoint in {moved}, but there are in {run_dir}/checkpoints; move them"):
        check_fresh_start(moved, run_dir)
    saved(Path(moved), 30)
    (run_dir / "config.toml").write_text(dump_config(elsewhere))
    assert step_of(resolve(run_dir).name) == 30
    shutil.rmtree(run_dir / "checkpoints")
    check_fresh_start(moved, run_dir)
    with pytest.raises(UserError, match=f"but there are in {moved}"):
        check_fresh_start(Location(run_dir / "checkpoints"), run_dir)
    check_fresh_start(moved, tmp_path / "new")


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_is_one_line_wherever_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Literal["sync", "async"]
) -> None:
    """Seen to fail, in the middle of a tensor's archive, with torch.save's error for the disk's."""
    real, room = LocalFileSystem.open, 0

    def opened(self: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        file = real(self, path, mode, **options)
        return Full(file, room) if path.endswith(".distcp") else file

    monkeypatch.setattr(LocalFileSystem, "open", opened)
    for room in range(0, 4000, 150):  # noqa: B007 (`opened` reads it)
        checkpointer = Checkpointer(tmp_path, Checkpoint(mode=mode))
        with pytest.raises(UserError, match=r"step-00000001.tmp/__0_0.distcp: No space left on device; free some"):
            checkpointer.save(1, flat_state(*toy()), state_of(1))
            checkpointer.wait()


def test_async_saves_what_was_there_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail without the copy: training continues in the same tensors."""
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="async"))
    states, gate = {step: flat_state(*toy(step)) for step in (10, 20)}, threading.Event()
    write = checkpointer._write
    monkeypatch.setattr(checkpointer, "_write", lambda *args: (gate.wait(20), write(*args)))
    live = {key: tensor.clone() for key, tensor in states[10].items()}
    checkpointer.save(10, live, state_of(10))
    for tensor in live.values():
        tensor.fill_(7)
    checkpointer.poll()
    assert not list(tmp_path.iterdir())  # nothing is waited for
    gate.set()
    checkpointer.save(20, states[20], state_of(20))  # waits for the one before
    assert is_committed(Location(tmp_path / "step-00000010"))
    checkpointer.close()
    assert equal(loaded(tmp_path)[1], states[20])
    truncate(tmp_path / "step-00000020" / "__0_0.distcp")
    assert equal(loaded(tmp_path)[1], states[10])


def test_an_error_of_an_async_save_is_raised_by_the_poll_that_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="async"))
    break_writes(monkeypatch, "__0_0", errno.EIO)
    checkpointer.save(10, flat_state(*toy()), state_of(10))
    with pytest.raises(UserError, match=r"__0_0.distcp: Input/output error"):
        for _ in range(100):
            checkpointer.poll()
            time.sleep(0.05)
    checkpointer.close()
    assert checkpointer.newest() is None


def test_the_best_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="sync", keep_last=1, keep_best=2))
    state = flat_state(*toy())
    for step, loss in [(10, 3.0), (20, 2.0), (30, 2.5), (40, math.nan), (50, 2.8), (60, None)]:
        checkpointer.save(step, state, state_of(step), validation_loss=loss)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [20, 30, 60]


def test_a_damaged_manifest_is_not_among_the_best(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="sync", keep_last=2, keep_best=1))
    state = flat_state(*toy())
    for step, loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        checkpointer.save(step, state, state_of(step), validation_loss=loss)
    flip(tmp_path / "step-00000010" / MANIFEST)
    checkpointer.save(40, state, state_of(40), validation_loss=4.0)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [20, 30, 40]


def test_a_run_does_not_resume_from_the_model_alone(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, KEEP_ALL)
    model, optimizer = toy()
    checkpointer.save(10, flat_state(model, optimizer), state_of(10))
    last = checkpointer.save(20, flat_state(model, None), state_of(20))
    assert checkpointer.newest(lambda saved: saved["step"] >= 20) == last
    assert checkpointer.newest(lambda saved: saved["step"] >= 30) == tmp_path / "step-00000010"
    assert load_model_only(last, model) == state_of(20)
    with pytest.raises(UserError, match="12 missing in the checkpoint"):
        checkpointer.load(last, flat_state(model, optimizer))
    checkpointer.load(last, flat_state(model, optimizer), only=("model",))


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    checkpointer = Checkpointer(f"file://{tmp_path}", KEEP_ALL)
    path = checkpointer.save(10, flat_state(*toy()), state_of(10))
    assert path == tmp_path / "step-00000010" and Path(path).is_dir()
    assert resolve(f"file://{tmp_path}") == path
    assert checkpointer.newest() == path


def test_two_colons_are_a_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    states = saved(Path("a::b"), 1)
    assert equal(loaded(Path("a::b"))[1], states[1]) and os.listdir(tmp_path) == ["a::b"]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert str(Location("~/runs")) == str(tmp_path / "home" / "runs")
    saved(Path("~/runs"), 1)
    assert os.listdir(tmp_path) == ["home"]


def test_an_unknown_url_is_a_mistake() -> None:
    with pytest.raises(UserError, match="nosuch://here: Protocol not known"):
        Checkpointer("nosuch://here", KEEP_ALL)


def test_urls() -> None:
    """The same in an object store, where there is no rename: a directory without a manifest is a draft."""
    place = Location("memory://run/checkpoints")
    checkpointer = Checkpointer(place, Checkpoint(mode="sync", keep_last=2))
    states = {step: flat_state(*toy(step)) for step in (10, 20, 30)}
    for step, state in states.items():
        assert checkpointer.save(step, state, state_of(step)) == place / f"step-{step:08d}"
    assert place.names() == ["step-00000020", "step-00000030"]
    (place / "step-00000030" / MANIFEST).remove()
    checkpointer, state = Checkpointer(place, KEEP_ALL), flat_state(*toy(99))
    newest = checkpointer.newest()
    assert newest == place / "step-00000020" and resolve(place) == newest
    assert checkpointer.load(newest, state) == state_of(20)
    assert equal(state, states[20])
    (newest / "__0_0.distcp").remove()
    with pytest.raises(UserError, match="__0_0.distcp is missing"):
        Checkpointer(place, KEEP_ALL).newest()
    place.remove()


def test_the_last_one_that_a_run_can_resume_from_is_kept(tmp_path: Path) -> None:
    """After the weights alone, whatever `keep_last` says; the line for a run that never had one says what they are
    good for. Seen to fail without that."""
    checkpointer = Checkpointer(tmp_path, Checkpoint(mode="sync", keep_last=1))
    model, optimizer = toy()
    for step in (10, 20):
        checkpointer.save(step, flat_state(model, optimizer), state_of(step))
    checkpointer.save(30, flat_state(model, None), state_of(30))
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [20, 30]
    assert checkpointer.newest() == tmp_path / "step-00000020"
    shutil.rmtree(tmp_path / "step-00000020")
    with pytest.raises(UserError, match="holds the model alone.*--checkpoint.load_only"):
        checkpointer.newest()
