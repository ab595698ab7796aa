"""An independent reader and an independent data order, written from docs/data_format.md, against torchxihe's own.

The part above "Comparison" is pure Python and imports nothing of torchxihe: what it needs is what the page must say.
"""

import hashlib
import json
import math
import struct
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import xxhash

from tests.unit.data_corpus import make_config, write_texts
from torchxihe.config.options import Config
from torchxihe.data.loader import BatchSpec, Loader, micro_batch_rows, validation_batches, validation_rows
from torchxihe.data.order import Order, Stage, plan_stages
from torchxihe.data.prepare import row_index, sources
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import Prepared

SPLITS = ("train", "valid")
M64 = 2**64
Place = tuple[int, int]

# JSON files and keys


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    checksum = value.pop("checksum")
    assert checksum == xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode()), path
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps([3, value], sort_keys=True).encode()).hexdigest()[:32]


def store_key(source: Path, tokenizer: Path, template: list[list[str]], fraction: float) -> str:
    """Of a source of JSON lines."""
    meta = read_json(tokenizer / "torchxihe.json")
    content = [["json", xxhash.xxh3_128_hexdigest(source.read_bytes())]]
    return digest(
        {
            "source": digest([content, template, "", "train"]),
            "max_tokens": 0,
            "validation": fraction,
            "tokenizer": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest(),
            "ends": {"bos_id": meta["bos_id"], "eos_id": meta["eos_id"]},
        }
    )


def held_out(content: bytes, fraction: float) -> bool:
    hashed = hashlib.blake2b(content, digest_size=8, key=b"torchxihe validation").digest()
    return int.from_bytes(hashed, "little") < fraction * M64


# Stores


def read_integers(path: Path, kind: str) -> tuple[int, ...]:
    data = path.read_bytes()
    return struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data)


class Store:
    """One source, as its files have it."""

    def __init__(self, folder: Path, packing: str, seq_len: int) -> None:
        self.manifest = read_json(folder / "manifest.json")
        self.index_folder = folder / "rows" / f"{packing}-{seq_len}"
        self.index = read_json(self.index_folder / "index.json")
        self.key, self.seq_len = folder.name, seq_len
        assert self.manifest["key"] == folder.name
        kind, size = {"<u2": ("H", 2), "<u4": ("I", 4)}[self.manifest["dtype"]]
        self.tokens: dict[str, list[int]] = {split: [] for split in SPLITS}
        self.documents: dict[str, list[Place]] = {split: [] for split in SPLITS}
        for number, shard in enumerate(self.manifest["shards"]):
            assert shard["name"] == f"{number:05}" and read_json(folder / f"{number:05}.json") == shard
            for split in SPLITS:
                base, counts = len(self.tokens[split]), shard[split]
                places = read_integers(folder / f"{split}-{shard['name']}.idx", "q")
                tokens = folder / f"{split}-{shard['name']}.bin"
                assert tokens.stat().st_size == size * counts["tokens"] and len(places) == 2 * counts["documents"]
                self.tokens[split] += read_integers(tokens, kind)
                self.documents[split] += [(base + at, n) for at, n in zip(places[::2], places[1::2], strict=True)]
            for name, known in shard["xxh3_128"].items():
                assert xxhash.xxh3_128_hexdigest((folder / name).read_bytes()) == known
        for name, known in self.index["xxh3_128"].items():
            assert xxhash.xxh3_128_hexdigest((self.index_folder / name).read_bytes()) == known

    def rows(self, split: str) -> list[list[Place]]:
        """The pieces of each row."""
        ends = read_integers(self.index_folder / f"{split}.rows", "q")
        numbers = read_integers(self.index_folder / f"{split}.pieces", "q")
        pieces = list(zip(numbers[::2], numbers[1::2], strict=True))
        assert len(ends) == self.index[split]["rows"] + 1 and len(pieces) == self.index[split]["pieces"]
        return [pieces[start:end] for start, end in pairwise(ends)]

    def example(self, split: str, row: int, eos: int) -> tuple[list[int], list[int], list[int]]:
        """Inputs, targets, and where pieces or padding begin among the inputs."""
        tokens: list[int] = []
        masked, starts = set[int](), []
        for at, length in self.rows(split)[row]:
            masked.add(len(tokens))
            starts.append(len(tokens))
            tokens += self.tokens[split][at : at + length]
        used = len(tokens)
        masked |= set(range(used, self.seq_len + 1))
        starts.append(used)
        tokens += [eos] * (self.seq_len + 1 - used)
        targets = [-100 if t + 1 in masked else tokens[t + 1] for t in range(self.seq_len)]
        return tokens[:-1], targets, [start for start in starts if start < self.seq_len]


# Rows


def pack_concat(documents: list[Place], width: int) -> list[list[Place]]:
    rows: list[list[Place]] = []
    room = 0
    for start, length in documents:
        at = 0
        while at < length:
            if not room:
                rows.append([])
                room = width
            size = min(room, length - at)
            rows[-1].append((start + at, size))
            room -= size
            at += size
    return rows


def pack_best_fit(documents: list[Place], width: int) -> list[list[Place]]:
    pieces = [(start + at, min(width, length - at)) for start, length in documents for at in range(0, length, width)]
    rows: list[list[Place]] = []
    room: list[tuple[int, int]] = []  # of each row, and since which step it has this room
    for step, (start, length) in enumerate(sorted(pieces, key=lambda piece: -piece[1])):
        fitting = [(*room[r], r) for r in range(len(rows)) if room[r][0] >= length]
        if fitting:
            row = min(fitting)[2]
        else:
            row = len(rows)
            rows.append([])
            room.append((width, step))
        rows[row].append((start, length))
        room[row] = (room[row][0] - length, step)
    return rows


# Order


def quotas_of(weights: list[float]) -> list[int]:
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [2048 * weight / sum(exact) for weight in exact]
    quotas = [math.floor(share) for share in shares]
    left = 2048 - sum(quotas)
    for i in sorted(range(len(shares)), key=lambda i: (-(shares[i] - quotas[i]), i))[:left]:
        quotas[i] += 1
    return quotas


def pattern_of(quotas: list[int]) -> list[int]:
    places = [(Fraction(2 * k + 1, 2 * quota), i) for i, quota in enumerate(quotas) for k in range(quota)]
    return [i for _, i in sorted(places)]


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M64
    return x ^ (x >> 31)


def permute(seed: int, key: str, epoch: int, i: int, rows: int) -> int:
    a = max(1, math.isqrt(rows - 1) + 1)
    b = -(-rows // a)
    k = struct.unpack("<8Q", hashlib.sha512(f"{seed}/{key}/{epoch}".encode("ascii")).digest())
    while True:
        left, right = divmod(i, b)
        for m in (0, 2, 4, 6):
            left = (left + mix((right + k[m]) % M64) % a) % a
            right = (right + mix((left + k[m + 1]) % M64) % b) % b
        i = left * b + right
        if i < rows:
            return i


class Run:
    """The stages of a run, kept by the rules of the page."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stages: list[dict[str, Any]] = []

    def read_before(self, stage: dict[str, Any], g: int) -> dict[str, int]:
        block, p = divmod(g - stage["g"], 2048)
        before = pattern_of(stage["quotas"])[:p]
        return {
            key: stage["first"][i] + block * stage["quotas"][i] + before.count(i)
            for i, key in enumerate(stage["sources"])
        }

    def start(self, step: int, batch: int, weights: dict[str, float], ramp: list[Place], total: int) -> None:
        """Start or resume at `step`; `ramp`: (rows, until)."""
        self.stages = [stage for stage in self.stages if stage["step"] < step]
        for begin in [step, *(until for _, until in ramp if step < until < total)]:
            size = next((rows for rows, until in ramp if begin < until), batch)
            read: dict[str, int] = {}
            g = 0
            for stage, following in zip(self.stages, [*self.stages, None][1:], strict=True):
                until = following["step"] if following else begin
                g = stage["g"] + (until - stage["step"]) * stage["global_batch"]
                read |= self.read_before(stage, g)
            new = {
                "g": g,
                "step": begin,
                "global_batch": size,
                "seed": self.seed,
                "sources": list(weights),
                "quotas": quotas_of(list(weights.values())),
                "first": [read.get(key, 0) for key in weights],
            }
            same = ("global_batch", "seed", "sources", "quotas")
            if not self.stages or any(self.stages[-1][name] != new[name] for name in same):
                self.stages.append(new)

    def samples(self, step: int) -> range:
        stage = [stage for stage in self.stages if stage["step"] <= step][-1]
        first = stage["g"] + (step - stage["step"]) * stage["global_batch"]
        return range(first, first + stage["global_batch"])

    def sample(self, g: int, rows: dict[str, int]) -> tuple[str, int]:
        """Key of the source, and row."""
        stage = [stage for stage in self.stages if stage["g"] <= g][-1]
        block, p = divmod(g - stage["g"], 2048)
        pattern = pattern_of(stage["quotas"])
        source = pattern[p]
        key = stage["sources"][source]
        n = stage["first"][source] + block * stage["quotas"][source] + pattern[:p].count(source)
        epoch, i = divmod(n, rows[key])
        return key, permute(stage["seed"], key, epoch, i, rows[key])


def rows_of_validation(sizes: list[int], sets: list[int], seq_len: int, max_tokens: int) -> list[Place]:
    def chosen(have: list[int], first: int) -> list[Place]:
        total = sum(have)
        count = min(total, -(-max_tokens // seq_len)) if max_tokens else total
        ends = [count * end // max(1, total) for end in accumulate(have)]
        out = []
        for s, (rows, start, end) in enumerate(zip(have, [0, *ends], ends, strict=False)):
            out += [(first + s, k * rows // (end - start)) for k in range(end - start)]
        return out

    out = chosen(sizes, 0)
    for i, rows in enumerate(sets):
        out += chosen([rows], len(sizes) + i)
    return out


# Comparison


SEQ_LEN = 12


def words(random: Random, most: int) -> str:
    return " ".join(random.choice(["a", "of", "the", "zebra", "42", "é"]) for _ in range(random.randint(1, most)))


def corpus(folder: Path, seed: int) -> tuple[Prepared, Config, dict[str, Path]]:
    """Three sources and a validation set of random documents, in several shards and groups of packing."""
    random = Random(seed)
    made, files = [], {}
    for name, weight in zip("xyz", random.choice([(1.2, 0.3, 0.3), (0.2, 0.7, 0.1), (3.0, 1.0, 0.01)]), strict=True):
        texts = [words(random, random.choice([2, 8, 40])) for _ in range(random.randint(40, 300))]
        made.append({**write_texts(folder / f"{name}.jsonl", texts), "name": name, "weight": weight})
        files[name] = folder / f"{name}.jsonl"
    held = write_texts(folder / "set.jsonl", [words(random, 20) for _ in range(30)])
    config = make_config(
        folder / "cache", *made, seq_len=SEQ_LEN, data={"packing": random.choice(["best_fit", "concat"])},
        validation={"fraction": 0.2, "every": 5, "sets": [held]}, training={"seed": random.randrange(10**6)},
    )  # fmt: skip
    return prepare(config), config, files


@pytest.fixture(scope="module", params=range(4))
def data(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Prepared, Config, dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SMALLEST_SHARD", 2000)
        patch.setattr("torchxihe.data.prepare.encode._cores", lambda: 1)
        return corpus(tmp_path_factory.mktemp("corpus"), request.param)


def stores_of(prepared: Prepared, config: Config) -> list[Store]:
    return [Store(source.store, config.data.packing, SEQ_LEN) for source in prepared.held_out]


def test_stores_and_their_keys(data: tuple[Prepared, Config, dict[str, Path]]) -> None:
    prepared, config, files = data
    assert any(len(store.manifest["shards"]) > 2 for store in stores_of(prepared, config))
    for source, store in zip(prepared.held_out, stores_of(prepared, config), strict=True):
        path, fraction = files.get(source.name, files["x"].with_name("set.jsonl")), 0.2
        if source.name not in files:
            fraction = 1.0
        assert store.key == store_key(path, prepared.tokenizer_dir, [["", "text"]], fraction)
        texts = [json.loads(line)["text"].encode() for line in path.read_text().splitlines()]
        assert len(store.documents["valid"]) == sum(held_out(text, fraction) for text in texts)
        for split in SPLITS:
            assert all(store.tokens[split][at + n - 1] == prepared.eos_id for at, n in store.documents[split])


@pytest.mark.parametrize("group", [2**20, 50])
def test_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Of random documents, some of them longer than a row; and with groups small enough to have several."""
    monkeypatch.setattr(row_index, "AT_ONCE", group)
    for seed in range(3):
        random = Random(seed)
        texts = [words(random, random.choice([1, 3, 30])) for _ in range(180)]
        source = write_texts(tmp_path / f"{seed}.jsonl", texts)
        for packing in ("best_fit", "concat"):
            config = make_config(
                tmp_path / f"cache-{seed}", source, seq_len=SEQ_LEN, data={"packing": packing},
                validation={"fraction": 0.3},
            )  # fmt: skip
            [store] = stores_of(prepare(config), config)
            for split in SPLITS:
                documents, expected = store.documents[split], []
                groups = [documents] if packing == "concat" else [
                    documents[at : at + group] for at in range(0, len(documents), group)
                ]  # fmt: skip
                for part in groups:
                    expected += (pack_concat if packing == "concat" else pack_best_fit)(part, SEQ_LEN + 1)
                assert store.rows(split) == expected


def test_the_order_over_epochs_and_stages(data: tuple[Prepared, Config, dict[str, Path]]) -> None:
    """Random mixtures, batches and ramps, at random steps, over several epochs."""
    prepared, config, _ = data
    random = Random(config.training.seed)
    rows = {source.key: source.train_rows for source in prepared.sources}
    run, saved, step, epochs = Run(config.training.seed), (), 0, 0.0
    for _ in range(4):
        total = step + random.randint(20, 400)
        chosen = random.sample(prepared.sources, random.randint(1, 3))
        weights = {source.key: random.choice([0.1, 0.3, 0.7, 1.2, 3.0]) for source in chosen}
        ramp = [(random.randint(1, 20), step + at) for at in sorted(random.sample(range(1, 300), 2))]
        batch = random.randint(1, 40)
        training = {"steps": total, "global_batch_size": batch, "batch_ramp": ramp, "seed": config.training.seed}
        changed = make_config(Path("unused"), {"path": "x"}, seq_len=SEQ_LEN, training=training)
        mixture = tuple(type(source)(**{**source.__dict__, "weight": weights[source.key]}) for source in chosen)
        present = Prepared(**{**prepared.__dict__, "sources": mixture})
        saved = tuple(Stage.from_json(json.loads(json.dumps(s.to_json()))) for s in saved)
        saved = plan_stages(changed, present, saved, step)
        run.start(step, batch, weights, ramp, total)
        assert json.loads(json.dumps([stage.to_json() for stage in saved])) == run.stages
        order, keys = Order(saved, rows), list(rows)
        for at in random.sample(range(total), min(total, 60)):
            first, count = order.batch(at)
            assert run.samples(at) == range(first, first + count)
            for g in (first, first + count - 1):
                source, row = order.sample(g)
                assert (keys[source], row) == run.sample(g, rows)
        step = total - random.randint(0, 10)
        epochs = max(epochs, *order.epochs(step))
    assert epochs > 1


def test_batches_of_all_ranks(data: tuple[Prepared, Config, dict[str, Path]]) -> None:
    prepared, config, _ = data
    stores = {store.key: store for store in stores_of(prepared, config)}
    rows = {source.key: source.train_rows for source in prepared.sources}
    run, ranks, most = Run(config.training.seed), 3, 2
    run.start(0, 7, {source.key: source.weight for source in prepared.sources}, [], 10)
    changed = config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 7})})
    order = Order(plan_stages(changed, prepared), prepared.rows)
    per_rank = micro_batch_rows(7, ranks, most)
    loaders = [
        Loader(prepared, order, BatchSpec(SEQ_LEN, per_rank, torch.device("cpu"), True, r, ranks)) for r in range(3)
    ]
    for step in range(4):
        samples = run.samples(step)
        for i in range(-(-7 // (ranks * per_rank))):
            for r, loader in enumerate(loaders):
                batch = next(loader)
                starts = []
                for b in range(per_rank):
                    j = (i * ranks + r) * per_rank + b
                    inputs, targets, begins = [prepared.eos_id] * SEQ_LEN, [-100] * SEQ_LEN, [0]
                    if j < len(samples):
                        key, row = run.sample(samples[j], rows)
                        inputs, targets, begins = stores[key].example("train", row, prepared.eos_id)
                    assert (batch.tokens[b].tolist(), batch.targets[b].tolist()) == (inputs, targets)
                    starts += [b * SEQ_LEN + begin for begin in begins]
                assert batch.cu_seqlens is not None
                assert batch.cu_seqlens.tolist() == [*starts, per_rank * SEQ_LEN]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("max_tokens", [0, 10 * SEQ_LEN + 1])
def test_validation(data: tuple[Prepared, Config, dict[str, Path]], max_tokens: int) -> None:
    prepared, config, _ = data
    stores = stores_of(prepared, config)
    sizes = [store.index["valid"]["rows"] for store in stores]
    expected = rows_of_validation(sizes[:3], sizes[3:], SEQ_LEN, max_tokens)
    assert validation_rows(prepared, SEQ_LEN, max_tokens) == expected
    found = []
    for batch in validation_batches(prepared, BatchSpec(SEQ_LEN, 4, torch.device("cpu")), max_tokens):
        found += [batch.targets[b].tolist() for b, n in enumerate(batch.samples) if n >= 0]
    assert found == [stores[s].example("valid", row, prepared.eos_id)[1] for s, row in expected]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 100])
def test_the_permutation_is_one(rows: int) -> None:
    assert sorted(permute(3, "key", 2, i, rows) for i in range(rows)) == list(range(rows))
