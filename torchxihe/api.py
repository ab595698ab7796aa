"""torchxihe from Python: `load` a model, iterate the `batches` of a run, `train`. See docs/python.md."""

import itertools
import logging
import math
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchxihe.components.checkpoint.history import check_changes
from torchxihe.components.checkpoint.saved_run import SavedRun, load_decoder, open_saved
from torchxihe.config.load import load_config
from torchxihe.config.options import Config
from torchxihe.data.loader import Batch, BatchSpec, Loader
from torchxihe.data.prepare.chat import Chat
from torchxihe.data.prepare.conversations import Message
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.store import open_prepared
from torchxihe.data.tokenizer import TextTokenizer, load_tokenizer
from torchxihe.errors import UserError
from torchxihe.model.decoder import Decoder
from torchxihe.model.generate import Drawn, Sampling, check_sampling, draw_tokens
from torchxihe.run import OnStep, planned_order, run
from torchxihe.utils.device import default_device
from torchxihe.utils.log import setup_logging
from torchxihe.utils.processes import SIGNALS

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in `typing` from Python 3.11 on


class Piece(NamedTuple):
    """A piece of generated text that ends with a complete character."""

    text: str
    tokens: int
    """Number of tokens; 0 at the end of the text, where no token is left."""
    probability: float
    """Product of the tokens' probabilities, each given all tokens before it, whatever the temperature and the cuts."""


@dataclass(frozen=True)
class LanguageModel:
    """A trained model and its tokenizer in this process; `load` makes it."""

    model: Decoder
    """A `torch.nn.Module`: int64 [B, T] to logits [B, T, V], V with the padding of the vocabulary."""
    tokenizer: TextTokenizer
    """`encode` a text as the beginning of a document, `decode` ids."""
    saved: SavedRun
    """What it was loaded from: `saved.step`, `saved.seq_len` (tokens that the model sees at most), `saved.model`."""

    def stream(self, prompt: str | list[Message], **options: "Unpack[Sampling]") -> Iterator[str]:
        """Pieces of the text that continues `prompt` ("" begins a document), or that answers it.

        What is answered is a conversation, `[{"role": "user", "content": "..."}]`, in the model's chat format. The text
        ends with the document or the answer, or after `max_tokens`. options: see `Sampling`. Raises UserError.
        """
        return (piece.text for piece in self.pieces(prompt, **options))

    def pieces(self, prompt: str | list[Message], **options: "Unpack[Sampling]") -> Generator[Piece, None, None]:
        """What `stream` yields, with number and probability of the tokens. Raises UserError."""
        drawn_tokens = self._draw(prompt, options)

        def pieces() -> Generator[Piece, None, None]:
            written, ids, count, probability = "", [], 0, 1.0
            with closing(drawn_tokens):
                for drawn in drawn_tokens:
                    ids.append(drawn.token)
                    count, probability = count + 1, probability * drawn.probability
                    text = self.tokenizer.decode(ids)
                    if not text.endswith("\ufffd"):  # a character's bytes may be spread over several tokens
                        yield Piece(text[len(written) :], count, probability)
                        written, count, probability = text, 0, 1.0
            yield Piece(self.tokenizer.decode(ids)[len(written) :], count, probability)

        return pieces()

    def generate(self, prompt: str | list[Message], **options: "Unpack[Sampling]") -> str:
        """The text of `stream`, which does not repeat the prompt."""
        return self.tokenizer.decode([drawn.token for drawn in self._draw(prompt, options)])

    def _draw(self, prompt: str | list[Message], options: Sampling) -> Generator[Drawn, None, None]:
        """The tokens that follow `prompt`. Raises UserError."""
        check_sampling(options)
        if isinstance(prompt, str):
            ids, stop_id = self._encode(prompt), self.tokenizer.eos_id
        else:
            chat = Chat(self.saved.tokenizer_dir)
            ids, stop_id = chat.prompt(prompt), chat.end_of_turn
        context, vocab_size = self.saved.seq_len, self.tokenizer.vocab_size
        return draw_tokens(self.model, ids, context=context, vocab_size=vocab_size, stop_id=stop_id, **options)

    def _encode(self, text: str) -> list[int]:
        """Ids of the beginning of a document; "": of the end of the one before it."""
        return self.tokenizer.encode(text) or [self.tokenizer.eos_id]

    @torch.no_grad()
    def logits(self, text: str | Tensor) -> Tensor:
        """Logits of the token after each one: float32 [B, T, V], on the model's device, V the tokenizer's size.

        text: a string (B = 1), or token ids, int64 [B, T]. Raises UserError if T exceeds `saved.seq_len`.
        """
        tokens_BT = torch.tensor([self._encode(text)]) if isinstance(text, str) else text
        if tokens_BT.shape[1] > self.saved.seq_len:
            why = f"{tokens_BT.shape[1]} tokens, but the model sees at most {self.saved.seq_len}"
            raise UserError(f"logits: {why}; cut the text")
        logits_BTV = self.model(tokens_BT.to(self.model.cos_TD.device))
        return logits_BTV[..., : self.tokenizer.vocab_size].float()

    @torch.no_grad()
    def loss(self, texts: Sequence[str]) -> list[float]:
        """Mean cross-entropy of each text in nats/token, as of a document in training: with the token that ends it.

        The first token is not predicted. The vocabulary's padding has its (small) probability. A text longer than
        `saved.seq_len` is cut into parts of that length; a token is predicted from those before it in its part. NaN
        for a text without tokens.
        """
        return [self._loss([*self.tokenizer.encode(text), self.tokenizer.eos_id]) for text in texts]

    def _loss(self, ids: list[int]) -> float:
        tokens, total, length = torch.tensor([ids], device=self.model.cos_TD.device), 0.0, self.saved.seq_len
        for start in range(0, len(ids) - 1, length):
            end = min(start + length, len(ids) - 1)
            loss, _ = self.model(tokens[:, start:end], tokens[:, start + 1 : end + 1])
            total += float(loss)
        return total / (len(ids) - 1) if len(ids) > 1 else math.nan


def load(path: str | os.PathLike[str], *, device: str = "", dtype: torch.dtype | None = None) -> LanguageModel:
    """The model of a run (its newest checkpoint), of one of its step directories, or of an export.

    device: "cpu", "cuda", "cuda:1", ...; "": the GPU if there is one. dtype: in which it computes, on float32 weights;
    None: bfloat16 on a GPU, float32 on a CPU. Raises UserError, a ValueError, if there is no such model, or if it is
    damaged.
    """
    where = torch.device(device) if device else default_device()
    saved = open_saved(path)
    decoder = load_decoder(saved, where, dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32))
    return LanguageModel(decoder.eval(), load_tokenizer(saved.tokenizer_dir), saved)


def batches(config: str | os.PathLike[str] | Config, *overrides: str, first: int = 0) -> Iterator[Batch]:
    """The batches that a run of `config` trains on, one per optimizer step, from step `first` (from 0) to its last.

    Each is the global batch of all processes, on the CPU, its rows in the order of their sample numbers; of a run that
    has begun, what it has really read. Smaller batches of a batch-size ramp are filled up with rows of padding.
    config, overrides: as of `train`. Raises UserError if the data are not prepared.
    """
    config = _checked(config, overrides)
    prepared = open_prepared(config)
    config, order = planned_order(config, prepared)
    sizes = [order.batch(step)[1] for step in range(first, config.total_steps)]
    spec = BatchSpec(config.data.seq_len, max(sizes, default=1), torch.device("cpu"), config.data.document_mask)

    def read() -> Iterator[Batch]:
        with closing(Loader(prepared, order, spec, first)) as loader:
            yield from itertools.islice(loader, len(sizes))

    return read()


def train(config: str | os.PathLike[str] | Config, *overrides: str, on_step: OnStep = lambda metrics: None) -> Path:
    """Prepare the data and train, in this process; the run's directory, which `load` takes.

    config: a TOML file, or what `torchxihe.config.load` made of one; overrides: as on the command line,
    "--training.steps=100". A run that was interrupted resumes. on_step: called with every line of metrics.jsonl, that
    is every `metrics.log_every` steps and after each validation; what it raises ends the run. Ctrl-C (in a notebook:
    interrupt the kernel) saves a checkpoint and returns. Raises UserError, also on another than the main thread, which
    is the one that gets signals.
    """
    config = _checked(config, overrides)
    if threading.current_thread() is not threading.main_thread():
        raise UserError("train: call it on the main thread, which receives the signals that stop a run")
    if not logging.getLogger().handlers:
        setup_logging()
    check_changes(config)
    prepare(config)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        run(config, on_step)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return config.run_dir


def _checked(config: str | os.PathLike[str] | Config, overrides: tuple[str, ...]) -> Config:
    """The config of a file, with overrides. Raises UserError."""
    if not isinstance(config, Config):
        return load_config(os.fspath(config), [*overrides])
    if overrides:
        raise UserError(f"{overrides[0]}: overrides belong to a file; a Config has its values")
    return config
