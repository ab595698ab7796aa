"""`torchxihe serve`: what it shows, what it refuses, and that nothing outside of the given directories is read."""

import asyncio
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

import torchxihe
from tests.unit.saved_runs import QWEN3, TOKENS, make_run
from tests.unit.test_report import EVIL, write_run
from torchxihe.__main__ import run
from torchxihe.api import Piece
from torchxihe.commands.serve import choose_token, is_loopback
from torchxihe.components.observe.metrics import METRICS
from torchxihe.errors import UserError
from torchxihe.page.catalog import Catalog
from torchxihe.page.models import MOST_LOADED, MOST_WAITING, BusyError, Models
from torchxihe.page.server import LARGEST_BODY, Pieces, build_app

SECRET = "the secret text"
TOKEN = "0123456789abcdef-token"
HERE = "http://127.0.0.1"
HOSTS = frozenset({"127.0.0.1", "localhost"})
STEP = "runs/small/checkpoints/step-00000007"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs/ and exported/, links that lead out of them, and secrets beside them."""
    root = tmp_path_factory.mktemp("serve")
    config, _ = make_run(root / "runs", QWEN3, TOKENS)
    run(["export", str(config.run_dir), "--out", str(root / "exported" / "small")])
    write_run(root / "runs")
    lines = [
        {"step": i, "loss": 5 - i / 10, "tokens": 8 * i, "time": 1e9 + i, "loss/a": 4, "loss/b": 5} for i in range(20)
    ]
    lines.insert(9, {"step": 9, "validation/loss": 3.0, "validation/a/loss": 3.0, "time": 1e9})
    (config.run_dir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = "2026-11-27 09:00:02,001 rank 0 [step 9] INFO sample at step 9:\nthe sample\n"
    (config.run_dir / "logs").mkdir()
    (config.run_dir / "logs" / "rank-00000.log").write_text(log)
    outside = root / "outside"
    shutil.copytree(config.run_dir, outside / "other")
    (outside / "secret.txt").write_text(SECRET)
    (root / "runs" / "linked").symlink_to(outside / "other")
    for name in (METRICS, "config.toml"):  # a run whose files lead out
        (root / "runs" / "files").mkdir(exist_ok=True)
        (root / "runs" / "files" / name).symlink_to(outside / "secret.txt")
    (root / "runs" / "files" / "logs").mkdir()
    (root / "runs" / "files" / "logs" / "rank-00000.log").symlink_to(outside / "other" / "logs" / "rank-00000.log")
    step = root / "runs" / "files" / "checkpoints" / "step-00000007"
    step.mkdir(parents=True)
    (root / "runs" / "files" / "tokenizer").symlink_to(outside / "other" / "tokenizer")
    for file in (root / STEP).iterdir():
        (step / file.name).symlink_to(outside / "other" / "checkpoints" / "step-00000007" / file.name)
    return root


@pytest.fixture
def client(given: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.chdir(given)
    catalog = Catalog([Path("runs"), Path("exported")])
    with TestClient(build_app(catalog, Models(), hosts=HOSTS), base_url=HERE, follow_redirects=False) as client:
        yield client


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/api/generate", json={"model": STEP, "prompt": "import ", **body})


def lines_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


# What it shows


def test_the_list(client: TestClient) -> None:
    """Runs and models below the given directories; links to directories and files outside are left out."""
    listed = client.get("/api/list").json()
    names = {run["name"] for run in listed["runs"]}
    assert names == {"runs/small", "runs/files", f"runs/{EVIL.replace('/', '_')}"}
    assert [(m["name"], m["step"], m["chat"]) for m in listed["models"]] == [
        ("exported/small", -1, False),
        (STEP, 7, False),
    ]
    [small] = [run for run in listed["runs"] if run["name"] == "runs/small"]
    assert (small["state"], small["step"], small["total"], small["loss"]) == ("finished", 19, 7, 3.1)


def test_what_is_watched_is_what_was_logged(client: TestClient, given: Path) -> None:
    """Also while the file grows. An answer that the browser has is not sent again."""
    query = "/api/watch?run=runs/small&by=tokens"
    first = client.get(query)
    panels = first.json()["panels"]
    titles = [re.findall("<figcaption>(.*?)(?: <small|</fig)", panel)[0] for panel in panels]
    assert titles == ["Loss", "Training loss by source", "Validation loss by source and set"]
    assert first.json()["samples"] == [{"run": "small", "step": 9, "text": "the sample"}]
    assert client.get(query, headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    path = given / "runs" / "small" / METRICS
    before = path.read_text()
    path.write_text(before + json.dumps({"step": 50, "loss": 1, "tokens": 400}) + "\n")
    later = client.get(query, headers={"If-None-Match": first.headers["etag"]})
    path.write_text(before)
    assert later.status_code == 200 and 'data-x="0.0 0.0004"' in later.json()["panels"][0]


def test_runs_are_overlaid_and_escaped(client: TestClient) -> None:
    evil = f"runs/{EVIL.replace('/', '_')}"
    answer = client.get("/api/watch", params={"run": ["runs/small", evil]}).json()
    assert "".join(answer["panels"]).count("data-name") >= 4 and "<script" not in "".join(answer["panels"])
    report = client.get("/report", params={"run": evil})
    assert report.text.count("<script") == 1 and "was killed or crashed" in report.text
    policy = re.findall('Content-Security-Policy" content="(.*?)"', report.text)
    assert policy == [report.headers["content-security-policy"]]


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in re.findall('(?:href|src)="(static/.*?)"', page.text):
        assert client.get(f"/{name}").status_code == 200, name
    assert "style" not in re.sub("stylesheet|style.css", "", page.text) and "onclick" not in page.text


@pytest.mark.parametrize("name", [STEP, "exported/small"])
def test_generated_text_is_that_of_the_library(client: TestClient, given: Path, name: str) -> None:
    *pieces, end = lines_of(generate(client, model=name, max_tokens=30, temperature=2.0, seed=3))
    model = torchxihe.load(given / name)
    assert "".join(p["text"] for p in pieces) == model.generate("import ", max_tokens=30, temperature=2, seed=3)
    expected = [p for p in model.pieces("import ", max_tokens=30, temperature=2, seed=3) if p.text]
    assert [p["p"] for p in pieces] == pytest.approx([p.probability for p in expected], abs=1e-5)
    assert end["done"] is True and end["tokens"] == 30


def test_a_damaged_checkpoint_is_one_line(client: TestClient, given: Path) -> None:
    folder = given / "runs" / "damaged"
    shutil.copytree(given / "runs" / "small", folder)
    try:
        [file] = (folder / "checkpoints" / "step-00000007").glob("*.distcp")
        file.write_bytes(b"x" + file.read_bytes()[1:])
        refused(generate(client, model="runs/damaged/checkpoints/step-00000007"), 400, "differs from what was written")
    finally:
        shutil.rmtree(folder)


def test_a_later_model_of_the_same_name_is_loaded(client: TestClient, given: Path) -> None:
    """Seen to fail with slots by name alone."""
    folder, name = given / "runs" / "again", "runs/again/checkpoints/step-00000007"
    texts = []
    try:
        for seed in (0, 1):
            shutil.rmtree(folder, ignore_errors=True)
            config, _ = make_run(
                given / "scratch", QWEN3, TOKENS, training={"seed": seed, "steps": 7, "global_batch_size": 2}
            )
            config.run_dir.rename(folder)
            texts.append(generate(client, model=name, max_tokens=20).text.rpartition("{")[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert texts[0] != texts[1]


# What it refuses


def refused(response: Any, status: int | tuple[int, ...], text: str = "") -> None:
    """One line, with no traceback."""
    allowed = (status,) if isinstance(status, int) else status
    assert response.status_code in allowed, (response.status_code, response.text[:300])
    assert len(response.text.splitlines()) <= 1 and text in response.text
    assert "Traceback" not in response.text and "Internal" not in response.text and SECRET not in response.text


BODIES = [b"", b"[]", b"3", b"null", b'"x"', b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b"{}",
          b'{"prompt":"\\ud800"}',
          b"x" * (LARGEST_BODY + 1), bytes(range(256)), b'{"model":"a","model":3}', b"{'model': 1}"]  # fmt: skip


def malformed_bodies(rng: random.Random) -> Iterator[tuple[bytes, dict[str, str]]]:
    good = {"model": STEP, "prompt": "x", "max_tokens": 2}
    wrong: dict[str, list[Any]] = {
        "model": [None, 3, "", "runs", "runs/small", "/etc/passwd", "../outside/other", "\0",
                  str(Path(STEP).absolute()), f"./{STEP}", f"{STEP}/", "runs/linked/checkpoints/step-00000007", [STEP],
                  "runs/files/checkpoints/step-00000007", "~", "s3://bucket/x", "file:///etc/passwd", "x" * 5000],
        "prompt": [None, 3, [], {"a": 1}, "x" * 100_001, True],
        "messages": [None, 3, [{}], [{"role": "x", "content": ""}], [{"role": "user", "content": 1}], [[]],
                     [{"role": "user", "content": "Hello"}], [{"role": "user", "content": ""}] * 201],
        "max_tokens": [None, 0, -1, 4097, 1.5, "3", 10**400, True, []],
        "temperature": [None, -1, "hot", 1e9, [], float("nan"), float("inf"), -0.1],
        "top_k": [-1, 1.5, None, 2**40], "top_p": [0, -1, 2, None, float("nan")],
        "seed": [-1, 2**63, 1.5, None, "0"], "other": [1], "__proto__": [{}],
    }  # fmt: skip
    json_type = {"content-type": "application/json"}
    while True:
        kind = rng.randrange(8)
        if kind < 4:
            key = rng.choice([*wrong])
            yield json.dumps(good | {key: rng.choice(wrong[key])}).encode(), json_type
        elif kind == 4:
            text = json.dumps(good).encode()
            yield text[: rng.randrange(len(text))], json_type
        elif kind == 5:
            yield rng.choice(BODIES), json_type
        elif kind == 6:
            yield (
                json.dumps(good).encode(),
                {"content-type": rng.choice(["text/plain", "application/x-www-form-urlencoded", "a/b", ""])},
            )
        else:
            yield (
                json.dumps(good).encode(),
                json_type
                | rng.choice(
                    [
                        {"host": "evil.example"},
                        {"origin": "http://evil.example"},
                        {"origin": "null"},
                        {"host": ""},
                        {"host": "[["},
                    ]
                ),
            )


OUT = ["../outside/other", "runs/../../outside/other", "/etc/passwd", "runs/small\0", "%2e%2e/outside/other", "\udcff",
       "runs/linked", "runs/small/", "./runs/small", "runs\\small", "", "x" * 9000, "runs//small",
       "..%5coutside", "runs/small/../small",
       "runs/small/config.toml", "//evil.example/x", "file:///etc/passwd", "C:\\x", "~root"]  # fmt: skip


def malformed_addresses(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Method and address."""
    while True:
        out = rng.choice(OUT).encode("utf-8", "surrogateescape")
        coded = "".join(f"%{byte:02x}" for byte in out) if rng.random() < 0.5 else quote(out)
        yield rng.choice(
            [
                ("GET", f"/report?run={coded}"),
                ("GET", f"/api/watch?run=runs/small&run={coded}"),
                ("GET", f"/static/{coded or 'x'}"),
                ("GET", f"/{coded or 'x'}"),
                ("GET", f"/api/watch?run=runs/small&by={coded or 'x'}"),
                (
                    "GET",
                    f"/api/watch?run=runs/small&smooth={rng.choice(['0', '-1', '1e3', '²', '9' * 5000, '', '10001'])}",
                ),
                ("GET", "/api/watch"),
                ("GET", "/api/watch?" + "&".join(f"run={i}" for i in range(50))),
                (rng.choice(["PUT", "DELETE", "PATCH", "BREW"]), f"/api/{rng.choice(['list', 'generate', 'watch'])}"),
                ("GET", "/api/generate"),
                ("POST", "/report?run=runs/small"),
            ]
        )


def test_200_malformed_requests(client: TestClient) -> None:
    """Each is answered by one line and 400, 404 or 405; an exception would be raised here. Seen to fail with a body
    that `json.loads` parses, and with names that are joined to the directory."""
    rng = random.Random(21)
    bodies, addresses = malformed_bodies(rng), malformed_addresses(rng)
    for _ in range(100):
        body, headers = next(bodies)
        refused(client.post("/api/generate", content=body, headers=headers), (400, 404))
        method, address = next(addresses)
        refused(client.request(method, f"{HERE}{address}"), (400, 404, 405))
    assert client.get("/api/list").status_code == 200
    assert lines_of(generate(client, max_tokens=1))[-1]["done"]


def test_files_that_lead_out_are_not_read(client: TestClient) -> None:
    """Seen to fail without `inside`."""
    assert client.get("/api/watch?run=runs/files").json() == {"panels": [], "samples": []}
    report = client.get("/report?run=runs/files").text
    assert SECRET not in report and "the sample" not in report and "<h2>Config" not in report


NASTY = [
    "1e400",
    "-1e400",
    "NaN",
    "1e308",
    "-1e308",
    "1e-320",
    "-5",
    "0",
    '"x"',
    "[]",
    "{}",
    "true",
    "null",
    "9" * 400,
    '"\\ud800"',
]


def test_any_metrics_can_be_shown(client: TestClient, given: Path) -> None:
    """What an error of the disk or another program has left. Seen to fail with times beyond the calendar."""
    rng, path = random.Random(5), given / "runs" / "small" / METRICS
    before = path.read_text()
    keys = ["step", "tokens", "time", "loss", "lr", "grad_norm", "skipped", "tokens_per_second", "validation/loss",
            "host_memory_gib/0", "mfu", "loss/\\ud800", "validation/x/loss", "validation/x/bpb"]  # fmt: skip
    try:
        for i in range(120):
            fields = {key: rng.choice(NASTY) for key in rng.sample(keys, 9)} | {"loss": rng.choice([*NASTY, "1", "2"])}
            fields |= {"step": str(i)} if rng.random() < 0.8 else {}
            with path.open("a") as file:
                file.write("{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n")
                if i % 50 == 0:
                    file.write('{"step": 999, "loss": 1, "skipped": 1, "time": 1e308}\n')
            if i % 10 == 0:
                for by in ("step", "tokens", "time"):
                    assert client.get(f"/api/watch?run=runs/small&by={by}&smooth=5").status_code == 200
                assert client.get("/report?run=runs/small").status_code == 200
                json.loads(client.get("/api/list").text, parse_constant=lambda name: pytest.fail(name))
    finally:
        path.write_text(before)


def test_a_token(given: Path) -> None:
    """In the address, which gives a cookie, or as a header."""
    app = build_app(Catalog([given / "runs"]), Models(), TOKEN)
    with TestClient(app, base_url="http://gpu.example", follow_redirects=False) as client:
        for address in (
            "/",
            "/api/list",
            "/static/page.css",
            "/?token=",
            "/?token=wrong",
            f"/?token={TOKEN}x",
            "/?token=%ff",
        ):
            refused(client.get(address), 401, "a token is needed")
        refused(client.post(f"/api/generate?token={TOKEN}", json={}), 401)
        for header in (f"Basic {TOKEN}", "Bearer wrong", TOKEN, "Bearer", f"Bearer {TOKEN}é".encode("latin-1")):
            refused(client.get("/api/list", headers={"authorization": header}), 401)  # type: ignore[dict-item]
        assert client.get("/api/list", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        moved = client.get(f"/?token={TOKEN}")
        assert (moved.status_code, moved.headers["location"]) == (303, "/")
        assert "HttpOnly" in moved.headers["set-cookie"] and "samesite=strict" in moved.headers["set-cookie"].lower()
        assert client.get("/api/list").status_code == 200  # the cookie


def test_who_needs_a_token() -> None:
    assert choose_token("127.0.0.1", "") == ("", HOSTS | {"::1"})
    assert choose_token("::1", TOKEN) == (TOKEN, HOSTS | {"::1"})
    made, hosts = choose_token("0.0.0.0", "")
    assert len(made) >= 32 and made != choose_token("0.0.0.0", "")[0] and not hosts
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", "127.0.0.1.example.com", "localhost.example.com"):
        assert not is_loopback(host) and choose_token(host, TOKEN) == (TOKEN, frozenset())
    for token in ("short", "x" * 16 + " ", "é" * 20):
        with pytest.raises(UserError, match="^--token: must have at least 16"):
            choose_token("127.0.0.1", token)


# One generation at a time


class Endless:
    """A model that generates until it is stopped; `events` tells when it began and ended."""

    def __init__(self, events: list[str], name: str = "") -> None:
        self.events, self.name = events, name

    def pieces(self, prompt: Any, **options: Any) -> Generator[Piece, None, None]:
        def made() -> Generator[Piece, None, None]:
            self.events.append(f"begin {prompt}")
            try:
                for i in range(options["max_tokens"]):
                    time.sleep(0.001)
                    yield Piece(f"{prompt}{i} ", 1, 0.5)
            finally:
                self.events.append(f"end {prompt}")

        return made()


async def asked(models: Models, name: str, prompt: str, tokens: int, leave_after: int = 10**9) -> list[dict[str, Any]]:
    """The lines of a response whose reader goes away after some of them."""
    slot, ticket = models.join(name)
    pieces = await models.begin(slot, Path(name), prompt, {"max_tokens": tokens})
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()

    async def send(message: Any) -> None:
        sent.extend(json.loads(line) for line in message.get("body", b"").splitlines())
        if len(sent) >= leave_after:
            gone.set()
            await asyncio.sleep(0.1)  # the reader goes away while a line is sent

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.0"}, "method": "POST", "headers": []}
    await Pieces(slot, ticket, pieces)(scope, receive, send)
    return sent


def make_models(events: list[str]) -> Models:
    return Models(lambda path: Endless(events, path.name))  # type: ignore[arg-type,return-value]


def test_generations_of_a_model_wait_for_each_other() -> None:
    """Seen to fail without the lock."""
    events: list[str] = []

    async def both() -> list[list[dict[str, Any]]]:
        models = make_models(events)
        return list(await asyncio.gather(*(asked(models, "m", prompt, 20) for prompt in "ab")))

    first, second = sorted(asyncio.run(both()), key=len)
    one, other = first[0]["text"][0], second[1]["text"][0]  # threads decide which begins
    assert events == [f"begin {one}", f"end {one}", f"begin {other}", f"end {other}"]
    assert second[0] == {"waiting": 1} and len(first) == 21 and len(second) == 22
    assert [line["text"] for line in second[1:-1]] == [f"{other}{i} " for i in range(20)]


def test_a_reader_that_goes_away_stops_the_model() -> None:
    """While it is generated, and while it waits. Seen to fail without closing the lines."""
    events: list[str] = []

    async def all_of_it() -> list[dict[str, Any]]:
        models = make_models(events)
        running = asyncio.create_task(asked(models, "m", "a", 10**6, leave_after=30))
        while not events:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(asked(models, "m", "b", 10**6, leave_after=1))
        await asyncio.gather(running, waiting)
        assert not models.join("m")[0].turn.locked() and models.join("m")[0].users == 2
        return await asked(models, "m", "c", 3)

    assert len(asyncio.run(all_of_it())) == 4
    assert events == ["begin a", "end a", "begin c", "end c"]


def test_the_queue_and_the_models_in_memory_are_bounded() -> None:
    async def all_of_it() -> None:
        models = make_models([])
        tickets = [models.join("one")[1] for _ in range(MOST_WAITING)]
        with pytest.raises(BusyError, match="8 generations of this model are waiting"):
            models.join("one")
        tickets += [models.join(f"other {i}")[1] for i in range(MOST_LOADED - 1)]
        with pytest.raises(BusyError, match="2 other models are generating"):
            models.join("more")
        for ticket in tickets[:MOST_WAITING]:
            ticket.leave()
            ticket.leave()
        models.join("more")  # in place of "one"
        assert set(models._slots) == {"other 0", "more"}

    asyncio.run(all_of_it())


# The command


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    for args, line in (
        ([], "^runs: no such directory; give directories with runs or exports$"),
        ([".", "--port", str(taken.getsockname()[1])], "--port .*: Address already in use; choose another"),
        ([".", "--port", "99999"], "--port 99999: must be from 0"),
        ([".", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        ([".", "--token", "x"], "--token: must have at least 16"),
    ):
        with pytest.raises(UserError, match=line):
            run(["serve", *args])
    taken.close()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"^serve: uvicorn is not installed; pip install 'torchxihe\[serve\]'$"):
        run(["serve", "."])


@pytest.fixture(scope="module")
def server(given: Path) -> Iterator[tuple[int, list[str]]]:
    """The port of the command, running, and what it has printed on stderr."""
    command = [sys.executable, "-m", "torchxihe", "serve", "runs", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command, cwd=given, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    said = process.stdout.readline()
    assert said.startswith("serving runs at http://127.0.0.1:"), process.stderr.read()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    yield int(re.findall(r":(\d+)/", said)[0]), errors
    process.send_signal(2)
    assert process.wait(20) == 0
    reader.join()
    assert "Traceback" not in "".join(errors)


def raw(port: int, request: bytes) -> bytes:
    """The answer to bytes that no library has tidied up."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_addresses_as_they_are_sent(server: tuple[int, list[str]], given: Path) -> None:
    """Nothing outside is read by any spelling of a path, over a real socket."""
    port, _ = server
    ends = [
        b"outside/secret.txt",
        b"../outside/secret.txt",
        b"/etc/passwd",
        b"server.py",
        str(given / "outside/secret.txt").encode(),
    ]
    ups = [
        b"../" * 6,
        b"..%2f" * 6,
        b"%2e%2e/" * 6,
        b"%252e%252e%252f" * 3,
        b"..%5c",
        b"..\\",
        b"%00",
        b"//",
        b"%c0%ae%c0%ae/",
        b"file:///",
    ]
    for start in (b"/", b"/static/", b"/static", b"/report?run=", b"/api/watch?run=", b"/report?run=runs/small/"):
        for up in ups:
            for end in ends:
                answer = raw(
                    port, b"GET " + start + up + end + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                )
                assert re.match(rb"HTTP/1.1 (400|404) ", answer), (start + up + end, answer[:200])
                assert SECRET.encode() not in answer and b"root:" not in answer and b"import " not in answer
    for request in (b"GET\r\n\r\n", b"\0\xff" * 50 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        assert raw(port, request).startswith(b"HTTP/1.1 400 "), request


def test_a_closed_connection_stops_the_model(server: tuple[int, list[str]]) -> None:
    port, _ = server
    body = json.dumps({"model": STEP, "max_tokens": 4096, "temperature": 5})
    for _ in range(3):  # each would take seconds
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/api/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert any("text" in json.loads(line) for line in iter(answer.readline, b""))  # after the one before, at most
        connection.close()
    deadline = time.monotonic() + 20
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        short = json.dumps({"model": STEP, "max_tokens": 1})
        connection.request("POST", "/api/generate", short, {"Content-Type": "application/json"})
        lines = connection.getresponse().read().splitlines()
        if b"waiting" not in lines[0]:
            break
        assert time.monotonic() < deadline
