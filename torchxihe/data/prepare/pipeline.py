"""From documents to a token store: once, on every core, resumable, with the same bytes on any machine.

A source's inputs are cut into shards by their sizes alone. One process reads, encodes and commits a shard (encode.py),
independently of the others. So a killed run resumes where it was, several machines can share the work, and the
manifest, written last, is the same in any case. Files that are missing, truncated or damaged are made again.

`datasets` and the tokenizer libraries are imported by the functions that need them (sources.py, tokenizer.py):
training reads stores and does not import them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchxihe.config.options import Config, Documents
from torchxihe.data.expected import expected_of_store
from torchxihe.data.manifests import (
    SPLITS,
    Counts,
    Hashes,
    InPlaceFile,
    InputFile,
    Manifest,
    Recipe,
    Shard,
    find_sealed,
    write_sealed,
)
from torchxihe.data.order import Order, check_epochs, plan_stages
from torchxihe.data.prepare.chat import ASSISTANT, Chat
from torchxihe.data.prepare.conversations import columns_of, read_conversation
from torchxihe.data.prepare.encode import Job, check_bad_rows, run_jobs
from torchxihe.data.prepare.obtain_tokenizer import obtain
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.row_index import write_row_index
from torchxihe.data.prepare.rows import Columns, Piece, Row, Template
from torchxihe.data.prepare.sources import cut_shards, find_pieces, source_name
from torchxihe.data.store import (
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
from torchxihe.utils.files import hash_stream, locked
from torchxihe.utils.words import counted

SAMPLED_SHARDS = 64
"""Shards of a source from which a tokenizer's training text is taken, at most."""


@dataclass(frozen=True)
class Plan:
    """The work for one source."""

    key: str
    """"data.sources.N" or "validation.sets.N", for messages."""
    name: str
    source: Documents
    fraction: float
    """Share of the documents that is held out. 1: a validation set."""
    shards: list[list[Piece]]
    files: tuple[InPlaceFile, ...]
    """The token files that are used in place, one a shard."""
    identity: str
    """Changes with every byte that is read and with the template."""
    chat: bool
    """Whether rows are conversations."""


def prepare(config: Config) -> Prepared:
    """Make everything that training with `config` reads, unless it exists already, and print a line per source.

    A second process that prepares in the same cache waits for the first. With `data.remote`, nothing is made: what is
    there must be complete. Raises UserError.
    """
    if not config.data.remote:
        _make(config)
    prepared = open_prepared(config)
    _check(config, prepared)
    for source in prepared.held_out:
        print(_summary(source), flush=True)
    return prepared


def _make(config: Config) -> None:
    """Make everything below `data.cache_dir`, unless it exists already."""
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
        recipe = Recipe(
            tokenizer=tokenizer.name,
            places=tuple(places_of(config)),
            names=tuple(plan.name for plan in plans),
            stores=tuple(store.name for store in stores),
            files=tuple(plan.files[: len(m.shards)] for plan, m in zip(plans, manifests, strict=True)),
        )
        write_sealed(path, recipe)


def prepare_part(config: Config, part: int, parts: int) -> None:
    """Encode every `parts`-th shard from `part` (counted from 0), so that many machines can share the work.

    After all parts, `prepare` finds the shards and only writes the manifests and row indexes.
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
    """The files of all sources and validation sets, and their shards. Raises UserError."""
    plans: list[Plan] = []
    chat = config.data.format == "chat"
    for key, source in config.documents:
        with _reading(key, source.path):
            pieces = find_pieces(source, key)
            shards = cut_shards(pieces)
        known = _hash_files([path for piece in pieces for path in _files_of(piece)], key, cache)
        content = [
            [p.reader, *([known[path].xxh3_128 for path in _files_of(p)] or [[p.path, p.revision]])] for p in pieces
        ]
        files = tuple(
            InPlaceFile(path=os.path.abspath(p.path), **known[p.path].model_dump())
            for p in pieces
            if p.format == "tokens"
        )
        what = ["chat", source.messages] if chat else Template(source.template).parts
        identity = digest([content, what, source.subset, source.split])
        name = source_name(source)
        while any(plan.name == name for plan in plans):
            name += "-2"
        fraction = config.validation.fraction if key.startswith("data.") else 1.0
        plans.append(Plan(key, name, source, fraction, shards, files, identity, chat))
    return plans


def _files_of(piece: Piece) -> list[str]:
    """The files that determine its documents: of Megatron's tokens also the index beside them."""
    index = Path(piece.path).with_suffix(".idx")
    if piece.format == "tokens" and index.exists():
        return [piece.path, str(index)]
    return [] if piece.format == "stream" else [piece.path]


def _hash_files(paths: list[str], key: str, cache: Path) -> dict[str, InputFile]:
    """Size, modification time and hash of each file; hashes.json has the hash of what was hashed before."""
    memory = cache / "hashes.json"
    remembered = find_sealed(memory, Hashes)
    known = dict(remembered.files) if remembered else {}
    found, changed = {}, False
    for path in paths:
        with _reading(key, path):
            stat = os.stat(path)
            entry = known.get(os.path.abspath(path))
            if entry is None or (entry.size, entry.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                entry = InputFile(size=stat.st_size, mtime_ns=stat.st_mtime_ns, xxh3_128=_hash_file(path))
                known[os.path.abspath(path)], changed = entry, True
            found[path] = entry
    if changed:
        write_sealed(memory, Hashes(files=known))
    return found


def _hash_file(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hash_stream(file)[1]


def _tokenizer(config: Config, plans: list[Plan], cache: Path) -> Path:
    """The tokenizer's folder; trains it if necessary, on the sources without the validation sets."""
    plans = [plan for plan in plans if plan.fraction < 1]
    share = config.tokenizer.train_bytes // len(plans)
    for plan in plans:
        if plan.shards[0][0].format == "tokens" and not config.tokenizer.path:
            raise UserError(f"tokenizer.path: must name the tokenizer that {plan.key} was encoded with")
    sample = (text for plan in plans for text in _sample(plan, share))
    key = digest([[plan.identity for plan in plans], share])
    folder = obtain(config.tokenizer, cache, sample, key, config.data.format == "chat")
    check_vocab_size(config, read_meta(folder).vocab_size)
    if config.data.format == "chat":
        Chat(folder, config.data.loss_roles)  # reports an unusable template once, rather than in every worker
    return folder


def _sample(plan: Plan, most: int) -> Iterator[str]:
    """Texts of a source's documents, `most` bytes in total, from shards spread evenly over it; long ones are cut."""
    template = Template(plan.source.template)
    columns = columns_of(plan.source.messages) if plan.chat else Columns(template.columns)

    def text_of(row: Row) -> str:
        if not plan.chat:
            return template.text(row)[0]
        return "\n".join(message["content"] for message in read_conversation(row, plan.source.messages)[0].messages)

    count = min(len(plan.shards), SAMPLED_SHARDS)
    share = most // count
    for i in range(count):
        left = share
        for piece in plan.shards[i * len(plan.shards) // count]:
            for row in read_rows(piece, columns.needed, plan.source, plan.key, columns.optional):
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
    """The store's folder, named by a key of everything that its bytes depend on."""
    meta = read_meta(tokenizer)
    key = {
        "source": plan.identity,
        "max_tokens": plan.source.max_tokens,
        "tokenizer": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
        "ends": {"eos_id": meta.eos_id, "bos_id": meta.bos_id},
        "validation": plan.fraction,
    }
    if plan.chat:
        key["chat_template"] = (tokenizer / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        if config.data.loss_roles != (ASSISTANT,):
            key["loss_roles"] = sorted(set(config.data.loss_roles))
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
    """One job per shard, by source."""
    meta = read_meta(tokenizer)
    return [
        [
            Job(
                key=plan.key,
                source=plan.source,
                pieces=pieces,
                store=store,
                name=f"{i:05}",
                dtype="<u2" if meta.vocab_size <= 2**16 else "<u4",
                tokenizer=tokenizer,
                eos_id=meta.eos_id,
                bos_id=meta.bos_id,
                fraction=plan.fraction,
                max_bad_rows=_max_bad_rows(config),
                max_tokens=plan.source.max_tokens,
                roles=config.data.loss_roles if plan.chat else (),
            )
            for i, pieces in enumerate(plan.shards)
        ]
        for plan, store in zip(plans, stores, strict=True)
    ]


def _encode(plans: list[Plan], stores: list[Path], config: Config, tokenizer: Path) -> list[Manifest]:
    """The sources' manifests; encodes the shards that are missing or have files of the wrong size."""
    known = [find_sealed(store / "manifest.json", Manifest) for store in stores]
    ready = [_is_complete(store, manifest) for store, manifest in zip(stores, known, strict=True)]
    all_jobs = _jobs(plans, stores, config, tokenizer)
    entries: list[list[Shard]] = [[] for _ in plans]
    for i, entry in run_jobs([[] if ready[i] else jobs for i, jobs in enumerate(all_jobs)]):
        entries[i].append(entry)
    manifests = []
    for i, (plan, store) in enumerate(zip(plans, stores, strict=True)):
        before = known[i]
        manifest = before if before and ready[i] else _sum_up(store, entries[i])
        _check_documents(plan, manifest, _max_bad_rows(config))
        if before and before != manifest:
            raise UserError(
                f"{store}: its shards were encoded again to other tokens than before (another version of a library?), "
                f"which would change the data of a running experiment; delete {store} and run prepare again to accept"
            )
        if not ready[i]:
            _commit(store, manifest)
        manifests.append(manifest)
    return manifests


def _is_complete(store: Path, manifest: Manifest | None) -> bool:
    """Whether the files of a store exist and have the right sizes."""
    if manifest is None or manifest.key != store.name:
        return False
    try:
        for file in expected_of_store(store, manifest):
            file.check_size()
    except UserError:
        return False
    return True


def _max_bad_rows(config: Config) -> float:
    """Share of bad rows that may be skipped; -1: none."""
    return config.data.max_bad_rows if config.data.on_bad_rows == "skip" else -1.0


def _sum_up(store: Path, shards: list[Shard]) -> Manifest:
    """The manifest of a store of these shards."""
    sums = {
        split: Counts(**{name: sum(getattr(s.counts(split), name) for s in shards) for name in Counts.model_fields})
        for split in SPLITS
    }
    dropped, bad, examples = Counter[str](), Counter[str](), {}
    for shard in shards:
        dropped.update(shard.dropped)
        bad.update(shard.bad)
        examples = shard.examples | examples
    return Manifest(
        key=store.name,
        dtype=shards[0].dtype,
        train=sums["train"],
        valid=sums["valid"],
        rows=sum(shard.rows for shard in shards),
        dropped=dict(dropped),
        bad=dict(bad),
        examples=examples,
        shards=tuple(shards),
    )


def _check_documents(plan: Plan, manifest: Manifest, max_bad_rows: float) -> None:
    """Raise UserError if the source has too many bad rows or no documents for its purpose."""
    check_bad_rows(plan.key, Counter(manifest.bad), manifest.rows, max_bad_rows, manifest.examples)
    if not manifest.counts("valid" if plan.fraction == 1 else "train").documents:
        held_out = manifest.valid.documents
        why = "".join(f", {count} {reason}" for reason, count in manifest.dropped.items())
        why += f"; all {held_out} documents are held out" if held_out else ""
        purpose = "validate" if plan.fraction == 1 else "train"
        raise UserError(
            f"{plan.key}.path: {plan.source.path}: no documents to {purpose} on in {counted(manifest.rows, 'row')}{why}"
        )
    if len({shard.dtype for shard in manifest.shards}) > 1:
        raise UserError(f"{plan.key}.path: {plan.source.path}: token files of different widths; make them two sources")


def _commit(store: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the store complete; delete files that do not belong to it.

    Those are shards beyond `max_tokens` that were being encoded, and drafts of killed processes.
    """
    ours = {name for shard in manifest.shards for name in (f"{shard.name}.json", *shard.xxh3_128)}
    for file in store.iterdir():
        if file.is_file() and file.name not in ours:
            file.unlink()
    write_sealed(store / "manifest.json", manifest)


def _check(config: Config, prepared: Prepared) -> None:
    """Raise UserError if there is nothing to validate on, or not enough for the run."""
    if config.validation.every and not any(source.valid_rows for source in prepared.held_out):
        fraction = f"validation.fraction: {config.validation.fraction:g} holds out no document of so few"
        remedy = "raise it"
        if sum(source.documents for source in prepared.sources) == 1:  # raised, it would hold out the only one
            remedy = 'make each line a document (data.sources.0.format = "lines"), name [[validation.sets]]'
        raise UserError(f"{fraction}; {remedy}, or set validation.every = 0")
    if not (config.run_dir / "config.toml").exists():  # the stages of a run that resumes are in its checkpoint
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
    """Turn disk errors inside the block into a UserError about data.cache_dir."""
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
    """Hold the lock `path`; prints the holder's name if it has to wait."""
    return locked(path, lambda holder: print(f"{path}: waiting for {holder}", flush=True))


@contextmanager
def _reading(key: str, path: str) -> Iterator[None]:
    """Turn disk errors inside the block into a UserError about a source: `key`, "data.sources.N", at `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}.path: {error.filename or path}: {error.strerror or error}") from error
