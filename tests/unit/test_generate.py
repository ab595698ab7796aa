"""Generation with a cache equals generation without one, and that of `transformers`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.saved_runs import LLAMA, QWEN3, make_config, make_decoder, make_run
from tests.unit.test_model import Shape
from torchxihe.__main__ import run
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.decoder import Decoder
from torchxihe.model.generate import cached, generate, sample, window_start

PROMPTS = [[5], [7, 1, 200, 33], list(range(20, 50))]
ALL = {"context": 64, "vocab_size": 290, "stop_id": -1}


def generate_uncached(
    model: Decoder, prompt: list[int], max_tokens: int, draw: Callable[[torch.Tensor], int], context: int = 64
) -> list[int]:
    """The definition: each token is computed from the complete context, without a cache."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[window_start(len(tokens), context) :]]))[0, -1, :290]
        tokens.append(draw(logits))
    return tokens[len(prompt) :]


def greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("shape", [LLAMA, QWEN3])
def test_cached_equals_uncached(tmp_path: Path, shape: Shape, prompt: list[int]) -> None:
    """150 tokens, beyond the context of 64 and the dropping of its oldest quarter, greedy and sampled.

    Seen to fail with `start` one too low, and with caches that are kept when the window moves.
    """
    model = make_decoder(make_config(tmp_path, shape))
    ours = list(generate(model, prompt, max_tokens=150, temperature=0, **ALL))
    assert ours == generate_uncached(model, prompt, 150, greedy)
    assert len(set(ours)) > 6  # no repetition, which a wrong implementation could produce as well
    generator = torch.Generator().manual_seed(4)
    ours = list(generate(model, prompt, max_tokens=150, seed=4, **ALL))
    assert ours == generate_uncached(model, prompt, 150, lambda logits: sample(logits, generator, 0.8, 50, 0.95))


def test_cached_logits_equal_uncached_whatever_the_parts(tmp_path: Path) -> None:
    model = make_decoder(make_config(tmp_path, LLAMA))
    tokens = torch.randint(0, 290, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), cached(model, 64):
        parts = [
            model(tokens[:, a:b], positions_T=torch.arange(a, b))
            for a, b in [(0, 7), (7, 8), (8, 30), (30, 31), (31, 40)]
        ]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [LLAMA, QWEN3])
def test_greedy_equals_transformers_on_the_export(tmp_path: Path, shape: Shape) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config, model = make_run(tmp_path, shape)
    run(["export", str(config.run_dir), "--out", str(tmp_path / "out")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for prompt in PROMPTS:
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=64,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        ours = list(generate(model, prompt, max_tokens=64, temperature=0, **(ALL | {"context": 128})))
        assert out[0, len(prompt) :].tolist() == ours


def test_the_model_is_as_before_afterwards(tmp_path: Path) -> None:
    model = make_decoder(make_config(tmp_path, LLAMA))
    before = [layer.self_attn.attention for layer in model.layers]  # type: ignore[union-attr]
    iterator = generate(model, [3], max_tokens=9, **ALL)
    next(iterator)
    assert [layer.self_attn.attention for layer in model.layers] != before  # type: ignore[union-attr]
    iterator.close()
    assert [layer.self_attn.attention for layer in model.layers] == before  # type: ignore[union-attr]


def test_the_window_never_exceeds_the_context_and_moves_rarely() -> None:
    for context in (1, 2, 3, 64, 100):
        starts = [window_start(length, context) for length in range(1, 5 * context)]
        seen = [length - start for length, start in zip(range(1, 5 * context), starts, strict=True)]
        assert max(seen) == context and min(seen) > 0 and starts == sorted(starts)
        assert len(set(starts)) <= 1 + 4 * 4


def test_sampling_cuts() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, generator, 0, 0, 1.0) == 1
    assert {sample(logits, generator, 5.0, 2, 1.0) for _ in range(200)} == {1, 2}
    assert {sample(logits, generator, 1.0, 0, 0.7) for _ in range(200)} == {1, 2}
    assert {sample(logits, generator, 9.0, 0, 1.0) for _ in range(400)} == {0, 1, 2, 3, 4}
    assert {sample(logits, generator, 1e-44, 0, 1.0) for _ in range(20)} == {1}


def test_a_model_that_has_diverged_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sample during training must not end the run."""
    model = make_decoder(make_config(tmp_path, LLAMA))
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    assert list(generate(model, [5], max_tokens=9, **ALL)) == []
    assert "not finite" in caplog.text


# The command


def test_stream_and_typed_lines_print_the_same_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = make_run(tmp_path, QWEN3)
    args = ["generate", str(config.run_dir), "--max-tokens", "40", "--temperature", "2"]
    run([*args, "--prompt", "import "])
    whole = capsys.readouterr().out
    run([*args, "--prompt", "import ", "--stream"])
    assert capsys.readouterr().out == whole and whole.startswith("import ") and len(whole) > 30
    monkeypatch.setattr("sys.stdin", io.StringIO("import \n\nimport \n"))
    run(args)
    lines = capsys.readouterr().out
    assert lines.startswith(whole) and lines.endswith(whole) and len(lines) > 2 * len(whole)


def test_the_end_of_the_document_ends_it(tmp_path: Path) -> None:
    config, model = make_run(tmp_path, QWEN3)
    free = list(generate(model, [5], max_tokens=30, temperature=0, **ALL))
    stop = free[9]
    ended = list(generate(model, [5], max_tokens=30, temperature=0, **(ALL | {"stop_id": stop})))
    assert ended == free[: free.index(stop)]
    assert load_tokenizer(config.run_dir / "tokenizer").eos_id == 0


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    for flag in ("--temperature=-1", "--temperature=nan", "--top-p=0", "--top-k=-1", "--max-tokens=-1"):
        with pytest.raises(UserError, match=f"generate: .*{flag[2:].partition('=')[0].replace('-', '_')}"):
            run(["generate", str(tmp_path), flag])
    for seed in ("-1", str(2**63)):
        with pytest.raises(UserError, match="generate: .* seed"):
            run(["generate", str(tmp_path), f"--seed={seed}"])


def test_the_smallest_temperature_takes_the_most_likely() -> None:
    logits = torch.tensor([0.0, 1.0, 0.999])
    assert sample(logits, torch.Generator(), 1e-300, 0, 1.0) == 1


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (
            "checkpoints/step-00000007/train_state.json",
            "corrupt: train_state.json differs from what was written",
        ),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json: damaged: its content differs"),
        ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json: damaged: its content differs"),
        ("tokenizer/torchxihe.json", "tokenizer/torchxihe.json: damaged: eos_id: Field required"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export"])
def test_damaged_files_of_a_run_are_named(tmp_path: Path, command: str, file: str, why: str) -> None:
    config, _ = make_run(tmp_path, QWEN3)
    (config.run_dir / file).write_text("{}")
    with pytest.raises(UserError, match=why):
        run([command, str(config.run_dir), "--prompt=" if command == "generate" else f"--out={tmp_path}/out"])
