"""Datasets of the Hugging Face hub."""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torchxihe.config.options import Documents


def settle_hub() -> None:
    """Use only the hub's caches if it cannot be reached, instead of retrying for half a minute.

    Must be called before `huggingface_hub` is imported, which reads the variable then.
    """
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return  # a direct connection would prove nothing
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=5).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_hub(source: Documents, revision: str) -> Any:
    """The source as a `datasets.Dataset`, or an `IterableDataset` if it is streamed."""
    import datasets  # slow, and only for hub sources

    if Path(source.path).exists():  # a local copy of a dataset repository
        revision = ""
    return datasets.load_dataset(
        source.path, source.subset or None, split=source.split, revision=revision or None, streaming=source.stream
    )


def commit_of(source: Documents) -> str:
    """The commit to which `source.revision` resolves now; for a local folder, its newest modification time."""
    import huggingface_hub  # slow, and only for hub sources

    folder = Path(source.path)
    if folder.exists():
        return str(max(path.stat().st_mtime_ns for path in folder.rglob("*")))
    return huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision or None).sha or ""
