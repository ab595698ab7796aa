"""`[[validation.sets]]`: documents that are only validated on, each set under its name."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.unit.saved_runs import write_training
from tests.unit.test_watch import losses, train
from torchxihe.__main__ import run
from torchxihe.components.checkpoint.manifest import read_manifest
from torchxihe.components.checkpoint.saved_run import load_decoder, open_saved
from torchxihe.components.checkpoint.storage import Location
from torchxihe.components.observe.metrics import METRICS, read_metrics
from torchxihe.components.validation import FEW_ROWS, warn_of_few_rows
from torchxihe.config.load import load_config
from torchxihe.data.loader import validation_rows
from torchxihe.data.store import open_prepared
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.errors import UserError

POEMS = [f"no fox, no dog: {'the quick brown ' * (i % 3)}poem number {i} of many" for i in range(40)]
NOTES = [f"a note {i}" for i in range(5)]


def write(root: Path, *, fraction: str = "0.1", max_tokens: str = "1_000_000") -> Path:
    """A config with two sets beside its two sources."""
    for name, lines in (("poems", POEMS), ("notes", NOTES)):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    sets = ", ".join(
        f'{{path = "{root}/{name}.txt", name = "{name}", format = "lines"}}' for name in ("poems", "notes")
    )
    path = write_training(root, validation=f"sets = [{sets}]\nmax_tokens = {max_tokens}")
    path.write_text(path.read_text().replace("fraction = 0.1", f"fraction = {fraction}"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(write(tmp_path_factory.mktemp("sets")))


def last_validation(run_dir: Path) -> dict[str, float]:
    return read_metrics(run_dir / METRICS)[1][-1]


def test_every_set_has_loss_perplexity_and_bpb(trained: Path, tmp_path: Path) -> None:
    """And they change neither the training nor the loss on what the sources hold out."""
    found = last_validation(trained)
    for name in ("", "a/", "b/", "poems/", "notes/"):
        loss = found[f"validation/{name}loss"]
        assert found[f"validation/{name}perplexity"] == pytest.approx(math.exp(loss))
        assert found[f"validation/{name}bpb"] > 0
    plain = train(write_training(tmp_path))
    assert losses(plain) == losses(trained)
    alone = {key: value for key, value in last_validation(plain).items() if key != "time"}
    assert alone == {key: found[key] for key in alone}
    text = (trained / "logs" / "rank-00000.log").read_text()
    assert f"poems {found['validation/poems/loss']:.4f}, notes {found['validation/notes/loss']:.4f})" in text
    assert "poems: 40 documents" in text and "all held out" in text


@torch.no_grad()
@pytest.mark.parametrize(("name", "documents"), [("poems", POEMS), ("notes", NOTES)])
def test_it_is_the_loss_of_the_documents_one_by_one(trained: Path, name: str, documents: list[str]) -> None:
    """The slow reference: each document alone, in windows as the rows cut it, full logits."""
    saved = open_saved(trained)
    model, tokenizer = load_decoder(saved, torch.device("cpu"), torch.float32), load_tokenizer(saved.tokenizer_dir)
    total, targets, size = 0.0, 0, 0
    for text in documents:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, len(ids), 33):  # a row holds seq_len + 1 tokens
            piece = torch.tensor([ids[start : start + 33]])
            if piece.shape[1] > 1:
                total += F.cross_entropy(model(piece[:, :-1])[0], piece[0, 1:], reduction="sum").item()
                targets += piece.shape[1] - 1
                size += sum(len(tokenizer.decode([i]).encode()) for i in piece[0, 1:].tolist() if i != tokenizer.eos_id)
    found = last_validation(trained)
    assert found[f"validation/{name}/loss"] == pytest.approx(total / targets, rel=1e-5)
    assert found[f"validation/{name}/bpb"] == pytest.approx(total / size / math.log(2), rel=1e-5)


def test_eval_measures_them_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["eval", str(trained), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result == pytest.approx({key: last_validation(trained)[key] for key in result}, rel=1e-6)
    run(["eval", str(trained)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "validation",
        "sources",
        *"ab",
        "poems",
        "notes",
    ]


def test_data_shows_them(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["data", str(trained.parent / "train.toml")])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["notes"][1] == "5" and rows["notes"][4] == "0" and int(rows["notes"][5]) > 0  # rows, held out


def test_alone_they_are_the_validation_loss(tmp_path: Path) -> None:
    found = last_validation(train(write(tmp_path, fraction="0.0")))
    poems, notes = found["validation/poems/loss"], found["validation/notes/loss"]
    assert min(poems, notes) < found["validation/loss"] < max(poems, notes)
    assert "validation/a/loss" not in found


def test_the_tokenizer_and_the_rows_of_training_know_nothing_of_them(trained: Path, tmp_path: Path) -> None:
    plain = write_training(tmp_path)
    run(["prepare", str(plain)])
    with_sets, without = open_prepared(load_config(trained.parent / "train.toml")), open_prepared(load_config(plain))
    assert with_sets.tokenizer_dir.name == without.tokenizer_dir.name
    assert with_sets.rows == without.rows
    assert [documents.train_rows for documents in with_sets.sets] == [0, 0] and without.sets == ()


def test_max_tokens_counts_for_each_set(tmp_path: Path) -> None:
    path = write(tmp_path, max_tokens="96")  # three rows
    run(["prepare", str(path)])
    rows = validation_rows(open_prepared(load_config(path)), 32, 96)
    per = [sum(place == i for place, _ in rows) for i in range(4)]
    assert per[0] + per[1] == 3 and per[2] == 3 and 1 <= per[3] <= 3
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("a.txt", "validation.sets.1: the same documents as data.sources.0, which are trained on"),
        ("poems.txt", "validation.sets.1: the same documents as validation.sets.0"),
        ("empty.txt", "validation.sets.1.path: .*empty.txt: no documents to validate on in 3 rows"),
    ],
)
def test_sets_that_cannot_be(tmp_path: Path, path: str, why: str) -> None:
    config = write(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n\n")
    with pytest.raises(UserError, match=why):
        run(["prepare", str(config), f"--validation.sets.1.path={tmp_path}/{path}"])


def test_the_best_is_decided_by_what_the_user_names(tmp_path: Path) -> None:
    """The checkpoints that are kept, and the loss in their manifests. Seen to fail without the option: the few rows
    that the sources hold out decided."""
    path = write(tmp_path)
    flags = ("--checkpoint.every=3", "--checkpoint.keep_best=1", "--validation.every=3")
    for best_by, key in (("sources", "validation/loss"), ("poems", "validation/poems/loss")):
        name = f"--run.name={best_by}"
        run_dir = train(path, *flags, name, f"--checkpoint.best_by={best_by}")
        for line in read_metrics(run_dir / METRICS)[1]:
            step = Location(run_dir / "checkpoints" / f"step-{int(line['step']):08d}")
            assert read_manifest(step).validation_loss == line[key]
        best = min(read_metrics(run_dir / METRICS)[1], key=lambda line: line[key])
        of = "" if best_by == "sources" else " of poems"
        log = (run_dir / "logs" / "rank-00000.log").read_text()
        assert f"best{of} {best[key]:.4f} at step {int(best['step'])}" in log


def test_a_warning_where_few_rows_decide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail as it was, silent. And there is none where there are many, or where nothing is validated."""
    path = write(tmp_path, fraction="0.05")
    flags = ["--training.steps=3", "--metrics.sample_tokens=0"]
    run(["prepare", str(path)])
    prepared, config = open_prepared(load_config(path)), load_config(path, flags)
    rows = sum(source.valid_rows for source in prepared.sources)
    assert 1 < rows < FEW_ROWS
    warn_of_few_rows(config, prepared)
    assert f"only {rows} rows of the sources are held out: validation/loss is noisy" in caplog.text
    caplog.clear()
    warn_of_few_rows(load_config(path, [*flags, "--checkpoint.best_by=notes"]), prepared)
    assert "rows of notes are held out: validation/notes/loss is noisy" in caplog.text
    caplog.clear()
    warn_of_few_rows(load_config(path, [*flags, "--validation.every=4"]), prepared)
    many = [replace(source, summary=source.summary.model_copy()) for source in prepared.sources] * 20
    warn_of_few_rows(config, replace(prepared, sources=tuple(many)))
    assert not caplog.text


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--checkpoint.best_by=poem", r"checkpoint.best_by.*of validation.sets \(poems, notes\), got 'poem'"),
        ("--validation.sets.0.name=sources", '"sources" means all documents held out'),
        ("--data.sources.0.name=sources", '"sources" means all documents held out'),
    ],
)
def test_what_decides_has_a_name(tmp_path: Path, flag: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_config(write(tmp_path), [flag])


def test_alone_the_sets_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = train(write(tmp_path, fraction="0.0"))
    capsys.readouterr()
    run(["eval", str(run_dir)])
    assert capsys.readouterr().out.splitlines()[1].startswith("all sets ")


def test_names_differ(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation.sets.0.name: two sources or sets are named 'b'; names must differ"):
        load_config(write(tmp_path), ["--validation.sets.0.name=b"])
