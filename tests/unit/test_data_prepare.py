"""The whole way from documents to rows, bad input of all kinds, and what happens when a run is killed."""

import gzip
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data_corpus import make_config, write_lines, write_texts
from torchxihe.config.load import dump_config
from torchxihe.data.loader import IGNORE, BatchSpec, Loader
from torchxihe.data.manifests import Manifest, Shard
from torchxihe.data.order import Order, plan_stages
from torchxihe.data.prepare import encode, rows, sources
from torchxihe.data.prepare import pipeline as module
from torchxihe.data.prepare.pipeline import prepare, prepare_part
from torchxihe.data.store import Prepared, open_prepared
from torchxihe.errors import UserError

BYTES = {"vocab_size": 257}
"""A tokenizer of bytes alone: id 0 ends a document, byte b is 1 + its place among the byte characters."""


def ids(text: str) -> list[int]:
    """What `BYTES` makes of ASCII text without blanks."""
    return [ord(char) - ord("!") + 1 for char in text]


def test_three_lines_from_the_file_to_the_batch(tmp_path: Path) -> None:
    """Every token, target and mask, spelled out."""
    source = write_texts(tmp_path / "three.jsonl", ["abcde", "xyz", "q"])
    config = make_config(
        tmp_path / "cache", source, seq_len=4, data={"packing": "concat"}, tokenizer=BYTES,
        training={"global_batch_size": 3},
    )  # fmt: skip
    prepared = prepare(config)
    a, b, c, d, e, x, y, z, q = ids("abcdexyzq")
    end = prepared.eos_id
    assert end == 0 and a == ord("a") - ord("!") + 1
    [store] = (tmp_path / "cache/stores").iterdir()
    assert np.fromfile(store / "train-00000.bin", "<u2").tolist() == [a, b, c, d, e, end, x, y, z, end, q, end]
    assert np.fromfile(store / "train-00000.idx", "<i8").tolist() == [0, 6, 6, 4, 10, 2]

    order = Order(plan_stages(config, prepared), prepared.rows)
    loader = Loader(prepared, order, BatchSpec(4, 4, torch.device("cpu")))
    batch = next(loader)
    loader.close()
    expected = {
        # inputs, targets, where documents begin
        (a, b, c, d): ((b, c, d, e), (0,)),
        (end, x, y, z): ((IGNORE, y, z, end), (0, 1)),
        (q, end, end, end): ((end, IGNORE, IGNORE, IGNORE), (0, 2)),  # two tokens of padding
    }
    tokens = [tuple(row) for row in batch.tokens.tolist()]
    assert sorted(tokens[:3]) == sorted(expected) and batch.samples == (0, 1, 2, -1)
    assert [tuple(row) for row in batch.targets.tolist()] == [*(expected[row][0] for row in tokens[:3]), (IGNORE,) * 4]
    assert tokens[3] == (end,) * 4 and batch.valid == 4 + 3 + 1
    starts = [4 * b + s for b in range(3) for s in expected[tokens[b]][1]] + [12]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*starts, 16]
    assert prepared.bytes_per_token[[a, end]].tolist() == [1, 0]
    [source_rows] = prepared.sources
    assert (source_rows.documents, source_rows.tokens, source_rows.bytes) == (3, 12, 9)


def manifest_of(prepared: Prepared) -> Manifest:
    return prepared.sources[0].manifest


def texts_of(prepared: Prepared) -> list[list[int]]:
    """The documents' ids without their EOS, in order, for a store of one shard."""
    [source] = prepared.sources
    tokens = np.fromfile(source.store / "train-00000.bin", source.manifest.dtype)
    places = np.fromfile(source.store / "train-00000.idx", "<i8").reshape(-1, 2).tolist()
    assert all(tokens[start + length - 1] == prepared.eos_id for start, length in places)
    return [tokens[start : start + length - 1].tolist() for start, length in places]


def test_empty_documents_are_dropped_and_counted_and_short_ones_kept(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["", "ab", " \n\t ", "c"])
    prepared = prepare(make_config(tmp_path / "cache", source, tokenizer=BYTES))
    assert texts_of(prepared) == [ids("ab"), ids("c")]
    assert prepared.sources[0].dropped == {"empty": 2}


def test_nul_bytes_and_special_tokens_are_text(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["a\0b", "<|endoftext|>"])
    prepared = prepare(make_config(tmp_path / "cache", source, tokenizer=BYTES))
    nul, text = texts_of(prepared)
    assert len(nul) == 3 and nul[0] == ids("a")[0] and nul[1] > 0
    assert text == ids("<|endoftext|>")


BAD_LINES = {
    '{"other": "x"}': "column 'text' is missing",
    '{"text": null}': "column 'text' is missing",
    '{"text": 5}': "column 'text' is not a string",
    '["text"]': "not a JSON object",
    '{"text": "trunc': "malformed JSON",
    "nonsense": "malformed JSON",
    b'{"text": "\xff\xfe"}': "not UTF-8",
}


def test_half_of_a_surrogate_pair_is_text(tmp_path: Path) -> None:
    """JSON can spell it; it becomes a question mark. Seen to fail where the encoders are compared."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n' * 3)
    prepared = prepare(make_config(tmp_path / "cache", {"path": str(tmp_path / "a.jsonl")}, tokenizer=BYTES))
    assert texts_of(prepared) == [ids("a?b")] * 3


@pytest.mark.parametrize(("line", "why"), BAD_LINES.items())
def test_a_bad_line_is_counted_or_named(tmp_path: Path, line: str | bytes, why: str) -> None:
    data = line.encode() if isinstance(line, str) else line
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "ab"}\n' * 150 + data + b"\n" + b'{"text": "cd"}')
    skip = make_config(tmp_path / "cache", {"path": str(file)}, tokenizer=BYTES)
    prepared = prepare(skip)
    assert prepared.sources[0].dropped == {why: 1}
    assert texts_of(prepared) == [ids("ab")] * 150 + [ids("cd")]
    strict = make_config(tmp_path / "cache2", {"path": str(file)}, tokenizer=BYTES, data={"on_bad_rows": "error"})
    with pytest.raises(UserError) as error:
        prepare(strict)
    details = {
        '{"other": "x"}': " (the row has other)",
        '{"text": null}': " (the row has text (it is null))",
        '{"text": 5}': " (it is an int)",
    }
    detail = details.get(line, "") if isinstance(line, str) else ""
    what = f"{file}, line 151: {why}{detail}"
    assert str(error.value) == f'data.sources.0: {what}; fix it, or set data.on_bad_rows = "skip"'


def test_a_store_with_bad_rows_is_no_excuse_for_a_stricter_config(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 150 + [{"text": 1}])
    prepare(make_config(tmp_path / "cache", source, tokenizer=BYTES))
    for stricter, rule in (
        ({"on_bad_rows": "error"}, 'data.on_bad_rows = "error" allows none'),
        ({"max_bad_rows": 0.001}, "data.max_bad_rows = 0.001 allows fewer"),
    ):
        what = r"1 of 151 rows: column 'text' is not a string, first .*a.jsonl, line 151 \(it is an int\)"
        with pytest.raises(UserError, match=f"{what}; {rule}"):
            prepare(make_config(tmp_path / "cache", source, tokenizer=BYTES, data=stricter))


def test_too_many_bad_rows_are_an_error_at_once(tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", [{"text": "a"}, {"text": 1}, {"text": "c"}])
    with pytest.raises(UserError) as error:
        prepare(make_config(tmp_path / "cache", few, tokenizer=BYTES))
    assert str(error.value) == (
        f"data.sources.0: 1 of 3 rows: column 'text' is not a string, first {few['path']}, line 2 (it is an int); "
        "data.max_bad_rows = 0.01 allows fewer: fix them, or exclude files with glob"
    )
    none = write_lines(tmp_path / "none.jsonl", [{"title": "a", "body": "b"}] * 3)
    with pytest.raises(UserError) as error:
        prepare(make_config(tmp_path / "cache", none, tokenizer=BYTES))
    assert str(error.value) == (
        f"data.sources.0: 3 of 3 rows: column 'text' is missing, first {none['path']}, line 1 (the row has title, "
        "body); no row can be used: check data.sources.0.format and the columns of data.sources.0.template (chat: "
        "data.sources.0.messages)"
    )
    many = write_lines(tmp_path / "many.jsonl", [{"text": 1}] * 100_000)
    with pytest.raises(UserError, match=r"100 of 100 rows: column 'text' is not a string"):
        prepare(make_config(tmp_path / "cache", many, tokenizer=BYTES))


def test_a_store_of_another_reader_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are read differently make another store. Seen to fail: what was cut before stayed."""
    (tmp_path / "a.csv").write_text("text\na\nb\n")
    config = make_config(tmp_path / "cache", {"path": str(tmp_path / "a.csv")}, tokenizer=BYTES)
    after = prepare(config).sources[0].key
    monkeypatch.setattr(rows, "READER_REVISIONS", {})
    assert prepare(config).sources[0].key != after


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.txt").write_bytes(b"fine")
    (tmp_path / "t/b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"1 of 2 rows: not UTF-8, first .*b.txt, byte 3;"):
        prepare(make_config(tmp_path / "cache", {"path": str(tmp_path / "t")}, tokenizer=BYTES))
    half = {"max_bad_rows": 0.5}
    prepared = prepare(make_config(tmp_path / "cache", {"path": str(tmp_path / "t")}, tokenizer=BYTES, data=half))
    assert prepared.sources[0].dropped == {"not UTF-8": 1}


def test_a_source_without_a_document_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(
        UserError, match=r"data.sources.0.path: .*empty.txt: no documents to train on in 1 row, 1 empty"
    ):
        prepare(make_config(tmp_path / "cache", {"path": str(tmp_path / "empty.txt")}, tokenizer=BYTES))
    with pytest.raises(UserError, match=r"data.sources.0.path: .*nowhere.txt: no file there"):
        prepare(make_config(tmp_path / "cache", {"path": str(tmp_path / "nowhere.txt")}, tokenizer=BYTES))


def test_the_same_documents_twice(tmp_path: Path) -> None:
    first = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    second = write_texts(tmp_path / "b.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"data.sources.1: the same documents as data.sources.0; give one of them more"):
        prepare(make_config(tmp_path / "cache", first, second))


def test_equal_documents_lie_on_one_side_of_the_split(tmp_path: Path) -> None:
    texts = [f"document {i % 100}" for i in range(300)]
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", texts), validation={"fraction": 0.2})
    manifest = manifest_of(prepare(config))
    assert manifest.train.documents % 3 == manifest.valid.documents % 3 == 0
    assert 9 <= manifest.valid.documents // 3 <= 35


def test_validation_without_a_held_out_document(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(UserError, match=r"validation.fraction: 0.01 holds out no document of so few; raise it"):
        prepare(make_config(tmp_path / "cache", source, validation={"fraction": 0.01, "every": 5}))
    one = write_texts(tmp_path / "b.jsonl", ["only one"])
    with pytest.raises(UserError, match=r'no document of so few; make each line a document .*format = "lines"\)'):
        prepare(make_config(tmp_path / "cache", one, validation={"fraction": 0.01, "every": 5}))


def test_a_model_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["some words, some more words"] * 9)
    config = make_config(tmp_path / "cache", source)
    size = prepare(config).vocab_size
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 258})})
    message = rf"model.vocab_size: 258 is smaller than the tokenizer's {size}; set it to at least that"
    for make in (prepare, open_prepared):
        with pytest.raises(UserError, match=message):
            make(small)


def test_nothing_prepared_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is prepared for this config: run `torchxihe prepare CONFIG` first"):
        open_prepared(make_config(tmp_path / "cache", {"path": "x"}))


def test_max_tokens_ends_after_the_document_that_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALLEST_SHARD", 200)
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    source = write_texts(tmp_path / "a.jsonl", ["abcdefghi"] * 100)  # ten tokens each, 20 bytes a line and more
    for most, documents in ((1, 1), (10, 1), (11, 2), (500, 50), (10**6, 100)):
        limited = {**source, "max_tokens": most}
        prepared = prepare(make_config(tmp_path / f"cache{most}", limited, tokenizer=BYTES))
        assert prepared.sources[0].documents == documents


def tree(cache: Path) -> dict[str, bytes]:
    """Everything that was prepared, but locks and notes about this machine's files."""
    files = [p for p in sorted(cache.rglob("*")) if p.is_file() and p.suffix != ".lock" and p.name != "hashes.json"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A source of about 20 shards."""
    monkeypatch.setattr(sources, "SMALLEST_SHARD", 1000)
    return write_texts(tmp_path / "many.jsonl", [f"text number {i} of {i % 7}" for i in range(600)])


def test_parts_on_many_machines_make_the_same_store(
    tmp_path: Path, many: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fraction = {"fraction": 0.1}
    monkeypatch.setattr(encode, "_cores", lambda: 2)
    prepare(make_config(tmp_path / "whole", many, validation=fraction))
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    parted = make_config(tmp_path / "parts", many, validation=fraction)
    for part in (2, 0, 1):
        prepare_part(parted, part, 3)
        assert not list(tmp_path.glob("parts/stores/*/manifest.json"))
    prepare(parted)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    assert len(list(tmp_path.glob("parts/stores/*/0*.json"))) > 10


def test_a_full_disk_is_an_error_and_the_rerun_equals_a_clean_run(
    tmp_path: Path, many: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    config = make_config(tmp_path / "cache", many)
    commit, count = encode.ShardWriter.commit, 0

    def full(self: encode.ShardWriter, report: dict[str, Any]) -> Shard:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError(28, "No space left on device")
        return commit(self, report)

    with monkeypatch.context() as patch:
        patch.setattr(encode.ShardWriter, "commit", full)
        with pytest.raises(UserError, match=r"data.cache_dir: .*cache: No space left on device; it must be writable"):
            prepare(config)
    assert len(list(tmp_path.glob("cache/stores/*/0*.json"))) == 4 and not list(tmp_path.glob("cache/stores/*/*.tmp"))
    prepare(config)
    prepare(make_config(tmp_path / "clean", many))
    assert tree(tmp_path / "cache") == tree(tmp_path / "clean")


def test_a_shard_that_was_damaged_before_the_store_was_whole_is_made_again(
    tmp_path: Path, many: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_cores", lambda: 1)
    prepare_part(make_config(tmp_path / "cache", many), 0, 1)
    for name, keep in (("train-00001.bin", 50), ("train-00003.idx", 0), ("00004.json", 20)):
        [file] = tmp_path.glob(f"cache/stores/*/{name}")
        file.write_bytes(file.read_bytes()[:keep])
    prepare(make_config(tmp_path / "cache", many))
    prepare(make_config(tmp_path / "clean", many))
    assert tree(tmp_path / "cache") == tree(tmp_path / "clean")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    source = write_texts(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(UserError, match=r"data.cache_dir: .*file/cache: Not a directory; it must be writable"):
        prepare(make_config(tmp_path / "file/cache", source))


def test_a_file_that_cannot_be_read_is_not_the_caches_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail, both, as "data.cache_dir: ..."."""
    (tmp_path / "b.txt").write_text("b")
    config = make_config(
        tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["a"]), {"path": str(tmp_path / "*.txt")}
    )

    def broken(path: str, *_: Any) -> Any:
        raise OSError(5, "Input/output error")

    for name in ("_hash_file", "find_pieces"):
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr(module, name, broken)
            prepare(config)
        assert str(error.value) == f"data.sources.0.path: {tmp_path}/a.jsonl: Input/output error"


def test_a_disk_that_fills_while_the_tokenizer_is_trained(tmp_path: Path) -> None:
    """Seen to fail with the library's own `save`, whose error is a bare Exception."""
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["a"]))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match=r"data.cache_dir: .*: File too large; it must be writable and have room"):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert prepare(config).sources[0].documents == 1


KILLED = """
import sys
from torchxihe.config.load import load_config
from torchxihe.data.prepare import sources
from torchxihe.data.prepare.pipeline import prepare
if __name__ == "__main__":
    sources.SMALLEST_SHARD = 30_000
    prepare(load_config(sys.argv[1]))
"""


def test_a_killed_run_goes_on_to_what_a_clean_run_makes(tmp_path: Path) -> None:
    texts = [f"{i} " + " ".join(str(i * k % 991) for k in range(60)) for i in range(4000)]
    source = write_texts(tmp_path / "a.jsonl", texts)
    (tmp_path / "run.py").write_text(KILLED)

    def start(name: str) -> "subprocess.Popen[str]":
        config = make_config(tmp_path / name, source)
        (tmp_path / f"{name}.toml").write_text(dump_config(config))
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / f"{name}.toml")]
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."},
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    process = start("killed")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/stores/*/00001.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("killed/stores/*/manifest.json")), "it was too fast to be killed"
    for name in ("killed", "clean"):
        process = start(name)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert tree(tmp_path / "killed") == tree(tmp_path / "clean")


def _hold(path: Path, ready: Any, release: Any) -> None:
    with module._alone(path):
        ready.set()
        release.wait(30)


def test_a_second_run_waits_and_says_for_whom(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "prepare.lock", ready, release))
    holder.start()
    assert ready.wait(30)
    waiter = context.Process(target=_hold, args=(tmp_path / "prepare.lock", context.Event(), release))
    waiter.start()
    time.sleep(0.3)
    assert waiter.is_alive()
    assert f"prepare.lock: waiting for process {holder.pid} on " in capfd.readouterr().out
    release.set()
    holder.join(30), waiter.join(30)
    assert holder.exitcode == waiter.exitcode == 0


def test_a_new_seq_len_does_not_tokenise_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["some text"] * 30)
    prepare(make_config(tmp_path / "cache", source))

    def never(job: encode.Job) -> Shard:
        raise AssertionError(job)

    monkeypatch.setattr(encode, "prepare_shard", never)
    for changes in ({"seq_len": 8}, {"data": {"packing": "concat"}}):
        prepare(make_config(tmp_path / "cache", source, **changes))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        prepare(make_config(tmp_path / "cache", {**source, "template": "{text}!"}))


LONG = """
import re, sys
from torchxihe.config.load import load_config
from torchxihe.data.prepare.pipeline import prepare
if __name__ == "__main__":
    print(prepare(load_config(sys.argv[1])).sources[0].tokens)
    print(1024 * int(re.search(r"VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_a_few_times_the_longest_document(tmp_path: Path) -> None:
    """A document of 5 million tokens; `benchmarks/data.py` has one of 50 million."""
    text = "".join(f"{i % 10_007} " for i in range(2_500_000))
    (tmp_path / "long.txt").write_text(text)
    config = make_config(tmp_path / "cache", {"path": str(tmp_path / "long.txt")}, tokenizer={"train_bytes": 10_000})
    (tmp_path / "a.toml").write_text(dump_config(config))
    (tmp_path / "run.py").write_text(LONG)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "a.toml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.splitlines()
    assert int(output[-2]) > 5_000_000
    assert int(output[-1]) < 100 * 2**20 + 8 * len(text)


def test_training_imports_no_preparing_library(tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["some text"] * 30))
    prepare(config)
    (tmp_path / "a.toml").write_text(dump_config(config))
    script = f"""
import sys
from torchxihe.config.load import load_config
from torchxihe.data.store import open_prepared
import torchxihe.data.loader, torchxihe.data.order
open_prepared(load_config({str(tmp_path / "a.toml")!r}))
slow = ("datasets", "transformers", "tokenizers", "tiktoken", "pyarrow", "pandas")
print([name for name in slow if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=True)
    assert output.stdout.strip() == "[]"


def write_token_file(path: Path, kind: str, documents: list[list[int]]) -> None:
    """The documents (each with its EOS) as nanoGPT, llm.c or Megatron would store them."""
    tokens = np.array([token for document in documents for token in document], "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes((header.tobytes() if kind == "llm.c" else b"") + tokens.tobytes())
    if kind == "megatron":
        lengths = np.array([len(document) for document in documents], "<i4")
        pointers = 2 * (np.cumsum(lengths) - lengths).astype("<i8")
        head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + len(lengths).to_bytes(8, "little")
        index = np.arange(len(lengths) + 1, dtype="<i8")
        counted = head + len(index).to_bytes(8, "little")
        path.with_suffix(".idx").write_bytes(counted + lengths.tobytes() + pointers.tobytes() + index.tobytes())


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "megatron"])
def test_token_files_are_used_where_they_lie(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows as from the text, and documents that cross the chunks they are read in."""
    monkeypatch.setattr("torchxihe.data.prepare.token_files.CHUNK", 7)
    texts = [f"text {i} " * (1 + i % 5) for i in range(80)]
    plain = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", texts), tokenizer=BYTES)
    by_text = prepare(plain)
    documents = [[*document, 0] for document in texts_of(by_text)]
    write_token_file(tmp_path / "a.bin", kind, documents)
    source = {"path": str(tmp_path / "a.bin"), "format": "tokens"}
    by_tokens = prepare(make_config(tmp_path / "cache", source, tokenizer={"path": str(by_text.tokenizer_dir)}))
    assert not list(tmp_path.glob(f"cache/stores/{by_tokens.sources[0].key}/*.bin"))
    for what in ("documents", "tokens", "bytes", "train_rows"):
        assert getattr(by_tokens.sources[0], what) == getattr(by_text.sources[0], what)
    rows = [np.empty(17, "<u2"), np.empty(17, "<u2")]
    readers = [prepared.sources[0].open("train") for prepared in (by_text, by_tokens)]
    for i in range(by_text.sources[0].train_rows):
        lengths = [reader.read(i, row) for reader, row in zip(readers, rows, strict=True)]
        assert lengths[0] == lengths[1] and rows[0][: sum(lengths[0])].tolist() == rows[1][: sum(lengths[0])].tolist()
    split = make_config(tmp_path / "cache", source, tokenizer={"path": str(by_text.tokenizer_dir)},
                        validation={"fraction": 0.3})  # fmt: skip
    manifest = manifest_of(prepare(split))
    assert manifest.valid.documents > 5
    assert manifest.train.tokens + manifest.valid.tokens == by_text.sources[0].tokens


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """The section `tokenizer` for token files: one of bytes."""
    by_text = prepare(make_config(tmp_path / "cache", write_texts(tmp_path / "text.jsonl", ["ab"]), tokenizer=BYTES))
    return {"path": str(by_text.tokenizer_dir)}


def test_token_files_that_were_moved_or_changed(tmp_path: Path, given: dict[str, Any]) -> None:
    """Seen to fail, all of it, with the path in the store: its key, which is content alone, knows no new path."""
    write_token_file(tmp_path / "a.bin", "nanogpt", [[5, 6, 0], [7, 0]])
    before, after = (
        make_config(tmp_path / "cache", {"path": str(tmp_path / name), "format": "tokens"}, tokenizer=given)
        for name in ("a.bin", "b.bin")
    )
    made = prepare(before)
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    assert prepare(after).rows == made.rows
    with pytest.raises(UserError, match=r"^\S*/a.bin: missing; run `torchxihe prepare CONFIG` again$"):
        open_prepared(before)
    write_token_file(tmp_path / "a.bin", "nanogpt", [[8, 0], [9, 9, 0]])  # another corpus of the same size
    with pytest.raises(UserError, match="a.bin: changed: not the file that was prepared; run `torchxihe prepare"):
        open_prepared(before)
    out = np.empty(17, "<u2")
    open_prepared(after).sources[0].open("train").read(0, out)
    assert sorted(out[:5].tolist()) == [0, 0, 5, 6, 7]
    assert prepare(before).rows != made.rows


def test_a_changed_megatron_index_is_another_source(tmp_path: Path, given: dict[str, Any]) -> None:
    """Seen to fail when the tokens alone are hashed."""
    config = make_config(tmp_path / "cache", {"path": str(tmp_path / "a.bin"), "format": "tokens"}, tokenizer=given)
    write_token_file(tmp_path / "a.bin", "nanogpt", [[5, 6, 0], [7, 0]])
    counts = [prepare(config).sources[0].documents]
    for documents in ([[5, 6, 0, 7, 0]], [[5], [6], [0], [7], [0]]):
        write_token_file(tmp_path / "a.bin", "megatron", documents)
        counts.append(prepare(config).sources[0].documents)
    assert counts == [2, 1, 5]


def test_the_split_of_tokens_does_not_depend_on_their_width(tmp_path: Path, given: dict[str, Any]) -> None:
    """Seen to fail when a file's bytes are hashed."""
    documents = [[1 + i % 200, 1 + i // 200, 0] for i in range(100)]
    write_token_file(tmp_path / "narrow.bin", "llm.c", documents)
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 300
    (tmp_path / "wide.bin").write_bytes(header.tobytes() + np.array(documents, "<u4").tobytes())
    sources = [{"path": str(tmp_path / f"{name}.bin"), "format": "tokens"} for name in ("narrow", "wide")]
    split = {"fraction": 0.3}
    prepared = prepare(make_config(tmp_path / "cache", *sources, tokenizer=given, validation=split))
    narrow, wide = (np.fromfile(source.store / "valid-00000.idx", "<i8").tolist() for source in prepared.sources)
    assert narrow == wide and 20 < len(narrow) < 160


def test_token_files_that_do_not_fit(tmp_path: Path) -> None:
    by_text = prepare(make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["ab"]), tokenizer=BYTES))
    source = {"path": str(tmp_path / "a.bin"), "format": "tokens"}

    def message(data: bytes, **changes: Any) -> str:
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(UserError) as error:
            prepare(make_config(tmp_path / "cache", source, **changes))
        return str(error.value)

    given = {"tokenizer": {"path": str(by_text.tokenizer_dir)}}
    assert message(b"\1\0") == "tokenizer.path: must name the tokenizer that data.sources.0 was encoded with"
    assert message(b"\1\0\1", **given) == (
        f"data.sources.0.path: {tmp_path}/a.bin: 3 bytes are not a whole number of <u2 tokens"
    )
    assert message(b"\1\0\1\7", **given).endswith("a.bin: token 1793 is not in the tokenizer of 257")
    npy = tmp_path / "a.npy"
    np.save(npy, np.array([5, 6, 0], np.uint16))
    assert message(npy.read_bytes(), **given).endswith("a NumPy file, but token files are read in place: use tofile()")
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin.gz").write_bytes(gzip.compress(b"\5\0\6\0\0\0"))
    packed = {"path": str(tmp_path / "a.bin.gz"), "format": "tokens"}
    with pytest.raises(UserError, match=r"a.bin.gz: compressed, but token files are read in place: decompress it"):
        prepare(make_config(tmp_path / "cache", packed, **given))


@pytest.mark.parametrize(
    ("magic", "version", "count", "why"),
    [
        (20240520, 1, 4, "the header counts 4 tokens, the file has 5; write it again"),
        (20240520, 1, 6, "the header counts 6 tokens, the file has 5; write it again"),
        (20240520, 1, -1, "the header counts -1 tokens, the file has 5; write it again"),
        (20240520, 2, 5, "llm.c's format 20240520 in version 2; only 1 is supported"),
        (20240801, 1, 5, "llm.c's format 20240801 in version 1; only 7 is supported"),
    ],
)
def test_a_header_of_llm_c_that_is_not_the_files(
    tmp_path: Path, given: dict[str, Any], magic: int, version: int, count: int, why: str
) -> None:
    """Seen to fail: fewer tokens were taken without a word, and any version."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    file = tmp_path / "a.bin"
    file.write_bytes(header.tobytes() + np.array([5, 6, 0, 7, 0], "<u2" if magic == 20240520 else "<u4").tobytes())
    with pytest.raises(UserError) as error:
        prepare(make_config(tmp_path / "cache", {"path": str(file), "format": "tokens"}, tokenizer=given))
    assert str(error.value) == f"data.sources.0.path: {file}: {why}"


ORDER, DOCUMENTS = "its sequences are not stored in order, without gaps", "its documents do not divide sequences 0 to 3"
DAMAGED = "a Megatron index that is truncated or damaged"
MEGATRON_FAULTS = {
    # name: (what is put where, what is said); the index has 34 bytes, 3 int32, 3 int64, 4 int64
    "pointers exchanged": ((46, np.array([4, 0, 8], "<i8")), ORDER),
    "a gap": ((46, np.array([0, 4, 10], "<i8")), ORDER),
    "a negative length": ((34, np.array([-2, 2, 2], "<i4")), ORDER),
    "documents begin at 1": ((70, np.array([1, 2, 3, 3], "<i8")), DOCUMENTS),
    "documents end at 2": ((70, np.array([0, 1, 2, 2], "<i8")), DOCUMENTS),
    "documents that decrease": ((70, np.array([0, 2, 1, 3], "<i8")), DOCUMENTS),
    "a document far away": ((70, np.array([0, 1, 10**9, 3], "<i8")), DOCUMENTS),
    "another version": ((9, np.array([2], "<u8")), "a Megatron index of version 2, token type 8; only version 1"),
    "int64 tokens": ((17, np.array([5], "<u1")), "a Megatron index of version 1, token type 5; only version 1"),
    "another magic": ((0, np.array([0], "<u1")), "not a Megatron index"),
    "huge counts": ((18, np.array([2**60, 2**60], "<u8")), DAMAGED),
}


@pytest.mark.parametrize("fault", MEGATRON_FAULTS)
def test_a_megatron_index_that_is_not_what_is_read(tmp_path: Path, given: dict[str, Any], fault: str) -> None:
    """Seen to fail: tokens of other documents were read, or documents began with tokens of none."""
    (at, values), why = MEGATRON_FAULTS[fault]
    file, index = tmp_path / "a.bin", tmp_path / "a.idx"
    write_token_file(file, "megatron", [[5, 0], [6, 0], [7, 0]])
    content = bytearray(index.read_bytes())
    content[at : at + values.nbytes] = values.tobytes()
    index.write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(make_config(tmp_path / "cache", {"path": str(file), "format": "tokens"}, tokenizer=given))
    assert str(error.value).startswith(f"data.sources.0.path: {index}: {why}")


@pytest.mark.timeout(60)
def test_a_megatron_index_that_is_cut_off_or_belongs_to_another_file(tmp_path: Path, given: dict[str, Any]) -> None:
    file, index = tmp_path / "a.bin", tmp_path / "a.idx"
    config = make_config(tmp_path / "cache", {"path": str(file), "format": "tokens"}, tokenizer=given)
    write_token_file(file, "megatron", [[5, 0], [6, 0], [7, 0]])
    content = index.read_bytes()
    for size in (0, 5, 17, 20, 40, len(content) - 3, len(content) + 3):
        index.write_bytes(content[:size].ljust(size, b"\0"))
        with pytest.raises(UserError, match=rf"data.sources.0.path: {index}: .*Megatron index"):
            prepare(config)
    index.write_bytes(content)
    file.write_bytes(file.read_bytes() + b"\5\0")
    with pytest.raises(
        UserError, match=r"a.bin: its .idx counts 6 tokens, the file has 7; they do not belong together"
    ):
        prepare(config)
