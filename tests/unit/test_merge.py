"""The average of checkpoints: by hand the same bits, in bounded memory, and used as a run is."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchxihe
from tests.unit.saved_runs import LLAMA, QWEN3, TOKENS, make_run, write_training
from tests.unit.test_export import difference
from tests.unit.test_model import Shape, model_config
from torchxihe.__main__ import run
from torchxihe.components.observe import read_metrics
from torchxihe.errors import UserError


def make_runs(root: Path, shape: Shape, count: int, vocab_size: int = 320) -> tuple[list[str], list[torch.nn.Module]]:
    """Runs that differ in their seeds."""
    training = {"steps": 7, "global_batch_size": 2, "dtype": "float32", "compile": False}
    made = [make_run(root / str(i), shape, vocab_size, training=training | {"seed": i}) for i in range(count)]
    return [str(config.run_dir) for config, _ in made], [model for _, model in made]


def test_two_steps_are_averaged_to_the_bit(tmp_path: Path) -> None:
    """As in float32 and as in float64. Seen to fail with a sum of three instead."""
    paths, (a, b) = make_runs(tmp_path, QWEN3, 2)
    run(["merge", f"{paths[0]}/checkpoints/step-00000007", paths[1], "--out", str(tmp_path / "merged")])
    merged = torchxihe.load(tmp_path / "merged").model
    for name, p in merged.named_parameters():
        x, y = a.get_parameter(name), b.get_parameter(name)
        assert torch.equal(p, (x + y) / 2) and torch.equal(p, ((x.double() + y.double()) / 2).float())
        assert not torch.equal(x, y) or p.ndim == 1
    assert merged.embed_tokens.weight.shape[0] == 320  # the padding, too


@pytest.mark.parametrize("text", ["1,2.5,0.1", "3e-5,1e9,7"])
def test_weights_are_applied_in_order_in_float64(tmp_path: Path, text: str) -> None:
    """Seen to fail with the weights reversed, and with a sum in float32."""
    paths, models = make_runs(tmp_path, LLAMA, 3)
    run(["merge", *paths, "--weights", text, "--out", str(tmp_path / "merged")])
    merged = torchxihe.load(tmp_path / "merged").model
    u, v, w = (float(weight) for weight in text.split(","))
    for name, p in merged.named_parameters():
        x, y, z = (model.get_parameter(name).detach().double() for model in models)
        assert torch.equal(p, ((u * x + v * y + w * z) / (u + v + w)).float())


def test_a_run_its_steps_and_an_export_are_merged_and_used_as_a_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported, measured, sampled from, and loaded by a run that starts at step 0 with these weights."""
    path = write_training(tmp_path, steps=6, checkpoint="every = 3\nkeep_last = 0", model="vocab_size = 300")
    path.write_text(path.read_text().replace("vocab_size = 320\n", "", 1))
    run_dir, merged = torchxihe.train(path), tmp_path / "merged"
    run(["export", str(run_dir), "--out", str(tmp_path / "out")])
    run(["merge", f"{run_dir}/checkpoints/step-00000003", str(run_dir), str(tmp_path / "out"), "--out", str(merged)])
    capsys.readouterr()
    run(["eval", str(merged), "--json"])
    measured = json.loads(capsys.readouterr().out)
    run(["eval", str(run_dir), "--json"])
    assert 0 < abs(measured["validation/loss"] - json.loads(capsys.readouterr().out)["validation/loss"]) < 0.5
    run(["export", str(merged), "--out", str(tmp_path / "again")])
    card = (tmp_path / "again" / "README.md").read_text()
    assert "# merged" in card and "| Steps | 6 |" in card and "step-00000003 (0.333)" in card
    run(["generate", str(merged), "--prompt", "a", "--max-tokens", "5"])
    flags = [f"--checkpoint.load={merged}", '--checkpoint.load_only=["model"]', "--run.name=onward"]
    seen: list[dict[str, float]] = []
    torchxihe.train(path, *flags, "--training.steps=1", on_step=seen.append)
    first = read_metrics(run_dir / "metrics.jsonl")[0][0]
    assert seen[0]["step"] == first["step"] == 1 and seen[0]["loss"] < first["loss"] - 0.05
    with pytest.raises(UserError, match="missing in the checkpoint .optim"):
        torchxihe.train(path, flags[0], "--run.name=all", "--training.steps=20")


def test_a_merged_model_is_that_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    paths, _ = make_runs(tmp_path, QWEN3, 2, TOKENS)
    run(["merge", *paths, "--out", str(tmp_path / "merged")])
    run(["export", str(tmp_path / "merged"), "--out", str(tmp_path / "out")])
    assert difference(tmp_path / "out", torchxihe.load(tmp_path / "merged").model) < 1e-5


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    one = str(make_run(tmp_path / "one", LLAMA)[0].run_dir)
    out = ["--out", str(tmp_path / "merged")]
    model = model_config(LLAMA).model_dump() | {"vocab_size": 320, "rope_theta": 1e6}
    for other, why in (
        (make_run(tmp_path / "two", QWEN3), r"model.hidden_size is 48, in \S+ 64; .* only models of one shape"),
        (
            make_run(tmp_path / "three", LLAMA, model=model),
            r"model.rope_theta is 1000000.0, in \S+ 5000.0; only",
        ),
        (make_run(tmp_path / "four", LLAMA, tokenizer={"vocab_size": 280}), "its tokenizer is not that of"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            run(["merge", one, str(other[0].run_dir), *out])
        assert "\n" not in str(caught.value)
    for weights in ("1", "1,0", "1,-1", "1,inf", "1,x", "1,2,3"):
        with pytest.raises(UserError, match="--weights: must be 2 positive numbers"):
            run(["merge", one, one, *out, f"--weights={weights}"])
    assert not list(tmp_path.glob("*merged*"))
    run(["merge", one, one, *out])
    with pytest.raises(UserError, match="merged exists; give a new folder"):
        run(["merge", one, one, *out])


def test_the_kernels_of_a_model_do_not_matter(tmp_path: Path) -> None:
    model: dict[str, Any] = model_config(LLAMA).model_dump() | {"vocab_size": 320}
    one, other = make_run(tmp_path / "one", LLAMA), make_run(tmp_path / "two", LLAMA, model=model | {"mlp": "torch"})
    run(["merge", str(one[0].run_dir), str(other[0].run_dir), "--out", str(tmp_path / "merged")])


MEASURE = """
import re
from torchxihe.__main__ import run
for name in ("small", "large"):
    run(["merge", f"{name}/small", f"{name}/small", "--out", f"{name}-out"])
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_memory_is_a_tensors_not_the_models(tmp_path: Path) -> None:
    """Of a model of 128 MB whose largest tensor has 3 MB. Seen to fail with all averages made first."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    make_run(tmp_path / "small", LLAMA)
    model = model_config(Shape(512, 4, 4, 128, False, False)).model_dump()
    large = model | {"num_hidden_layers": 10, "intermediate_size": 1400, "vocab_size": 320}
    make_run(tmp_path / "large", LLAMA, model=large)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    before, after = (int(line) for line in re.findall(r"^\d+$", done.stdout, re.MULTILINE))  # KiB
    assert 1024 * (after - before) < 0.4 * 128e6
