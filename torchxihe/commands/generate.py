"""Continue a text with a run's model, or answer in its chat format."""

import sys
from collections.abc import Iterator

from torchxihe.api import load
from torchxihe.data.prepare.conversations import Message
from torchxihe.model.generate import Sampling, check_sampling
from torchxihe.parsers import parse


def main(args: list[str]) -> None:
    """Print the continuation of `--prompt`, or of every line of standard input."""
    options = parse("generate", args)
    sampling = Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    check_sampling(sampling)
    model = load(options.model)
    stream = options.stream or options.prompt is None

    def say(shown: str, prompt: str | list[Message]) -> str:
        """Print `shown` and what follows `prompt`; the latter."""
        pieces = model.stream(prompt, **sampling) if stream else [model.generate(prompt, **sampling)]
        said = ""
        print(shown, end="", flush=stream)
        for piece in pieces:
            print(piece, end="", flush=stream)
            said += piece
        print()
        return said

    messages: list[Message] = []
    for line in _typed_lines() if options.prompt is None else [options.prompt]:
        if options.chat:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": say("", messages)})
        else:
            say(line, line)


def _typed_lines() -> Iterator[str]:
    """Lines of standard input to its end, with a prompt on a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
