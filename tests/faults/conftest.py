"""Prepared data, and the unbroken runs that broken ones are compared with: made once a session."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Workspace
from torchxihe.config.load import load_config
from torchxihe.data.prepare.pipeline import prepare


def write_texts(folder: Path, seed: int, files: int = 12) -> None:
    """Documents of random words, some of them in both of two seeds."""
    folder.mkdir()
    chooser = random.Random(seed)
    words = ["".join(chooser.choices("abcdefghij", k=chooser.randint(2, 7))) for _ in range(150)]
    for i in range(files):
        (folder / f"{i:03d}.txt").write_text(" ".join(chooser.choices(words, k=chooser.randint(200, 1500))))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sources, a tokenizer and the prepared store."""
    root = tmp_path_factory.mktemp("prepared")
    write_texts(root / "text", seed=1)
    write_texts(root / "more", seed=2)
    first = Workspace(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(first.root)
        config = load_config("config.toml", ["--tokenizer.path=", "--tokenizer.vocab_size=512"])
        prepare(config)
        trained = next((root / "cache" / "tokenizers").iterdir())
        shutil.copytree(trained, root / "tokenizer")
        prepare(load_config("config.toml"))
    shutil.rmtree(first.root)
    return root


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Workspace:
    """A fresh place to train in, with data of its own that a test may spoil."""
    for name in ("text", "more", "tokenizer", "cache"):
        shutil.copytree(prepared / name, tmp_path / name)
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """An unbroken run on so many ranks, with such flags (and environment): run once, never to be changed."""
    known: dict[str, Workspace] = {}

    def of(world_size: int, *flags: str, env: dict[str, str] | None = None) -> Workspace:
        key = json.dumps([world_size, flags, env])
        if key not in known:
            root = tmp_path_factory.mktemp("unbroken")
            for name in ("text", "more", "tokenizer", "cache"):
                (root / name).symlink_to(prepared / name)
            known[key] = Workspace(root)
            known[key].finish(world_size, *flags, env=env)
            steps = list(known[key].ledger())
            assert steps == list(range(1, len(steps) + 1))
        return known[key]

    return of
