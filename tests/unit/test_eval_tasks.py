"""`torchxihe eval --tasks`: lm-eval's score of a checkpoint, on a small task of our own, without a network."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.saved_runs import QWEN3, make_run
from torchxihe.__main__ import run
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.decoder import Decoder

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/colours.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ["the quick brown ", "import ", "def f", "the lazy ", "fox jumps ", "return x "]
CHOICES = [" fox", "os", "(x)", "+ 1"]


def make_task(folder: Path, answers: list[int]) -> None:
    """A multiple-choice task whose right answers are `answers`."""
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(folder=folder))
    documents = zip(QUESTIONS, answers, strict=True)
    lines = [json.dumps({"question": q, "choices": CHOICES, "answer": a}) for q, a in documents]
    (folder / "colours.jsonl").write_text("\n".join(lines))


@torch.no_grad()
def likeliest(model: Decoder, folder: Path, question: str) -> int:
    """The choice that the model gives the largest probability after the question."""
    tokenizer = load_tokenizer(folder)
    scores = []
    for choice in CHOICES:
        # As lm-eval does: blanks at the end of the question go to the answer, and both are encoded together.
        context = question.rstrip()
        before, full = tokenizer.encode(context), tokenizer.encode(question + choice)
        log_p = model(torch.tensor([full]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
        scores.append(sum(log_p[i - 1, full[i]].item() for i in range(len(before), len(full))))
    return max(range(len(CHOICES)), key=scores.__getitem__)


def test_accuracy_is_that_of_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'lm-eval[hf]')")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config, model = make_run(tmp_path, QWEN3)
    picks = [likeliest(model, config.run_dir / "tokenizer", question) for question in QUESTIONS]
    answers = [pick if i % 3 else (pick + 1) % len(CHOICES) for i, pick in enumerate(picks)]  # 4 of 6 are right
    make_task(tmp_path / "tasks", answers)
    eval_it = ["eval", str(config.run_dir), "--tasks", "colours", "--include", str(tmp_path / "tasks")]
    run([*eval_it, "--json"])
    result = json.loads(capsys.readouterr().out)["colours"]
    assert result["acc,none"] == pytest.approx(4 / 6)
    run([*eval_it, "--limit", "3"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|colours"))
    assert "|acc" in row.replace(" ", "") and "0.6667" in row
    with pytest.raises(UserError, match="nothing-of-this-name: no such task"):
        run([*eval_it[:3], "colours,nothing-of-this-name", *eval_it[4:]])


def test_without_lm_eval_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config, _ = make_run(tmp_path, QWEN3)
    with pytest.raises(UserError, match=r"lm_eval is not installed; pip install 'lm-eval\[hf\]'"):
        run(["eval", str(config.run_dir), "--tasks", "hellaswag"])


@pytest.mark.parametrize("more", [["--limit", "3"], ["--tasks", "x", "--max-tokens", "4"], ["--tasks", "x", "--a.b=c"]])
def test_options_that_do_not_go_together(tmp_path: Path, more: list[str]) -> None:
    config, _ = make_run(tmp_path, QWEN3)
    with pytest.raises(UserError, match="eval: --"):
        run(["eval", str(config.run_dir), *more])
