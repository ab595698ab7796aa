import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_corpus import make_config, write_texts
from torchxihe.config.options import Config
from torchxihe.data.loader import (
    IGNORE,
    Batch,
    BatchSpec,
    Loader,
    micro_batch_rows,
    micro_batches,
    validation_batches,
    validation_rows,
)
from torchxihe.data.order import Order, Stage, plan_stages
from torchxihe.data.prepare import encode
from torchxihe.data.prepare import sources as sources_module
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import Prepared
from torchxihe.errors import UserError

Data = tuple[Prepared, Order]
CPU = torch.device("cpu")
SEQ_LEN = 16
WEIGHTS = {"long": 0.7, "short": 0.3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """Two sources: documents of many lengths, some longer than a row."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    sources = []
    for name, most in (("long", 60), ("short", 9)):
        texts = [" ".join(map(str, random.integers(0, 9, random.integers(1, most)))) for _ in range(400)]
        sources.append({**write_texts(folder / f"{name}.jsonl", texts), "name": name, "weight": WEIGHTS[name]})
    return folder, sources


@pytest.fixture(scope="module", params=["best_fit", "concat"])
def data(request: pytest.FixtureRequest, corpus: tuple[Path, list[dict[str, object]]]) -> Data:
    folder, sources = corpus
    config = make_config(
        folder / "cache", *sources, seq_len=SEQ_LEN, data={"packing": request.param}, validation={"fraction": 0.1}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "SMALLEST_SHARD", 3000)  # several shards a source
        patch.setattr(encode, "_cores", lambda: 1)
        prepared = prepare(config)
    return prepared, Order(plan_stages(config, prepared), prepared.rows)


def global_batches(prepared: Prepared, config: Config, starts: dict[int, int], most: int) -> list[str]:
    """sha256 of each step's global batch, put together from what the ranks' loaders give; `starts`: at which steps the
    run begins and goes on, from what a checkpoint would tell of its stages, and with how many ranks."""
    hashes, saved = [], ()
    total = config.total_steps
    for (start, world_size), end in zip(starts.items(), [*list(starts)[1:], total], strict=True):
        stages = plan_stages(config, prepared, saved, start)
        saved = [Stage.from_json(json.loads(json.dumps(stage.to_json()))) for stage in stages]
        order = Order(stages, prepared.rows)
        micro_batch = micro_batch_rows(config.training.global_batch_size, world_size, most)
        loaders = [
            Loader(prepared, order, BatchSpec(SEQ_LEN, micro_batch, CPU, True, rank, world_size), start)
            for rank in range(world_size)
        ]
        for step in range(start, end):
            rows = {}
            g, count = order.batch(step)
            assert count == config.batch_size(step)
            for rank, loader in enumerate(loaders):
                for i in range(micro_batches(count, world_size, micro_batch)):
                    batch = next(loader)
                    assert batch.tokens.shape == (micro_batch, SEQ_LEN)  # whatever the step's batch: no recompilation
                    j = (i * world_size + rank) * micro_batch
                    expected = [g + n if n < count else -1 for n in range(j, j + micro_batch)]
                    assert batch.samples == tuple(expected)
                    for b, n in enumerate(batch.samples):
                        if n >= 0:
                            assert n not in rows
                            rows[n] = torch.cat([batch.tokens[b], batch.targets[b]]).numpy().tobytes()
                        else:
                            assert (batch.targets[b] == IGNORE).all()
            assert sorted(rows) == list(range(g, g + count))
            hashes.append(hashlib.sha256(b"".join(rows[n] for n in sorted(rows))).hexdigest())
        for loader in loaders:
            loader.close()
    return hashes


RANKS = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=25, deadline=None)
@given(
    starts=st.dictionaries(st.integers(1, 8), RANKS, max_size=2),
    first_ranks=RANKS,
    most=st.integers(1, 6),
    ramp=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), max_size=3),
)
def test_global_batches_depend_on_nothing_but_the_step(
    data: Data, starts: dict[int, int], first_ranks: int, most: int, ramp: list[tuple[int, int]]
) -> None:
    """Any number of ranks, any accumulation, any batch-size ramp, any steps to go on from on other numbers of ranks."""
    until = itertools.accumulate(steps for _, steps in ramp)
    training = {
        "steps": 9,
        "global_batch_size": 7,
        "batch_ramp": [(rows, step) for (rows, _), step in zip(ramp, until, strict=True)],
    }
    config = make_config(Path("unused"), {"path": "x"}, seq_len=SEQ_LEN, training=training)
    unbroken = global_batches(data[0], config, {0: 1}, 100)
    assert len(unbroken) == 9
    assert global_batches(data[0], config, {0: first_ranks, **dict(sorted(starts.items()))}, most) == unbroken


def read_slowly(prepared: Prepared, source: int, row: int, split: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and document lengths of a row, from the files, a token at a time."""
    of = prepared.sources[source]
    shards = sorted(of.store.glob(f"{split}-*.bin"))
    assert len(shards) > 2
    tokens = np.concatenate([np.fromfile(shard, of.manifest.dtype) for shard in shards])
    starts, pieces = (np.fromfile(of.index / f"{split}.{kind}", "<i8") for kind in ("rows", "pieces"))
    row_tokens, document = [], []
    for number, (start, length) in enumerate(pieces.reshape(-1, 2)[starts[row] : starts[row + 1]].tolist()):
        row_tokens += tokens[start : start + length].tolist()
        document += [number] * length
    row_tokens += [prepared.eos_id] * (SEQ_LEN + 1 - len(row_tokens))
    document += [-1] * (SEQ_LEN + 1 - len(document))
    targets = [
        row_tokens[t + 1] if document[t] == document[t + 1] and document[t] >= 0 else IGNORE for t in range(SEQ_LEN)
    ]
    lengths = [document[:SEQ_LEN].count(d) for d in dict.fromkeys(document[:SEQ_LEN])]
    return row_tokens[:SEQ_LEN], targets, lengths


def check_rows(prepared: Prepared, batch: Batch, rows: dict[int, tuple[int, int]], split: str) -> None:
    """The batch against `read_slowly`."""
    assert batch.cu_seqlens is not None
    ends, valid = [0], 0
    for b, g in enumerate(batch.samples):
        if g < 0:
            tokens, targets, lengths = [prepared.eos_id] * SEQ_LEN, [IGNORE] * SEQ_LEN, [SEQ_LEN]
        else:
            tokens, targets, lengths = read_slowly(prepared, *rows[g], split)
            assert batch.sources[b] == rows[g][0]
        assert batch.tokens[b].tolist() == tokens
        assert batch.targets[b].tolist() == targets
        valid += sum(target != IGNORE for target in targets)
        for length in lengths:
            ends.append(ends[-1] + length)
    assert batch.cu_seqlens.tolist() == ends
    assert batch.valid == valid == int((batch.targets != IGNORE).sum())
    assert (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)


def test_batches_equal_what_lies_in_the_files(data: Data) -> None:
    prepared, order = data
    loader = Loader(prepared, order, BatchSpec(SEQ_LEN, 3, CPU, data_rank=1, data_ranks=2), step=5)
    for _ in range(40):
        batch = next(loader)
        check_rows(prepared, batch, {g: order.sample(g) for g in batch.samples if g >= 0}, "train")
    loader.close()
    assert not loader._thread.is_alive()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (3, 2), (4, 64)])
@pytest.mark.parametrize("max_tokens", [0, 40 * SEQ_LEN])
def test_validation_reads_every_held_out_row_once(
    data: Data, world_size: int, micro_batch: int, max_tokens: int
) -> None:
    prepared, _ = data
    have = [source.valid_rows for source in prepared.sources]
    seen: dict[int, tuple[int, tuple[int, ...]]] = {}
    batches = [
        list(validation_batches(prepared, BatchSpec(SEQ_LEN, micro_batch, CPU, True, rank, world_size), max_tokens))
        for rank in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    for batch in (batch for of_rank in batches for batch in of_rank):
        for b, n in enumerate(batch.samples):
            if n >= 0:
                assert n not in seen
                seen[n] = int(batch.sources[b]), tuple(batch.targets[b].tolist())
    assert min(have) > 5
    total = min(sum(have), 40) if max_tokens else sum(have)
    assert sorted(seen) == list(range(total))
    counts = [sum(source == s for source, _ in seen.values()) for s in range(len(have))]
    assert all(abs(count - total * rows / sum(have)) <= 1 for count, rows in zip(counts, have, strict=True))
    if not max_tokens:
        expected = [
            (s, tuple(read_slowly(prepared, s, r, "valid")[1])) for s in range(len(have)) for r in range(have[s])
        ]
        assert sorted(seen.values()) == sorted(expected)


def test_a_short_validation_is_spread_over_all_held_out_rows(data: Data) -> None:
    prepared, _ = data
    chosen = validation_rows(prepared, SEQ_LEN, 20 * SEQ_LEN)
    assert len(chosen) == len(set(chosen)) == 20
    for s, source in enumerate(prepared.sources):
        rows = [row for of, row in chosen if of == s]
        stride = source.valid_rows / len(rows)
        assert rows == [int(i * stride + 1e-9) for i in range(len(rows))]


def test_without_document_masks_the_targets_stay_masked(data: Data) -> None:
    prepared, order = data
    masked, plain = (Loader(prepared, order, BatchSpec(SEQ_LEN, 4, CPU, document_mask=mask)) for mask in (True, False))
    a, b = next(masked), next(plain)
    assert b.cu_seqlens is None and torch.equal(a.targets, b.targets) and torch.equal(a.tokens, b.tokens)
    masked.close(), plain.close()


def test_an_error_of_the_thread_reaches_the_training_loop(tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", write_texts(tmp_path / "a.jsonl", ["some text"] * 50))
    prepared = prepare(config)
    [file] = tmp_path.glob("cache/stores/*/train-00000.bin")
    file.write_bytes(file.read_bytes()[:100])
    loader = Loader(prepared, Order(plan_stages(config, prepared), prepared.rows), BatchSpec(SEQ_LEN, 4, CPU))
    with pytest.raises(
        UserError, match=r"train-00000.bin: damaged: (ends at byte 100|100 bytes instead of .*); delete"
    ):
        for _ in range(100):
            next(loader)
    with pytest.raises(UserError, match="train-00000.bin"):
        next(loader)
    loader.close()


def test_waiting_is_counted(data: Data) -> None:
    prepared, order = data
    loader = Loader(prepared, order, BatchSpec(SEQ_LEN, 4, CPU))
    next(loader)
    assert 0 < loader.wait_seconds < 5
    loader.close()


@pytest.mark.parametrize("document_mask", [True, False])
def test_attention_pairs_are_counted_by_documents(data: Data, document_mask: bool) -> None:
    """One by one: each input token, with itself and those before it that it may attend to; padding needs none.

    Seen to fail with whole rows counted, which gave more than 100 % MFU in long rows of short documents.
    """
    prepared, order = data
    loader = Loader(prepared, order, BatchSpec(SEQ_LEN, 3, CPU, document_mask))
    expected = 0
    for _ in range(20):
        for g in (sample for sample in next(loader).samples if sample >= 0):
            source, row = order.sample(g)
            reader = prepared.sources[source].open("train")
            lengths = reader.read(row, np.empty(SEQ_LEN + 1, reader.dtype))
            document = [i for i, length in enumerate(lengths) for _ in range(length)][:SEQ_LEN]
            expected += sum(
                not document_mask or document[q] == document[k] for q in range(len(document)) for k in range(q + 1)
            )
    waited, tokens, pairs = loader.read_counts()
    assert waited > 0 and (tokens, pairs) == (20 * 3 * SEQ_LEN, expected)
    assert loader.read_counts() == (0.0, 0, 0)
    loader.close()
