"""Continue a text with a run's model.

usage: torchxihe generate RUN_OR_STEP [--prompt TEXT] [--chat] [--stream] [--max-tokens N] [--temperature T]
                          [--top-k K] [--top-p P] [--seed N]

  --prompt TEXT     text to continue; "" begins a document. Without it every line that you type is one, until Ctrl-D
  --chat            the text is your message, and the model answers in its chat format (docs/sft.md); lines that you
                    type make one conversation
  --stream          print as it comes, not when it is done; always so while you type
  --max-tokens N    tokens at most, default 200; the end of the document ends it too
  --temperature T   default 0.8; 0 always takes the most likely token
  --top-k K         draw from the K most likely tokens, default 50; 0: all
  --top-p P         draw from the most likely tokens of this total probability, default 0.95
  --seed N          the same seed draws the same text, default 0

examples: torchxihe generate runs/xihe_debug --prompt "import " --stream
          torchxihe generate runs/xihe_debug --prompt "def main" --temperature 0
          torchxihe generate runs/xihe_debug_sft --chat
"""

import sys
from collections.abc import Iterator

import torch

from torchxihe.components.checkpoint.saved_run import load_decoder, open_saved
from torchxihe.data.prepare.chat import Chat, Message
from torchxihe.data.tokenizer import TextTokenizer, load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.generate import generate
from torchxihe.utils.arguments import Arguments
from torchxihe.utils.device import default_device


def main(args: list[str]) -> None:
    """Print the continuation of `--prompt`, or of every line of standard input."""
    parser = Arguments("generate")
    parser.add_argument("run", metavar="RUN_OR_STEP")
    parser.add_argument("--prompt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    if not options.temperature >= 0 or not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_tokens < 0:
        raise UserError("generate: --temperature, --top-k and --max-tokens are 0 or more, --top-p is in (0, 1]")
    if not 0 <= options.seed < 2**63:
        raise UserError("generate: --seed is 0 or more, and below 2^63")
    saved = open_saved(options.run)
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
    """Lines of standard input to its end, with a prompt where somebody types them."""
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
        if not text.endswith("\ufffd"):  # the bytes of a character may come in several tokens
            print(text[len(written) :], end="", flush=True)
            written = text
    text = tokenizer.decode(ids)
    print(text[len(written) :] if stream else prompt + text)
    return text
