"""Rates of the loader with `data.remote`: a folder (file://), an HTTP server that answers late; against local files.

    python benchmarks/object_storage.py                            # 100 MB of text, 52 MB of tokens; 30 ms
    python benchmarks/object_storage.py --latency 0.05 --seconds 20

It needs PYTHONPATH=. and aiohttp, or s3fs for --url. "empty": an epoch from an empty local cache, from opening on.
"full": all blocks are in the local cache. "tenth": the local cache holds a tenth of the store. Every case runs in its
own process, and so does the server.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.data import CONFIG, make_corpus, make_empty
from torchxihe.config.options import Config

SEQ_LEN = 1024
ROWS = 64
"""Of a batch."""


def make_config(folder: Path, url: str, gib: float, cache: str) -> Config:
    """A config whose only source is the corpus in `folder`."""
    data = {"sources": [{"path": str(folder / "corpus.jsonl")}], "seq_len": SEQ_LEN, "cache_dir": str(folder / cache)}
    data |= {"remote": url, "remote_cache_gib": gib}
    return Config.model_validate({**CONFIG, "data": data, "tokenizer": {"vocab_size": 8000}})


def upload_corpus(folder: Path) -> int:
    """Prepare the corpus, and copy the result to `folder`/bucket; bytes of what training reads."""
    from torchxihe.data.prepare.upload import upload

    config = make_config(folder, f"file://{folder}/bucket", 1.0, "cache")
    upload(config)
    return sum(
        path.stat().st_size for path in (folder / "bucket").rglob("*") if path.suffix in (".bin", ".rows", ".pieces")
    )


def serve(folder: Path, latency: float) -> None:
    """GET with ranges and HEAD on a free port, which is printed. Connections are kept; each answer waits."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = first.split()
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                await asyncio.sleep(latency)
                file = folder / path.lstrip("/")
                if not file.is_file():
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                size = file.stat().st_size
                start, end, status = 0, size, "200 OK"
                if "range" in fields:
                    first_byte, _, last = fields["range"].removeprefix("bytes=").partition("-")
                    start, end, status = int(first_byte), int(last) + 1, "206 Partial Content"
                head = f"HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nAccept-Ranges: bytes\r\n"
                head += f"Content-Range: bytes {start}-{end - 1}/{size}\r\n" if "range" in fields else ""
                writer.write(f"{head}\r\n".encode())
                if method == "GET":
                    with file.open("rb") as stream:
                        stream.seek(start)
                        writer.write(stream.read(end - start))
                await writer.drain()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


def run_case(folder: Path, url: str, gib: float, cache: str, seconds: float) -> dict[str, float]:
    """Read batches for so long, or, with 0, an epoch; seconds, tokens, CPU seconds, requests."""
    import torch

    from torchxihe.data.loader import BatchSpec, Loader
    from torchxihe.data.order import Order, plan_stages
    from torchxihe.data.remote import Bucket
    from torchxihe.data.store import open_prepared

    requests = 0
    read_range = Bucket.read_range

    def counted(*args: Any) -> bytes:
        nonlocal requests
        requests += 1
        return read_range(*args)

    Bucket.read_range = counted  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    config = make_config(folder, url, gib, cache)
    begun = time.perf_counter()
    prepared = open_prepared(config)
    loader = Loader(
        prepared, Order(plan_stages(config, prepared), prepared.rows), BatchSpec(SEQ_LEN, ROWS, torch.device("cpu"))
    )
    next(loader)
    first, cpu, batches = time.perf_counter() - begun, time.process_time(), 0
    started, before = time.perf_counter(), requests
    once = 0
    if seconds == 0:
        once, started, before = prepared.sources[0].train_rows // ROWS, begun, 0
    while batches < once or time.perf_counter() - started < seconds:
        next(loader)
        batches += 1
    taken, cpu = time.perf_counter() - started, time.process_time() - cpu
    counts = {"requests": requests - before, "rows": batches * ROWS, "first_batch_seconds": first}
    loader.close()
    return counts | {"seconds": taken, "cpu_seconds": cpu, "tokens": batches * ROWS * SEQ_LEN}


def measure(folder: Path, name: str, url: str, gib: float, cache: str, seconds: float) -> dict[str, float]:
    """Run a case in its own process and print its line."""
    command = [sys.executable, __file__, "--folder", str(folder), "--case", json.dumps([url, gib, cache, seconds])]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    rate, per_cpu = (result["tokens"] / result[clock] / 1e6 for clock in ("seconds", "cpu_seconds"))
    print(
        f"| {name} | {rate:.2f} | {per_cpu:.2f} | {result['requests'] / result['seconds']:.0f} | "
        f"{result['requests'] / result['rows']:.2f} | {result['seconds']:.1f} | {result['first_batch_seconds']:.2f} |",
        flush=True,
    )
    return result


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before the server answers")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each case")
    parser.add_argument("--url", default="", help="of a bucket, which is written to, instead")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmark_remote"), help="emptied first")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if options.serve:
        serve(folder / "bucket", options.latency)
        return
    if options.case:
        print(json.dumps(run_case(folder, *json.loads(options.case))))
        return
    make_empty(folder)
    make_corpus(folder / "corpus.jsonl", options.megabytes * 10**6)
    size = upload_corpus(folder)
    print(
        f"{size / 2**20:.0f} MiB; rows of {SEQ_LEN} tokens, {ROWS} in a batch; latency {options.latency * 1e3:.0f} ms"
    )
    columns = ("", "M tokens/s", "per CPU second", "requests/s", "requests per row", "seconds", "first batch")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    command = [sys.executable, __file__, "--serve", "--folder", str(folder), "--latency", str(options.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        urls = {"file": f"file://{folder}/bucket", "HTTP": f"http://127.0.0.1:{int(server.stdout.readline())}"}
        if options.url:
            from torchxihe.data.prepare.upload import upload

            upload(make_config(folder, options.url, 1.0, "cache"))
            urls = {options.url.partition(":")[0]: options.url}
        measure(folder, "local", "", 1.0, "cache", options.seconds)
        for name, url in urls.items():
            measure(folder, f"{name}, empty", url, 1.0, "cache", 0)
            measure(folder, f"{name}, full", url, 1.0, "cache", options.seconds)
            shutil.rmtree(folder / "cache" / "remote")
            measure(folder, f"{name}, tenth", url, size / 10 / 2**30, "cache", options.seconds)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
