"""Continue a text with a run's model, or answer in its chat format."""

import sys
from collections.abc import Iterator

import torch

from torchxihe.components.checkpoint.saved_run import load_decoder, open_saved
from torchxihe.data.prepare.chat import Chat, Message
from torchxihe.data.tokenizer import TextTokenizer, load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.generate import generate
from torchxihe.parsers import parse
from torchxihe.utils.device import default_device


def main(args: list[str]) -> None:
    """Print the continuation of `--prompt`, or of every line of standard input."""
    options = parse("generate", args)
    if not options.temperature >= 0 or not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_tokens < 0:
        raise UserError("generate: --temperature, --top-k and --max-tokens are 0 or more, --top-p is in (0, 1]")
    if not 0 <= options.seed < 2**63:
        raise UserError("generate: --seed is 0 or more, and below 2^63")
    saved = open_saved(options.model)
    tokenizer = load_tokenizer(saved.tokenizer_dir)
    chat = Chat(saved.tokenizer_dir) if options.chat else None
    device = default_device()
    model = load_decoder(saved, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def answer(prompt: list[int]) -> Iterator[int]:
        return generate(
            model,
            prompt,
            max_tokens=options.max_tokens,
            context=saved.seq_len,
            vocab_size=tokenizer.vocab_size,
            stop_id=chat.end_of_turn if chat else tokenizer.eos_id,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )

    stream = options.stream or options.prompt is None
    messages: list[Message] = []
    for line in _typed_lines() if options.prompt is None else [options.prompt]:
        if chat:
            messages.append({"role": "user", "content": line})
            said = _print("", answer(chat.prompt(messages)), tokenizer, stream)
            messages.append({"role": "assistant", "content": said})
        else:
            _print(line, answer(tokenizer.encode(line) or [tokenizer.eos_id]), tokenizer, stream)


def _typed_lines() -> Iterator[str]:
    """Lines of standard input to its end, with a prompt on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _print(prompt: str, tokens: Iterator[int], tokenizer: TextTokenizer, stream: bool) -> str:
    """Print `prompt` and its continuation, with `stream` as it comes; the continuation."""
    if stream:
        print(prompt, end="", flush=True)
    written, ids = "", []
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids) if stream else ""
        if not text.endswith("\ufffd"):  # a character's bytes may be spread over several tokens
            print(text[len(written) :], end="", flush=True)
            written = text
    text = tokenizer.decode(ids)
    print(text[len(written) :] if stream else prompt + text)
    return text
