"""From documents to a token store, once: on every core, resumable, and with the same bytes whoever runs it.

A source's inputs are cut into shards by their sizes alone; each shard is read, encoded and committed by one process
(encode.py), and needs nothing of the others. So a killed run goes on where it was, several machines can share the
work, and the manifest, written last, is the same in any case.

`datasets` and the tokenizer libraries are imported by the functions that need them (sources.py, tokenizer.py):
training reads stores and must not pay for them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchxihe.config.options import Config, Documents, documents_of
from torchxihe.data.order import Order, check_epochs, plan_stages
from torchxihe.data.prepare.chat import Chat, read_messages
from torchxihe.data.prepare.encode import Job, check_bad_rows, run_jobs
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.row_index import write_row_index
from torchxihe.data.prepare.rows import Piece, Row, Template
from torchxihe.data.prepare.sources import cut_shards, find_pieces, source_name
from torchxihe.data.store import (
    SPLITS,
    Prepared,
    SourceRows,
    check_vocab_size,
    digest,
    open_prepared,
    places_of,
    recipe_path,
)
from torchxihe.data.tokenizer import CHAT_TEMPLATE_FILE, read_meta
from torchxihe.errors import UserError
from torchxihe.utils.files import hash_stream, locked, read_json, write_json
from torchxihe.utils.words import counted

SAMPLED_SHARDS = 64
"""Shards of a source at most that a tokenizer's training text is taken from."""


@dataclass(frozen=True)
class Plan:
    """What is to be done for one source."""

    key: str
    """"data.sources.N" or "validation.sets.N", for messages."""
    name: str
    source: Documents
    fraction: float
    """Share of the documents that is held out. 1: a validation set."""
    shards: list[list[Piece]]
    files: list[list[Any]]
    """Path, size and modification time (ns) of the token files that are used where they lie, one a shard."""
    identity: str
    """Changes with every byte that is read and with the template."""
    chat: bool
    """Whether rows are conversations."""


def prepare(config: Config) -> Prepared:
    """Make everything that training with `config` reads, unless it is there already, and say a line per source.

    A second process that prepares in the same cache waits for the first. Raises UserError.
    """
    cache = Path(config.data.cache_dir)
    with _writing(cache), _alone(cache / "prepare.lock"):
        plans = make_plans(config, cache)
        tokenizer = _tokenizer(config, plans, cache)
        stores = [_store(plan, config, tokenizer, cache) for plan in plans]
        _refuse_twins(plans, stores)
        manifests = _encode(plans, stores, config, tokenizer)
        for store, manifest in zip(stores, manifests, strict=True):
            write_row_index(store, manifest, config)
        path = recipe_path(config)
        path.parent.mkdir(exist_ok=True)
        recipe = {
            "tokenizer": tokenizer.name,
            "places": places_of(config),
            "names": [plan.name for plan in plans],
            "stores": [store.name for store in stores],
            "files": [plan.files[: len(m["shards"])] for plan, m in zip(plans, manifests, strict=True)],
        }
        write_json(path, recipe)
    prepared = open_prepared(config)
    _check(config, prepared)
    for source in prepared.held_out:
        print(_summary(source), flush=True)
    return prepared


def prepare_part(config: Config, part: int, parts: int) -> None:
    """Encode every `parts`-th shard from `part` (counted from 0) on, so that many machines can share the work.

    When all parts are done, `prepare` finds the shards and only has to write the manifests.
    """
    cache = Path(config.data.cache_dir)
    with _writing(cache):
        with _alone(cache / "prepare.lock"):
            plans = make_plans(config, cache)
            tokenizer = _tokenizer(config, plans, cache)
        stores = [_store(plan, config, tokenizer, cache) for plan in plans]
        with _alone(cache / f"prepare-{part}-of-{parts}.lock"):
            jobs = _jobs(plans, stores, config, tokenizer)
            mine = [[job for job in jobs[i] if int(job.name) % parts == part] for i in range(len(plans))]
            count = sum(1 for _ in run_jobs(mine))
    print(f"part {part} of {parts}: {count} shards are done; after the last part, run `torchxihe prepare CONFIG` once")


def make_plans(config: Config, cache: Path) -> list[Plan]:
    """Look at all sources and validation sets: which files, in which shards. Raises UserError."""
    plans: list[Plan] = []
    chat = config.data.format == "chat"
    for key, source in documents_of(config):
        with _reading(key, source.path):
            pieces = find_pieces(source, key)
            shards = cut_shards(pieces)
        known = _hash_files([path for piece in pieces for path in _files_of(piece)], key, cache)
        content = [[p.format, *([known[path][2] for path in _files_of(p)] or [[p.path, p.revision]])] for p in pieces]
        files = [[os.path.abspath(p.path), *known[p.path][:2]] for p in pieces if p.format == "tokens"]
        what = ["chat", source.messages] if chat else Template(source.template).parts
        identity = digest([content, what, source.subset, source.split])
        name = source_name(source)
        while any(plan.name == name for plan in plans):
            name += "-2"
        fraction = config.validation.fraction if key.startswith("data.") else 1.0
        plans.append(Plan(key, name, source, fraction, shards, files, identity, chat))
    return plans


def _files_of(piece: Piece) -> list[str]:
    """The files that its documents follow from: of Megatron's tokens also the index beside them."""
    index = Path(piece.path).with_suffix(".idx")
    if piece.format == "tokens" and index.exists():
        return [piece.path, str(index)]
    return [] if piece.format == "stream" else [piece.path]


def _hash_files(paths: list[str], key: str, cache: Path) -> dict[str, list[Any]]:
    """Size, modification time and xxh3_128 of each file; the hash is remembered by path and the other two."""
    memory = cache / "hashes.json"
    known = read_json(memory) or {}
    found, changed = {}, False
    for path in paths:
        with _reading(key, path):
            stat = os.stat(path)
            entry = known.get(os.path.abspath(path))
            if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
                entry, changed = [stat.st_size, stat.st_mtime_ns, _hash_file(path)], True
                known[os.path.abspath(path)] = entry
            found[path] = entry
    if changed:
        write_json(memory, known)
    return found


def _hash_file(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hash_stream(file)[1]


def _tokenizer(config: Config, plans: list[Plan], cache: Path) -> Path:
    """The tokenizer's folder; trains it if need be, on the sources alone."""
    plans = [plan for plan in plans if plan.fraction < 1]
    share = config.tokenizer.train_bytes // len(plans)
    for plan in plans:
        if plan.shards[0][0].format == "tokens" and not config.tokenizer.path:
            raise UserError(f"tokenizer.path: must name the tokenizer that {plan.key} was encoded with")
    sample = (text for plan in plans for text in _sample(plan, share))
    key = digest([[plan.identity for plan in plans], share])
    folder = obtain(config.tokenizer, cache, sample, key, config.data.format == "chat")
    check_vocab_size(config, read_meta(folder)["vocab_size"])
    if config.data.format == "chat":
        Chat(folder)  # what is wrong with it is better said here than by every worker
    return folder


def _sample(plan: Plan, most: int) -> Iterator[str]:
    """Documents of a source, `most` bytes in all, from shards spread evenly over it, none of them very long."""
    template = Template(plan.source.template)
    columns = [plan.source.messages] if plan.chat else template.columns

    def text_of(row: Row) -> str:
        if not plan.chat:
            return template.text(row)[0]
        return "\n".join(message["content"] for message in read_messages(row, plan.source.messages)[0])

    count = min(len(plan.shards), SAMPLED_SHARDS)
    share = most // count
    for i in range(count):
        left = share
        for piece in plan.shards[i * len(plan.shards) // count]:
            for row in read_rows(piece, columns, plan.source, plan.key):
                text = text_of(row)
                text = text[: max(1, share // 4)].encode("utf-8", "ignore")[:left].decode("utf-8", "ignore")
                left -= len(text.encode())
                if text:
                    yield text
                if left <= 0:
                    break
            if left <= 0:
                break


def _store(plan: Plan, config: Config, tokenizer: Path, cache: Path) -> Path:
    """The store's folder, named by all that its bytes depend on."""
    key = {
        "source": plan.identity,
        "max_tokens": plan.source.max_tokens,
        "tokenizer": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        "ends": {k: v for k, v in read_meta(tokenizer).items() if k != "vocab_size"},
        "validation": plan.fraction,
    }
    if plan.chat:
        key["chat_template"] = (tokenizer / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    return cache / "stores" / digest(key)


def _refuse_twins(plans: list[Plan], stores: list[Path]) -> None:
    for i, plan in enumerate(plans):
        for j, before in enumerate(plans[:i]):
            if stores[i] == stores[j]:
                remedy = "give one of them more weight" if plan.fraction < 1 else "remove one of them"
                raise UserError(f"{plan.key}: the same documents as {before.key}; {remedy}")
            if plan.identity == before.identity and plan.fraction != before.fraction:
                raise UserError(f"{plan.key}: the same documents as {before.key}, which are trained on; take others")


def _jobs(plans: list[Plan], stores: list[Path], config: Config, tokenizer: Path) -> list[list[Job]]:
    """A job a shard, by source."""
    meta = read_meta(tokenizer)
    return [
        [
            Job(
                key=plan.key,
                source=plan.source,
                pieces=pieces,
                store=store,
                name=f"{i:05}",
                dtype="<u2" if meta["vocab_size"] <= 2**16 else "<u4",
                tokenizer=tokenizer,
                eos_id=meta["eos_id"],
                bos_id=meta["bos_id"],
                fraction=plan.fraction,
                max_bad_rows=_max_bad_rows(config),
                max_tokens=plan.source.max_tokens,
                chat=plan.chat,
            )
            for i, pieces in enumerate(plan.shards)
        ]
        for plan, store in zip(plans, stores, strict=True)
    ]


def _encode(plans: list[Plan], stores: list[Path], config: Config, tokenizer: Path) -> list[dict[str, Any]]:
    """The sources' manifests; encodes what is missing."""
    ready = [read_json(store / "manifest.json") for store in stores]
    all_jobs = _jobs(plans, stores, config, tokenizer)
    jobs = [[] if manifest else all_jobs[i] for i, manifest in enumerate(ready)]
    entries: list[list[dict[str, Any]]] = [[] for _ in plans]
    for i, entry in run_jobs(jobs):
        entries[i].append(entry)
    manifests = []
    for plan, store, manifest, shards in zip(plans, stores, ready, entries, strict=True):
        known = manifest
        manifest = known or _sum_up(store, shards)
        _check_documents(plan, manifest, _max_bad_rows(config))
        if not known:
            _commit(store, manifest)
        manifests.append(manifest)
    return manifests


def _max_bad_rows(config: Config) -> float:
    """Share of bad rows that is skipped; -1: none."""
    return config.data.max_bad_rows if config.data.on_bad_rows == "skip" else -1.0


def _sum_up(store: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a store of these shards."""
    sums = {split: Counter[str]() for split in SPLITS}
    dropped, bad, examples, rows = Counter[str](), Counter[str](), {}, 0
    for shard in shards:
        for split in SPLITS:
            sums[split].update(shard[split])
        dropped.update(shard["dropped"])
        bad.update(shard["bad"])
        examples = shard["examples"] | examples
        rows += shard["rows"]
    return {
        "key": store.name,
        "dtype": shards[0]["dtype"],
        **sums,
        "rows": rows,
        "dropped": dropped,
        "bad": bad,
        "examples": examples,
        "shards": shards,
    }


def _check_documents(plan: Plan, manifest: dict[str, Any], max_bad_rows: float) -> None:
    """Raise UserError if the source as a whole is no good."""
    rows = manifest["rows"]
    check_bad_rows(plan.key, Counter(manifest["bad"]), rows, max_bad_rows, manifest["examples"])
    wanted = "valid" if plan.fraction == 1 else "train"
    if not manifest[wanted]["documents"]:
        held_out = manifest["valid"]["documents"]
        why = "".join(f", {count} {reason}" for reason, count in manifest["dropped"].items())
        why += f"; all {held_out} documents are held out" if held_out else ""
        purpose = "validate" if plan.fraction == 1 else "train"
        raise UserError(
            f"{plan.key}.path: {plan.source.path}: no documents to {purpose} on in {counted(rows, 'row')}{why}"
        )
    if len({shard["dtype"] for shard in manifest["shards"]}) > 1:
        raise UserError(f"{plan.key}.path: {plan.source.path}: token files of different widths; make them two sources")


def _commit(store: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, which makes the store whole; remove what does not belong to it.

    That is shards beyond `max_tokens` which were under way, and what a kill has left.
    """
    ours = {name for shard in manifest["shards"] for name in (f"{shard['name']}.json", *shard["xxh3_128"])}
    for file in store.iterdir():
        if file.is_file() and file.name not in ours:
            file.unlink()
    write_json(store / "manifest.json", manifest)


def _check(config: Config, prepared: Prepared) -> None:
    """What is only known now: whether there is something to validate on, and enough for the run."""
    if config.validation.every and not any(source.valid_rows for source in prepared.held_out):
        fraction = f"validation.fraction: {config.validation.fraction:g} holds out no document of so few"
        remedy = "raise it"
        if sum(source.documents for source in prepared.sources) == 1:  # raised, it would hold out the only one
            remedy = 'make each line a document (data.sources.0.format = "lines"), name [[validation.sets]]'
        raise UserError(f"{fraction}; {remedy}, or set validation.every = 0")
    if not (config.run_dir / "config.toml").exists():  # a run that goes on has stages that only it knows
        check_epochs(config, prepared, Order(plan_stages(config, prepared), prepared.rows))


def _summary(source: SourceRows) -> str:
    """A line about a source."""
    dropped = "".join(f", {count} dropped ({why})" for why, count in source.dropped.items())
    learned = "" if source.targets == source.tokens else f", {source.targets / source.tokens:.0%} of them learned"
    return (
        f"{source.name}: {counted(source.documents, 'document')}, {counted(source.tokens, 'token')}{learned}, "
        f"{source.bytes / source.tokens:.2f} bytes per token; {counted(source.train_rows, 'row')} to train on, "
        f"{source.valid_rows:,} held out{dropped}"
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


def _alone(path: Path) -> AbstractContextManager[str]:
    """Hold `path`; waits for whoever holds it, and says for whom."""
    return locked(path, lambda holder: print(f"{path}: waiting for {holder}", flush=True))


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    """Errors of the disk below are not the cache's, but of a source: `key`, "data.sources.N", at `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}.path: {error.filename or path}: {error.strerror or error}") from error
