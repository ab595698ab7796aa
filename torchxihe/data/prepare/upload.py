"""Copying prepared data to object storage (`torchxihe prepare CONFIG --upload`)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from torchxihe.config.options import Config
from torchxihe.data.expected import ExpectedFile
from torchxihe.data.manifests import Blocks, parse_sealed, sealed_json
from torchxihe.data.prepare.pipeline import prepare
from torchxihe.data.remote import BLOCKS, Bucket
from torchxihe.data.store import SourceRows, recipe_path
from torchxihe.data.tokenizer import read_meta
from torchxihe.errors import UserError, explained
from torchxihe.utils.records import DamagedError
from torchxihe.utils.words import counted

BLOCK_BYTES = 2**17
"""A row is a few KiB anywhere in the store, so that smaller blocks read less for it; larger ones need fewer requests to
read everything."""
TRANSFERS = 8
"""Files that are copied at once."""


def upload(config: Config) -> None:
    """Prepare in `data.cache_dir`, and copy what `data.remote` lacks. Raises UserError.

    The recipe is copied last: what a config finds is complete.
    """
    if not config.data.remote:
        raise UserError('--upload: data.remote names no place, such as --data.remote="s3://bucket/prepared"')
    bucket = Bucket(config.data.remote)
    config = config.model_copy(update={"data": config.data.model_copy(update={"remote": ""})})
    prepared = prepare(config)
    for source in prepared.held_out:
        if source.files:
            raise UserError(
                f"--upload: {source.name}: token files that are used in place are not copied; see docs/data.md"
            )
    cache, tokenizer = Path(config.data.cache_dir), prepared.tokenizer_dir
    names = read_meta(tokenizer).xxh3_128
    if not names:
        raise UserError(
            f"{tokenizer}: prepared by an earlier version; delete it and run `torchxihe prepare CONFIG` again"
        )
    files = [file for source in prepared.held_out for file in _large_files(source)]
    small = [*(tokenizer / name for name in names), tokenizer / "torchxihe.json"]
    for source in prepared.held_out:
        small += [source.store / "manifest.json", source.index / "index.json"]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        copied = sum(pool.map(lambda file: _copy(file, cache, bucket), files))
        list(pool.map(lambda path: bucket.upload(_name(path, cache), path), small))
    recipe = recipe_path(config)
    bucket.upload(_name(recipe, cache), recipe)
    size = sum(file.size for file in files) / 2**30
    print(f"{bucket.url}: {counted(len(files), 'data file')}, {size:.3f} GiB; {copied} of them are new", flush=True)


def _large_files(source: SourceRows) -> Iterator[ExpectedFile]:
    """What training reads of a source."""
    yield from (file for file in source.expected_files if file.path.suffix != ".idx")


def _name(path: Path, cache: Path) -> str:
    return path.relative_to(cache).as_posix()


def _copy(file: ExpectedFile, cache: Path, bucket: Bucket) -> bool:
    """Copy a large file and then the hashes of its blocks, unless both are there; whether it did. Raises UserError."""
    name = _name(file.path, cache)
    if bucket.size(name) == file.size and _hash_there(name, bucket) == file.xxh3_128:
        return False
    blocks, whole = [], xxhash.xxh3_128()
    try:
        with file.open() as stream:
            while block := stream.read(BLOCK_BYTES):
                blocks.append(xxhash.xxh3_128_hexdigest(block))
                whole.update(block)
        if whole.hexdigest() != file.xxh3_128:
            raise file.damaged("its content differs from what was written")
    except OSError as error:
        raise explained(error, file.path) from None
    bucket.upload(name, file.path)
    record = Blocks(size=BLOCK_BYTES, xxh3_128=file.xxh3_128, blocks=tuple(blocks))
    bucket.write(name + BLOCKS, sealed_json(record).encode())
    return True


def _hash_there(name: str, bucket: Bucket) -> str:
    """The hash of the file whose blocks' hashes are there; "" if there are none, or damaged ones."""
    if bucket.size(name + BLOCKS) < 0:
        return ""
    try:
        return parse_sealed(bucket.read(name + BLOCKS), Blocks).xxh3_128
    except DamagedError:
        return ""
