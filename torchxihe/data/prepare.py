"""From documents to a token store, once: on every core, resumable, and with the same bytes whoever runs it.

A source's inputs are cut into shards by their sizes alone; each shard is read, encoded and committed by one process,
and needs nothing of the others. So a killed run goes on where it was, several machines can share the work, and the
manifest, written last, is the same in any case.

`datasets` and the tokenizer libraries are imported by the functions that need them (sources.py, tokenizer.py):
training reads stores and must not pay for them.
"""

import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from torchxihe.config import Config, Source, UserError
from torchxihe.data.order import plan_stages
from torchxihe.data.packing import AT_ONCE, best_fit, concat
from torchxihe.data.sources import Piece, Row, cut_shards, find_pieces, parse_template, read_rows, source_name
from torchxihe.data.store import (
    SPLITS,
    Prepared,
    ShardWriter,
    Split,
    check_vocab_size,
    committed_shard,
    digest,
    index_path,
    open_prepared,
    read_documents,
    recipe_path,
    write_json,
)
from torchxihe.data.token_files import read_chunks, read_layout
from torchxihe.data.tokenizer import Encoder, obtain, windows

COMPARED, COMPARED_CHARS = 8, 4_000
"""Documents of every shard, and characters of each at most, on which the fast encoder is compared with the slow."""
SAMPLED_SHARDS = 64
"""Shards of a source at most that a tokenizer's training text is taken from."""


@dataclass(frozen=True)
class Plan:
    """What is to be done for one source."""

    key: str
    """"data.sources.N", for messages."""
    name: str
    source: Source
    shards: list[list[Piece]]
    identity: str
    """Changes with every byte that is read and with the template."""


@dataclass(frozen=True)
class Job:
    """One shard's work; goes to another process."""

    plan_key: str
    source: Source
    pieces: list[Piece]
    store: Path
    name: str
    dtype: str
    tokenizer: Path
    eos_id: int
    bos_id: int
    fraction: float
    on_bad_rows: str
    max_bad_rows: float
    max_tokens: int


def prepare(config: Config) -> Prepared:
    """Make everything that training with `config` reads, unless it is there already, and say a line per source.

    A second process that prepares in the same cache waits for the first. Raises UserError.
    """
    cache = Path(config.data.cache_dir)
    with _writing(cache), _lock(cache / "prepare.lock"):
        plans = make_plans(config, cache)
        tokenizer = _tokenizer(config, plans, cache)
        stores = [_store(plan, config, tokenizer, cache) for plan in plans]
        _refuse_twins(plans, stores)
        manifests = _encode(plans, stores, config, tokenizer)
        for store, manifest in zip(stores, manifests, strict=True):
            _index(store, manifest, config)
        path = recipe_path(config)
        path.parent.mkdir(exist_ok=True)
        names = [plan.name for plan in plans]
        write_json(path, {"tokenizer": tokenizer.name, "names": names, "stores": [store.name for store in stores]})
    prepared = open_prepared(config)
    _check(config, prepared)
    for source in prepared.sources:
        print(_summary(source.name, source.manifest, source.train_rows, source.valid_rows), flush=True)
    return prepared


def prepare_part(config: Config, part: int, parts: int) -> None:
    """Encode every `parts`-th shard from `part` (counted from 0) on, so that many machines can share the work.

    When all parts are done, `prepare` finds the shards and only has to write the manifests.
    """
    cache = Path(config.data.cache_dir)
    with _writing(cache):
        with _lock(cache / "prepare.lock"):
            plans = make_plans(config, cache)
            tokenizer = _tokenizer(config, plans, cache)
        stores = [_store(plan, config, tokenizer, cache) for plan in plans]
        with _lock(cache / f"prepare-{part}-of-{parts}.lock"):
            jobs = _jobs(plans, stores, config, tokenizer)
            mine = [[job for job in jobs[i] if int(job.name) % parts == part] for i in range(len(plans))]
            count = sum(1 for _ in _run(mine, "preparing"))
    print(f"part {part} of {parts}: {count} shards are done; after the last part, run `torchxihe prepare CONFIG` once")


def make_plans(config: Config, cache: Path) -> list[Plan]:
    """Look at all sources: which files, in which shards. Raises UserError."""
    plans: list[Plan] = []
    for i, source in enumerate(config.data.sources):
        key = f"data.sources.{i}"
        template = parse_template(source.template, f"{key}.template")
        pieces = find_pieces(source, key)
        hashes = _hash_files([piece.path for piece in pieces if piece.format != "stream"], cache)
        content = [[piece.format, hashes.get(piece.path, [piece.path, piece.revision])] for piece in pieces]
        identity = digest([content, template.parts, source.subset, source.split])
        name = source_name(source)
        while any(plan.name == name for plan in plans):
            name += "-2"
        plans.append(Plan(key, name, source, cut_shards(pieces), identity))
    return plans


def _hash_files(paths: list[str], cache: Path) -> dict[str, str]:
    """xxh3_128 of each file, remembered by path, size and modification time."""
    memory = cache / "hashes.json"
    known: dict[str, list[Any]] = json.loads(memory.read_bytes()) if memory.exists() else {}
    hashes, changed = {}, False
    for path in paths:
        stat = os.stat(path)
        entry = known.get(os.path.abspath(path))
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry, changed = [stat.st_size, stat.st_mtime_ns, _hash_file(path)], True
            known[os.path.abspath(path)] = entry
        hashes[path] = entry[2]
    if changed:
        write_json(memory, known)
    return hashes


def _hash_file(path: str) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(2**20):
            hasher.update(data)
    return hasher.hexdigest()


def _tokenizer(config: Config, plans: list[Plan], cache: Path) -> Path:
    """The tokenizer's folder; trains it if need be."""
    share = config.tokenizer.train_bytes // len(plans)
    for plan in plans:
        if plan.shards[0][0].format == "tokens" and not config.tokenizer.path:
            raise UserError(f"tokenizer.path: must name the tokenizer that {plan.key} was encoded with")
    sample = (text for plan in plans for text in _sample(plan, share))
    key = digest([[plan.identity for plan in plans], share])
    folder = obtain(config.tokenizer, cache, sample, key)
    check_vocab_size(config, json.loads((folder / "torchxihe.json").read_bytes())["vocab_size"])
    return folder


def _sample(plan: Plan, most: int) -> Iterator[str]:
    """Documents of a source, `most` bytes in all, from shards spread evenly over it, none of them very long."""
    template = parse_template(plan.source.template, plan.key)
    count = min(len(plan.shards), SAMPLED_SHARDS)
    share = most // count
    for i in range(count):
        left = share
        for piece in plan.shards[i * len(plan.shards) // count]:
            for row in _rows(plan.key, piece, template.columns, plan.source):
                text, _ = template.text(row)
                text = text[: max(1, share // 4)].encode("utf-8", "ignore")[:left].decode("utf-8", "ignore")
                left -= len(text.encode())
                if text:
                    yield text
                if left <= 0:
                    break
            if left <= 0:
                break


def _rows(key: str, piece: Piece, columns: list[str], source: Source) -> Iterator[Row]:
    """`read_rows`, whose errors learn which source they are about."""
    try:
        yield from read_rows(piece, columns, source)
    except UserError as error:
        raise UserError(f"{key}.{error}") from error


def _store(plan: Plan, config: Config, tokenizer: Path, cache: Path) -> Path:
    """The store's folder, named by all that its bytes depend on."""
    key = {
        "source": plan.identity,
        "max_tokens": plan.source.max_tokens,
        "tokenizer": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        "ends": {k: v for k, v in _meta(tokenizer).items() if k != "vocab_size"},
        "validation": config.validation.fraction,
    }
    return cache / "stores" / digest(key)


def _meta(tokenizer: Path) -> dict[str, int]:
    return json.loads((tokenizer / "torchxihe.json").read_bytes())


def _refuse_twins(plans: list[Plan], stores: list[Path]) -> None:
    for i, store in enumerate(stores):
        first = stores.index(store)
        if first < i:
            raise UserError(f"{plans[i].key}: the same documents as {plans[first].key}; give one of them more weight")


def _jobs(plans: list[Plan], stores: list[Path], config: Config, tokenizer: Path) -> list[list[Job]]:
    """A job a shard, by source."""
    meta = _meta(tokenizer)
    return [
        [
            Job(
                plan_key=plan.key,
                source=plan.source,
                pieces=pieces,
                store=store,
                name=f"{i:05}",
                dtype="<u2" if meta["vocab_size"] <= 2**16 else "<u4",
                tokenizer=tokenizer,
                eos_id=meta["eos_id"],
                bos_id=meta["bos_id"],
                fraction=config.validation.fraction,
                on_bad_rows=config.data.on_bad_rows,
                max_bad_rows=config.data.max_bad_rows,
                max_tokens=plan.source.max_tokens,
            )
            for i, pieces in enumerate(plan.shards)
        ]
        for plan, store in zip(plans, stores, strict=True)
    ]


def _encode(plans: list[Plan], stores: list[Path], config: Config, tokenizer: Path) -> list[dict[str, Any]]:
    """The sources' manifests; encodes what is missing."""
    ready = [_read_manifest(store) for store in stores]
    all_jobs = _jobs(plans, stores, config, tokenizer)
    jobs = [[] if manifest else all_jobs[i] for i, manifest in enumerate(ready)]
    entries: list[list[dict[str, Any]]] = [[] for _ in plans]
    for i, entry in _run(jobs, "preparing"):
        entries[i].append(entry)
    manifests = []
    for plan, store, manifest, shards in zip(plans, stores, ready, entries, strict=True):
        manifests.append(manifest or _write_manifest(plan, store, shards, config.data.max_bad_rows))
    return manifests


def _read_manifest(store: Path) -> dict[str, Any] | None:
    """The manifest of a finished store."""
    path = store / "manifest.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def _write_manifest(plan: Plan, store: Path, shards: list[dict[str, Any]], max_bad_rows: float) -> dict[str, Any]:
    """Sum up the shards, check the whole, and commit the store."""
    sums = {split: Counter[str]() for split in SPLITS}
    dropped, bad, examples, rows = Counter[str](), Counter[str](), {}, 0
    for shard in shards:
        for split in SPLITS:
            sums[split].update(shard[split])
        dropped.update(shard["dropped"])
        bad.update(shard["bad"])
        examples = shard["examples"] | examples
        rows += shard["rows"]
    _check_bad_rows(plan.key, bad, rows, max_bad_rows, examples)
    if not sums["train"]["documents"]:
        kept = f"; all {sums['valid']['documents']} documents are held out" if sums["valid"] else ""
        why = "".join(f", {count} {reason}" for reason, count in dropped.items())
        raise UserError(f"{plan.key}.path: {plan.source.path}: no documents to train on in {rows} rows{why}{kept}")
    if len({shard["dtype"] for shard in shards}) > 1:
        raise UserError(f"{plan.key}.path: {plan.source.path}: token files of different widths; make them two sources")
    manifest = {
        "key": store.name,
        "dtype": shards[0]["dtype"],
        **{split: {name: sums[split][name] for name in ("documents", "tokens", "bytes")} for split in SPLITS},
        "rows": rows,
        "dropped": dict(dropped + bad),
        "shards": shards,
    }
    write_json(store / "manifest.json", manifest)
    return manifest


def _check_bad_rows(key: str, bad: Counter[str], rows: int, most: float, examples: dict[str, str]) -> None:
    if sum(bad.values()) > most * rows:
        reasons = "; ".join(f"{count} of {rows} rows: {why}, first {examples[why]}" for why, count in bad.most_common())
        raise UserError(f"{key}: {reasons}; data.max_bad_rows = {most:g} allows fewer")


def _run(jobs: list[list[Job]], label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do the jobs on all cores; (source, manifest entry) of each, in order. A source ends where its `max_tokens` do."""
    todo = deque((i, job) for i, of_source in enumerate(jobs) for job in of_source)
    workers = min(_cores(), len(todo))
    tokens = Counter[int]()
    started = time.perf_counter()
    size = sum(piece.size for _, job in todo for piece in job.pieces)
    with _pool(workers) as submit, tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        ahead: deque[tuple[int, Job, Callable[[], dict[str, Any]]]] = deque()
        while todo or ahead:
            while todo and len(ahead) < 2 * workers:
                i, job = todo.popleft()
                ahead.append((i, job, submit(job)))
            i, job, result = ahead.popleft()
            left = job.max_tokens - tokens[i]
            if job.max_tokens and left <= 0:
                continue
            entry = result()
            count = sum(entry[split]["tokens"] for split in SPLITS)
            if job.max_tokens and count > left:
                entry = prepare_shard(replace(job, max_tokens=left))
            tokens[i] += count
            bar.update(sum(piece.size for piece in job.pieces))
            bar.set_postfix_str(f"{tokens.total() / (time.perf_counter() - started) / 1e6:.2f}M tokens/s")
            yield i, entry


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Job], Callable[[], dict[str, Any]]]]:
    """Yields a function that starts a job and gives back a function that waits for its result."""
    if workers <= 1:
        yield lambda job: lambda: prepare_shard(job)
        return
    before = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_die_with_parent)
    try:
        yield lambda job: pool.submit(prepare_shard, job).result
    except BrokenProcessPool:
        raise UserError("a process that prepared data was killed, most likely for want of memory") from None
    finally:
        # Jobs that nobody waits for any more (after an error, or beyond max_tokens) would go on for a while.
        for child in set(active_children()) - before:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """Have this process end when the one that started it was killed, rather than wait for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _encoder(tokenizer: Path) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    return Encoder(tokenizer)


def prepare_shard(job: Job) -> dict[str, Any]:
    """Read, encode and commit one shard, unless it is there; its manifest entry."""
    entry = committed_shard(job.store, job.name)
    if entry is not None and entry["max_tokens"] == job.max_tokens:
        return entry
    return _index_shard(job) if job.pieces[0].format == "tokens" else _encode_shard(job)


def _encode_shard(job: Job) -> dict[str, Any]:
    """Read documents, encode and commit them."""
    template = parse_template(job.source.template, job.plan_key)
    encoder = _encoder(job.tokenizer)
    begin = [np.array([job.bos_id], np.uint32)] if job.bos_id >= 0 else []
    end = [np.array([job.eos_id], np.uint32)]
    dropped, bad, examples, rows, exactly = Counter[str](), Counter[str](), {}, 0, False
    with ShardWriter(job.store, job.name, job.dtype) as writer:
        for row in _all_rows(job, template.columns):
            rows += 1
            text, why = template.text(row)
            if why:
                if job.on_bad_rows == "error":
                    raise UserError(f'{job.plan_key}: {row.where}: {why}; mend it, or set data.on_bad_rows = "skip"')
                bad[why] += 1
                examples.setdefault(why, row.where)
                if sum(bad.values()) >= 100:  # no need to read on if it is hopeless
                    _check_bad_rows(job.plan_key, bad, rows, job.max_bad_rows, examples)
            elif not text or text.isspace():
                dropped["empty"] += 1
            else:
                if rows <= COMPARED:
                    exactly = exactly or not encoder.agrees(text[:COMPARED_CHARS])
                content, size = _content_hash(), 0
                for part in windows(text):
                    data = part.encode("utf-8", "replace")
                    content.update(data)
                    size += len(data)
                tokens = (encoder.encode(part, exactly) for part in windows(text))
                writer.add(_split(content, job.fraction), chain(begin, tokens, end), size)
                if job.max_tokens and sum(writer.counts[split]["tokens"] for split in SPLITS) >= job.max_tokens:
                    break
        report = {"rows": rows, "dropped": dropped, "bad": bad, "examples": examples, "max_tokens": job.max_tokens}
        return writer.commit(report)


def _index_shard(job: Job) -> dict[str, Any]:
    """Find the documents of a token file that stays where it is, and commit their places."""
    [piece] = job.pieces
    table = np.load(job.tokenizer / "bytes_per_token.npy")
    try:
        layout = read_layout(Path(piece.path), len(table))
        with ShardWriter(job.store, job.name, layout.dtype, in_place=True) as writer:
            at = start = size = 0  # where the chunk and the document begin, and the bytes of the document so far
            content = _content_hash()
            for tokens, ends in read_chunks(layout, job.eos_id):
                if tokens.max() >= len(table):
                    raise UserError(f"path: {piece.path}: token {tokens.max()} is not in the tokenizer of {len(table)}")
                stops = [(end, True) for end in ends.tolist()]
                stops.append((len(tokens), at + len(tokens) == layout.tokens))  # the last document may lack its end
                begin = 0
                for end, ended in stops:
                    content.update(tokens[begin:end].tobytes())
                    size += int(table[tokens[begin:end]].sum())
                    begin, length = end, at + end - start
                    if length and ended and not 0 < job.max_tokens <= start:
                        writer.note(_split(content, job.fraction), start, length, size)
                        start, size, content = at + end, 0, _content_hash()
                at += len(tokens)
            file = {"path": os.path.abspath(piece.path), "start": layout.start, "tokens": layout.tokens}
            documents = sum(writer.counts[split]["documents"] for split in SPLITS)
            report = {"rows": documents, "dropped": {}, "bad": {}, "examples": {}, "max_tokens": job.max_tokens}
            return writer.commit({**report, "file": file})
    except UserError as error:
        raise UserError(f"{job.plan_key}.{error}") from error


def _all_rows(job: Job, columns: list[str]) -> Iterator[Row]:
    for piece in job.pieces:
        yield from _rows(job.plan_key, piece, columns, job.source)


def _content_hash() -> "hashlib.blake2b":
    """What decides the split of a document."""
    return hashlib.blake2b(digest_size=8, key=b"torchxihe validation")


def _split(content: "hashlib.blake2b", fraction: float) -> Split:
    """Which split a document belongs to, by its content alone: equal documents never lie on both sides."""
    return "valid" if int.from_bytes(content.digest(), "little") < fraction * 2**64 else "train"


def _index(store: Path, manifest: dict[str, Any], config: Config) -> None:
    """Write the row index that `config` asks for, unless it is there."""
    folder = index_path(store, config)
    if (folder / "index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for split in SPLITS:
        documents = read_documents(store, manifest, split)
        rows, pieces, most, used = 0, 0, 1, 0
        with (folder / f"{split}.rows").open("wb") as row_file, (folder / f"{split}.pieces").open("wb") as piece_file:
            row_file.write(np.array([0], "<i8").tobytes())
            for starts, packed in _pack(documents, config.data.packing, config.data.seq_len + 1):
                row_file.write((starts[1:] + pieces).astype("<i8").tobytes())
                piece_file.write(packed.astype("<i8").tobytes())
                lengths = np.add.reduceat(packed[:, 1], starts[:-1])
                most = max(most, int((np.diff(starts) + (lengths <= config.data.seq_len)).max()))
                rows, pieces, used = rows + len(starts) - 1, pieces + len(packed), used + int(lengths.sum())
            for file in (row_file, piece_file):
                file.flush()
                os.fsync(file.fileno())
        padding = rows * (config.data.seq_len + 1) - used
        summary[split] = {"rows": rows, "pieces": pieces, "max_documents": most, "padding": padding}
    write_json(folder / "index.json", summary)


def _pack(documents: Iterator[np.ndarray], packing: str, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pack documents `AT_ONCE` at a time: (starts, pieces), see packing.py."""
    rest = waiting = np.zeros((0, 2), np.int64)
    last = False
    while not last:
        part = next(documents, None)
        last = part is None
        if part is not None:
            waiting = np.concatenate([waiting, part])
        while len(waiting) >= AT_ONCE or (last and len(waiting) + len(rest)):
            now, waiting = np.concatenate([rest, waiting[:AT_ONCE]]), waiting[AT_ONCE:]
            starts, pieces = (best_fit if packing == "best_fit" else concat)(now, width)
            end = len(pieces)
            if packing == "concat" and not (last and not len(waiting)):
                starts, end = starts[:-1], starts[-2]  # the last window goes on with the documents that follow
            rest = pieces[end:]
            if len(starts) > 1:
                yield starts, pieces[:end]


def _check(config: Config, prepared: Prepared) -> None:
    """What is only known now: whether there is something to validate on, and enough for the run."""
    if config.validation.every and not any(source.valid_rows for source in prepared.sources):
        raise UserError(
            f"validation.fraction: {config.validation.fraction:g} holds out no document of so few; raise it, or set "
            "validation.every = 0"
        )
    plan_stages(config, prepared)


def _summary(name: str, manifest: dict[str, Any], train_rows: int, valid_rows: int) -> str:
    """A line about a source."""
    count = {what: sum(manifest[split][what] for split in SPLITS) for what in ("documents", "tokens", "bytes")}
    dropped = "".join(f", {count} dropped ({why})" for why, count in manifest["dropped"].items())
    return (
        f"{name}: {count['documents']:,} documents, {count['tokens']:,} tokens, "
        f"{count['bytes'] / count['tokens']:.2f} bytes per token; {train_rows:,} rows to train on, "
        f"{valid_rows:,} held out{dropped}"
    )


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Errors of the disk below are the user's to mend."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"data.cache_dir: {error.filename or cache}: {why}; it must be writable and have room; what is already "
            "prepared there is kept"
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold `path` alone; waits for whoever holds it, and says for whom."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{path}: waiting for {file.read().strip() or 'another process'}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)
