"""torchxihe from Python: what is loaded is the model of `transformers`, `batches` are the run's, `train` trains."""

import gc
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torchxihe
from tests.faults.harness import digests
from tests.unit.saved_runs import LLAMA, QWEN3, TEXT, TOKENS, make_run, write_training
from tests.unit.test_model import Shape
from torchxihe.__main__ import run
from torchxihe.config.load import load_config
from torchxihe.data.loader import Batch
from torchxihe.errors import UserError
from torchxihe.model.generate import Sampling
from torchxihe.trainer import Trainer

Rows = dict[int, dict[int, str]]
"""By step, counted from 0, and sample number: the hash of a row."""


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Seen to fail with `from torchxihe.api import load` in it."""
    program = "import sys, torchxihe; print(torchxihe.__version__, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    version, *modules = done.stdout.split()
    assert version == torchxihe.__version__
    assert not {"torch", "numpy", "pydantic", "torchxihe.api"} & set(modules)
    with pytest.raises(AttributeError, match="no attribute lod"):
        torchxihe.lod  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("shape", "vocab_size"), [(LLAMA, 320), (QWEN3, TOKENS)])
def test_what_is_loaded_is_the_model_of_transformers(tmp_path: Path, shape: Shape, vocab_size: int) -> None:
    """A run, a step and an export: logits within 1e-5, also of ids. So is the loss, but for the probability of the
    vocabulary's padding, which an export does not have. Seen to fail with that padding kept in the logits, and with a
    loss without the last token."""
    transformers: Any = pytest.importorskip("transformers")
    config, _ = make_run(tmp_path, shape, vocab_size)
    out = tmp_path / "out"
    run(["export", str(config.run_dir), "--out", str(out)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids_of = transformers.AutoTokenizer.from_pretrained(out)
    for place in (config.run_dir, config.run_dir / "checkpoints" / "step-00000007", out):
        ours = torchxihe.load(place)
        for text in TEXT[:2]:
            ids = torch.tensor([ids_of(text)["input_ids"]])
            with torch.no_grad():
                expected = theirs(ids).logits
                ended = torch.cat([ids, torch.tensor([[ids_of.eos_token_id]])], dim=1)
                loss = theirs(ended, labels=ended).loss.item()
            assert ours.logits(text).shape == (1, ids.shape[1], TOKENS)
            assert (ours.logits(text) - expected).abs().max() < 1e-5
            assert (ours.logits(ids.repeat(3, 1)) - expected).abs().max() < 1e-5
            assert ours.loss([text]) == [
                pytest.approx(loss, abs=1e-5 if ours.saved.model.vocab_size == TOKENS else 0.2)
            ]


def test_the_loss_of_a_long_text_predicts_every_token_but_the_first_once(tmp_path: Path) -> None:
    config, _ = make_run(tmp_path, LLAMA, TOKENS)
    ours = torchxihe.load(config.run_dir)
    text = TEXT[2] * 3
    ids = [*ours.tokenizer.encode(text), ours.tokenizer.eos_id]
    assert len(ids) > 2 * ours.saved.seq_len
    total = 0.0
    for start in range(0, len(ids) - 1, ours.saved.seq_len):
        targets = ids[start + 1 : start + ours.saved.seq_len + 1]
        logits = ours.logits(torch.tensor([ids[start : start + len(targets)]]))[0]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    short, long, none = ours.loss(["a b", text, ""])
    assert long == pytest.approx(total / (len(ids) - 1), abs=1e-5) and short != long and math.isnan(none)
    with pytest.raises(UserError, match="logits: 129 tokens, but the model sees at most 128"):
        ours.logits(torch.zeros(1, 129, dtype=torch.int64))
    assert torch.equal(ours.logits(""), ours.logits(torch.tensor([[ours.tokenizer.eos_id]])))


def test_generate_is_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = make_run(tmp_path, QWEN3)
    ours = torchxihe.load(config.run_dir)
    run(["generate", str(config.run_dir), "--prompt", "import ", "--temperature", "2", "--seed", "3"])
    text = ours.generate("import ", temperature=2, seed=3)
    assert capsys.readouterr().out == f"import {text}\n" and len(text) > 50
    pieces = list(ours.stream("import ", temperature=2, seed=3))
    assert "".join(pieces) == text and len(pieces) > 50
    with pytest.raises(UserError, match="top_p in"):
        ours.stream("import ", top_p=2)
    with pytest.raises(UserError, match=r"has no chat_template.jinja"):
        ours.stream([{"role": "user", "content": "Hello"}])


def test_pieces_have_the_probabilities_of_the_model(tmp_path: Path) -> None:
    """Of the softmax, whatever the temperature. Seen to fail with those of the sampler, and without the reset."""
    config, _ = make_run(tmp_path, QWEN3, TOKENS)
    ours = torchxihe.load(config.run_dir)
    prompt, options = ours.tokenizer.encode("import "), Sampling(temperature=2, seed=3, max_tokens=60)
    drawn = list(ours._draw("import ", options))
    logits = ours.logits(torch.tensor([prompt + [token for token, _ in drawn]]))[0, len(prompt) - 1 : -1]
    expected = logits.softmax(-1).gather(1, torch.tensor([[token] for token, _ in drawn]))
    torch.testing.assert_close(torch.tensor([[p] for _, p in drawn]), expected, atol=1e-6, rtol=1e-4)
    at, pieces = 0, list(ours.pieces("import ", **options))
    for piece in pieces:
        end = at + piece.tokens
        assert piece.probability == pytest.approx(math.prod(p for _, p in drawn[at:end]))
        at = end
    assert at == len(drawn) == 60 and any(piece.tokens > 1 for piece in pieces)
    assert "".join(piece.text for piece in pieces) == ours.generate("import ", **options)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """What is trained on from now on."""
    read: Rows = {}
    train_step = Trainer.train_step

    def noted(self: Trainer, loader: Iterator[Batch]) -> None:
        def batches() -> Iterator[Batch]:
            for batch in loader:
                read.setdefault(self.step, {}).update(digests(batch))
                yield batch

        train_step(self, batches())

    monkeypatch.setattr(Trainer, "train_step", noted)
    return read


def test_batches_are_what_a_run_has_read_and_will_read(tmp_path: Path, ledger: Rows) -> None:
    """Of a run whose batch grows, and changes when it resumes. Seen to fail with the stages of the config alone."""
    path = write_training(tmp_path, steps=4, training="batch_ramp = [[2, 2]]")
    with pytest.raises(UserError, match="torchxihe prepare"):
        torchxihe.batches(path)
    run_dir = torchxihe.train(path)
    changed = ["--training.steps=8", "--training.global_batch_size=6"]
    planned = dict(enumerate(map(digests, torchxihe.batches(path, *changed))))
    torchxihe.train(path, *changed)
    assert [len(ledger[step]) for step in range(8)] == [2, 2, 4, 4, 6, 6, 6, 6]
    assert planned == ledger
    assert dict(enumerate(map(digests, torchxihe.batches(run_dir / "config.toml")))) == ledger
    assert [digests(batch) for batch in torchxihe.batches(path, *changed, first=6)] == [ledger[6], ledger[7]]
    config = load_config(path, changed)
    assert digests(next(iter(torchxihe.batches(config)))) == ledger[0]
    with pytest.raises(UserError, match=r"--training.steps=8: overrides belong to a file; a Config has its values"):
        torchxihe.batches(config, *changed)
    gc.collect()  # of the iterator that was not exhausted
    assert not [thread for thread in threading.enumerate() if thread.name == "data"]


def test_training_in_this_process(tmp_path: Path) -> None:
    """Twice, with every line of metrics.jsonl; signals do afterwards what they did before."""
    path = write_training(tmp_path, steps=4)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen: list[dict[str, float]] = []
    run_dir = torchxihe.train(path, on_step=seen.append)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line | {"time": 0} for line in lines] == [line | {"time": 0} for line in seen]
    assert [line["step"] for line in seen if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in seen if "validation/loss" in line] == [3, 4]
    torchxihe.train(path, "--training.steps=6", on_step=seen.append)
    assert seen[-1]["step"] == 6 and torchxihe.load(run_dir).saved.step == 6


def test_training_elsewhere_than_on_the_main_thread_is_refused(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def train() -> None:
        try:
            torchxihe.train(write_training(tmp_path))
        except UserError as error:
            caught.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0]) and not (tmp_path / "train").exists()
