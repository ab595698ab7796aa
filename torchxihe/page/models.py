"""Models that are loaded, and one generation at a time with each."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

from anyio import to_thread

from torchxihe.api import LanguageModel, Piece, load
from torchxihe.data.prepare.conversations import Message
from torchxihe.model.generate import Sampling

MOST_LOADED = 2
"""Models in memory: what the page compares."""
MOST_WAITING = 8
"""Generations of a model, the running one included; one more is refused."""


class BusyError(Exception):
    """Too much is asked at once; the message is one line."""


class Slot:
    """A model that is loaded or being loaded, and who waits for it."""

    def __init__(self) -> None:
        self.loading, self.turn = asyncio.Lock(), asyncio.Lock()
        self.model: LanguageModel | None = None
        self.users = 0
        self.used = time.monotonic()


class Ticket:
    """A place in a model's queue. `leave` it in any case."""

    def __init__(self, slot: Slot) -> None:
        self._slot: Slot | None = slot
        slot.users += 1

    def leave(self) -> None:
        """May be called twice."""
        if self._slot is not None:
            self._slot.users -= 1
            self._slot.used = time.monotonic()
            self._slot = None


class Models:
    """The loaded models by name; the one that was not used for longest makes room for another."""

    def __init__(self, load_model: Callable[[Path], LanguageModel] = load) -> None:
        self._load, self._slots = load_model, dict[str, Slot]()

    def join(self, name: str) -> tuple[Slot, Ticket]:
        """A place in the queue of a model. Raises BusyError."""
        slot = self._slots.get(name)
        if slot is None:
            idle = sorted((s.used, n) for n, s in self._slots.items() if not s.users)
            if len(self._slots) >= MOST_LOADED:
                if not idle:
                    raise BusyError(f"{MOST_LOADED} other models are generating; try again when one has finished")
                del self._slots[idle[0][1]]
            slot = self._slots[name] = Slot()
        if slot.users >= MOST_WAITING:
            raise BusyError(f"{slot.users} generations of this model are waiting; try again later")
        return slot, Ticket(slot)

    async def begin(
        self, slot: Slot, path: Path, prompt: str | list[Message], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """Load the model if need be; what it generates, which is computed when it is iterated. Raises UserError."""
        async with slot.loading:
            if slot.model is None:
                slot.model = await to_thread.run_sync(self._load, path)
            model = slot.model
        return await to_thread.run_sync(lambda: model.pieces(prompt, **sampling))


async def stream(slot: Slot, ticket: Ticket, pieces: Generator[Piece, None, None]) -> AsyncGenerator[str, None]:
    """Lines of JSON: {"waiting": n}, then {"text", "p"} of every piece, then {"done", "tokens", "seconds"}.

    When it is closed or cancelled, generation stops after the token that is being computed.
    """
    try:
        if slot.turn.locked():
            yield json.dumps({"waiting": slot.users - 1}) + "\n"
        async with slot.turn:
            start, tokens = time.monotonic(), 0
            try:
                while (piece := await to_thread.run_sync(next, pieces, None)) is not None:
                    tokens += piece.tokens
                    if piece.text:
                        yield json.dumps({"text": piece.text, "p": round(piece.probability, 6)}) + "\n"
            finally:
                pieces.close()
            yield json.dumps({"done": True, "tokens": tokens, "seconds": round(time.monotonic() - start, 3)}) + "\n"
    finally:
        ticket.leave()
