"""What a running experiment's config may change to."""

from pathlib import Path

import pytest

from torchxihe.components.checkpoint.history import KINDS, History, describe_change, recorded_changes
from torchxihe.components.checkpoint.storage import Location
from torchxihe.config.load import load_config
from torchxihe.config.options import Config, Section
from torchxihe.errors import UserError

DEBUG = Path(__file__).parents[2] / "configs" / "xihe_debug.toml"


def test_every_option_has_exactly_one_kind() -> None:
    """Seen to fail with "training.seed" taken out."""
    options = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name in field.annotation.model_fields
    ]
    classed = [
        f"{section}.{name}" for kind in KINDS.values() for section, names in kind.items() for name in names.split()
    ]
    assert sorted(classed) == sorted(options)


def changes(*flags: str) -> dict[str, tuple[object, object]]:
    before = load_config(DEBUG).model_dump(mode="json")
    return recorded_changes(before, load_config(DEBUG, list(flags)))


def test_free_changes_are_not_mentioned() -> None:
    assert changes("--metrics.log_every=1", "--training.micro_batch_size=2", "--run.name=other") == {}


def test_recorded_changes_come_with_both_values() -> None:
    debug = load_config(DEBUG)
    assert changes("--optimizer.lr=0.1", "--training.global_batch_size=3") == {
        "optimizer.lr": (debug.optimizer.lr, 0.1),
        "training.global_batch_size": (debug.training.global_batch_size, 3),
    }


def test_refused_changes_are_all_named_with_a_remedy() -> None:
    with pytest.raises(UserError) as caught:
        changes("--model.hidden_size=128", "--training.seed=5", "--optimizer.lr=0.1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("model.hidden_size: was 256 when this run was saved, is 128; a run keeps it: ")
    assert lines[1].startswith("training.seed: was 0") and "--run.name=NAME" in lines[1]


def test_options_of_another_version_are_no_change() -> None:
    before = load_config(DEBUG).model_dump(mode="json")
    before["training"]["gone"] = 1
    del before["optimizer"]["lr"], before["metrics"]
    assert recorded_changes(before, load_config(DEBUG)) == {}


def test_a_changed_mixture_is_described_by_what_differs() -> None:
    code, books = {"name": "code", "path": "a", "subset": "", "weight": 1.0}, {"name": "", "path": "b", "subset": "en"}
    heavier = code | {"weight": 2.0, "of another version": 3}
    assert describe_change("data.sources", [code, books], [heavier, {**books, "subset": "de"}]) == [
        "data.sources: b en is removed",
        "data.sources: b de is added",
        "data.sources: code: weight changes from 1.0 to 2.0",
    ]
    assert describe_change("data.sources", [code, books], [books, code]) == ["data.sources changes"]
    assert describe_change("validation.sets", [], [books]) == ["validation.sets: b en is added"]
    assert describe_change("optimizer.betas", [0.9, 0.95], [0.9, 0.99]) == [
        "optimizer.betas changes from [0.9, 0.95] to [0.9, 0.99]"
    ]
    assert describe_change("optimizer.lr", 0.1, 0.2) == ["optimizer.lr changes from 0.1 to 0.2"]


def test_a_branch_logs_what_differs_from_its_origin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those options too that no run may change, and not the free ones. Seen to fail as it was: nothing was logged."""
    (tmp_path / "tokenizer.json").write_text("{}")
    before = History(load_config(DEBUG), tmp_path)
    before._changes = [{"step": 5, "option": "optimizer.lr", "from": 1, "to": 2}]
    saved, origin = before.to_json(7), Location(tmp_path / "step-00000007")
    config = load_config(DEBUG, ["--optimizer.lr=0.5", "--training.seed=3", "--metrics.log_every=1"])
    lines = {f"optimizer.lr changes from {load_config(DEBUG).optimizer.lr} to 0.5, compared with {origin}"}
    lines |= {f"training.seed changes from 0 to 3, compared with {origin}"}
    for whole in (True, False):
        caplog.clear()
        history = History(config, tmp_path)
        with caplog.at_level("INFO"):
            history.start_from(saved, origin, whole)
        assert {record.message for record in caplog.records} == lines
        kept = history.to_json(7)["changes"]
        assert [(change["step"], change["option"]) for change in kept] == (
            [(5, "optimizer.lr"), (7, "training.seed"), (7, "optimizer.lr")] if whole else []
        )
