"""`torchxihe generate`: text from a checkpoint."""

import argparse
import sys
from pathlib import Path

import torch

from torchxihe.components.checkpoint import load_model_only, resolve
from torchxihe.config import UserError, load_config
from torchxihe.data.tokenizer import load_tokenizer
from torchxihe.model.attention import sdpa
from torchxihe.model.decoder import Decoder
from torchxihe.model.generate import generate
from torchxihe.utils.device import default_device

HELP = "continue a prompt with a run's model"


def main(args: list[str]) -> None:
    """Parse `RUN --prompt TEXT` and print the continuation as it comes."""
    parser = argparse.ArgumentParser(prog="torchxihe generate", description=HELP)
    parser.add_argument("run", metavar="RUN_OR_STEP", help="a run directory, or one of its step directories")
    parser.add_argument("--prompt", default="", help='text to continue; "" starts a new document')
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this total mass")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_tokens < 0:
        raise UserError("generate: --temperature, --top-k and --max-tokens are 0 or more, --top-p is in (0, 1]")
    step_dir = resolve(options.run)
    run_dir = Path(step_dir.parent.parent)
    config = load_config(run_dir / "config.toml")
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    device = default_device()
    with torch.device("meta"):
        dtype = getattr(torch, config.training.dtype) if device.type == "cuda" else torch.float32
        model = Decoder(config.model, seq_len=config.data.seq_len, dtype=dtype, attention=sdpa)
    model.to_empty(device=device)
    model.init_weights(seed=0)
    load_model_only(step_dir, model)
    sys.stdout.write(options.prompt)
    written, tokens = "", []
    for token in generate(
        model,
        tokenizer.encode(options.prompt) or [tokenizer.eos_id],
        max_tokens=options.max_tokens,
        context=config.data.seq_len,
        vocab_size=tokenizer.vocab_size,
        stop_id=tokenizer.eos_id,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    ):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # the bytes of a character may come in several tokens
            sys.stdout.write(text[len(written) :])
            sys.stdout.flush()
            written = text
    sys.stdout.write("\n")
