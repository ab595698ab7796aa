"""Every format is read completely, cut into shards or not; what cannot be read is an error or a bad row."""

import csv
import gzip
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchxihe.config.options import Source
from torchxihe.data.prepare import hub, readers, sources
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.rows import Row, Template
from torchxihe.data.prepare.sources import cut_shards, find_pieces, source_name
from torchxihe.errors import UserError

TEXTS = [f"Text {i}: café 中文 😀, " + "word " * (i % 9) for i in range(300)]


def rows_of(source: Source) -> list[list[tuple[str, str]]]:
    """(text, the reason if there is none) of every row, by shard."""
    template = Template(source.template)

    def read(row: Row) -> tuple[str, str]:
        text, problem = template.text(row)
        return text, problem.reason if problem else ""

    shards = cut_shards(find_pieces(source, "data.sources.0"))
    return [
        [read(row) for piece in pieces for row in read_rows(piece, template.columns, source, "key")]
        for pieces in shards
    ]


def error_of(path: Path, **options: Any) -> str:
    """The one line that reading `path` ends with."""
    with pytest.raises(UserError) as error:
        rows_of(Source(path=str(path), **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) for t in TEXTS))
    return "a.jsonl"


def write_json_array(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    return "a.json"


def write_gzip(folder: Path) -> str:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / write_jsonl(folder)).read_bytes()))
    return "a.jsonl.gz"


def write_zstd(folder: Path) -> str:
    zstandard = pytest.importorskip("zstandard")
    lines = (folder / write_jsonl(folder)).read_bytes().splitlines(keepends=True)
    frames = [zstandard.compress(b"".join(half)) for half in (lines[:100], lines[100:])]  # as `zstd` of two files
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    return "a.jsonl.zst"


def write_tsv(folder: Path) -> str:
    with (folder / "a.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("n", "text"), *enumerate(TEXTS)])
    return "a.tsv"


def write_csv(folder: Path) -> str:
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["n", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    return "a.csv"


def write_parquet(folder: Path) -> str:
    import datasets
    import pyarrow.parquet as pq

    pq.write_table(datasets.Dataset.from_dict({"text": TEXTS}).data.table, folder / "a.parquet", row_group_size=23)
    return "a.parquet"


def write_arrow_file(folder: Path) -> str:
    import pyarrow as pa

    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=31)
    return "a.arrow"


def write_saved_dataset(folder: Path) -> str:
    import datasets

    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": dataset, "other": dataset.select(range(3))}).save_to_disk(
        folder / "saved", num_shards={"train": 3, "other": 1}
    )
    return "saved"


WRITERS = [write_jsonl, write_json_array, write_gzip, write_zstd, write_csv, write_tsv, write_parquet, write_arrow_file,
           write_saved_dataset]  # fmt: skip
CUT = {write_jsonl, write_parquet, write_arrow_file}


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_every_text_once(
    tmp_path: Path, write: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(path=str(tmp_path / write(tmp_path)))
    assert [row for shard in rows_of(source) for row in shard] == [(text, "") for text in TEXTS]
    for size in (100, 1000):
        monkeypatch.setattr(sources, "SMALLEST_SHARD", size)
        shards = rows_of(source)
        assert [row for shard in shards for row in shard] == [(text, "") for text in TEXTS]
        assert len(shards) > 2 or write not in CUT


@pytest.mark.parametrize("write", [write_jsonl, write_json_array, write_csv, write_gzip])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, write: Callable[[Path], str]) -> None:
    file = tmp_path / write(tmp_path)
    unpack, pack = (gzip.decompress, gzip.compress) if file.suffix == ".gz" else (bytes, bytes)
    file.write_bytes(pack(b"\xef\xbb\xbf" + unpack(file.read_bytes())))
    assert [row for shard in rows_of(Source(path=str(file))) for row in shard] == [(text, "") for text in TEXTS]


@pytest.mark.parametrize("how", ["text", "lines"])
def test_a_byte_order_mark_is_no_text_of_a_document(tmp_path: Path, how: Any) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ufefftwo".encode())
    texts = ["one\n\ufefftwo"] if how == "text" else ["one", "\ufefftwo"]
    [rows] = rows_of(Source(path=str(tmp_path / "a.txt"), format=how))
    assert rows == [(text, "") for text in texts]


def test_capital_endings(tmp_path: Path) -> None:
    (tmp_path / write_gzip(tmp_path)).rename(tmp_path / "A.JSONL.GZ")
    assert rows_of(Source(path=str(tmp_path / "A.JSONL.GZ"))) == [[(text, "") for text in TEXTS]]


def test_hidden_files_are_read_when_asked_for(tmp_path: Path) -> None:
    for name in (".cache/a.txt", "b/.c.txt", "b/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert rows_of(Source(path=str(tmp_path))) == [[("b/d.txt", "")]]
    assert rows_of(Source(path=str(tmp_path), glob="**/.c.txt")) == [[("b/.c.txt", "")]]


def test_quotes_in_csv(tmp_path: Path) -> None:
    """A bad row is one bad row; a quote that swallows the rest of the file is no row at all."""
    file = tmp_path / "a.csv"
    file.write_text('text,n\n"one ""1"",\nand on",1\n"two"x,2\nthree,3\n')
    [rows] = rows_of(Source(path=str(file)))
    assert rows == [('one "1",\nand on', ""), ("", "malformed CSV"), ("three", "")]
    file.write_text('text,n\none,1\n"two,2\nthree,3\n')
    assert error_of(file).endswith(f"key.path: {file}: cannot be read as csv: line 3: a quote is never closed")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
def test_rows_that_are_wider_or_narrower_than_the_header_are_bad(tmp_path: Path, ending: str) -> None:
    """Seen to fail: the wide row was cut at the header's width, the narrow one kept."""
    file = tmp_path / f"a{ending}"
    lines = ["text,n", "one,1", "Hello, world,2", "", "alone", "two,2"]
    content = "\n".join(lines).replace(",", "\t" if ending == ".tsv" else ",").encode()
    file.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    bad = ("", "not as many fields as the header")
    source = Source(path=str(file))
    assert rows_of(source) == [[("one", ""), bad, bad, ("two", "")]]
    [piece] = find_pieces(source, "key")
    places = [row.where for row in read_rows(piece, ["text"], source, "key") if row.bad]
    assert places == [f"{file}, line 3 (3 fields, the header has 2)", f"{file}, line 5 (1 field, the header has 2)"]


def test_tab_separated_files_have_no_quotes(tmp_path: Path) -> None:
    """Seen to fail: the quote swallowed the next row."""
    (tmp_path / "a.tsv").write_text('n\ttext\n1\t"open\n2\tsay "hi"\n3\t"both"\n')
    assert rows_of(Source(path=str(tmp_path / "a.tsv"))) == [[('"open', ""), ('say "hi"', ""), ('"both"', "")]]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".arrow"])
def test_a_column_name_that_is_there_twice_is_an_error(tmp_path: Path, ending: str) -> None:
    """Seen to fail: the last of the two was read, or pyarrow's KeyError was raised."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, names = tmp_path / f"a{ending}", ["text", "n", "text"]
    table = pa.table([["a"], ["b"], ["c"]], names=names)
    if ending == ".parquet":
        pq.write_table(table, file)
    elif ending == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        file.write_text("\n".join(("," if ending == ".csv" else "\t").join(row) for row in (names, ["a", "b", "c"])))
    assert error_of(file) == f"key.path: {file}: two columns are named 'text'; rename one of them"


def test_a_large_csv_file_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a record of many lines, and one long line, end at the limit."""
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1000)
    (tmp_path / "a.csv").write_text("text\n" + '"a\nb"\n' * 2000)
    assert rows_of(Source(path=str(tmp_path / "a.csv"))) == [[("a\nb", "")] * 2000]
    for record in ('"' + "a\n" * 600, "a" * 1001):
        (tmp_path / "a.csv").write_text(f"text\nb\n{record}")
        assert "line 3: a record of more than 1,000 bytes, the limit of one document" in error_of(tmp_path / "a.csv")


def test_a_large_array_is_read_an_entry_at_a_time(tmp_path: Path) -> None:
    texts = ["é]," * 50_000, *(f'{i}: "[{{' * (i % 50) for i in range(5000))]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps([{"text": text, "n": [1]} for text in texts], indent=indent))
        [rows] = rows_of(Source(path=str(tmp_path / "a.json")))
        assert [text for text, _ in rows] == texts


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_document_a_line(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(end.join(TEXTS).encode())
    for size in (50, 333, 10**6):
        monkeypatch.setattr(sources, "SMALLEST_SHARD", size)
        shards = rows_of(Source(path=str(tmp_path / "a.txt"), format="lines"))
        assert [text for shard in shards for text, _ in shard] == TEXTS


def test_files_of_a_folder_in_a_fixed_order_and_small_ones_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", "skip.md", "__pycache__/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"in {name}")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")  # the same file twice is one document
    folder = Source(path=str(tmp_path), glob="**/*.txt")
    expected = [("in a.txt", ""), ("in b/1.txt", ""), ("in b/2.txt", "")]
    assert rows_of(folder) == [expected]
    assert rows_of(Source(path=f"{tmp_path}/**/[12].txt")) == [expected[1:]]
    monkeypatch.setattr(sources, "SMALLEST_SHARD", 17)
    assert rows_of(folder) == [expected[:1], expected[1:2], expected[2:]]


def test_the_standard_library_is_a_source() -> None:
    pieces = find_pieces(Source(path="{stdlib}", glob="**/*.py"), "data.sources.0")
    assert 400 < len(pieces) < 3000 and sum(piece.size for piece in pieces) > 5_000_000
    assert not any({"test", "idlelib", "site-packages"} & set(Path(piece.path).parts) for piece in pieces)


def test_shards_depend_on_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5, 5, 5, 30, 1, 1]
    pieces = [sources.Piece(f"f{i}", "text", size=size) for i, size in enumerate(sizes)]
    monkeypatch.setattr(sources, "SMALLEST_SHARD", 12)
    assert [[piece.size for piece in shard] for shard in cut_shards(pieces)] == [[5, 5], [5], [30], [1, 1]]


def test_templates() -> None:
    row = Row("here", {"q": "Why?", "a": "So.", "n": 3})
    assert Template("{q}\n{{{a}}}").text(row) == ("Why?\n{So.}", None)
    assert Template("{q}{n}").text(row) == ("", ("column 'n' is not a string", "it is an int"))
    assert Template("{q}{x}").text(row) == ("", ("column 'x' is missing", "the row has q, a, n"))
    many = Row("here", {f"{i}\n" * 9: "" for i in range(1000)})
    _, problem = Template("{x}").text(many)
    assert problem and len(problem.detail) < 500 and "\n" not in problem.detail


def test_names() -> None:
    names = {
        "{stdlib}": "stdlib",
        "data/books/*.jsonl.gz": "books",
        "data/c4.jsonl": "c4",
        "HuggingFaceFW/fineweb-edu": "fineweb-edu",
        "/data/wiki/": "wiki",
    }
    assert {path: source_name(Source(path=path)) for path in names} == names
    assert source_name(Source(path="allenai/c4", subset="en")) == "c4-en"
    assert source_name(Source(path="allenai/c4", name="web")) == "web"


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_arrow_file])
def test_a_missing_column_names_the_file_and_what_there_is(tmp_path: Path, write: Callable[[Path], str]) -> None:
    file = tmp_path / write(tmp_path)
    with pytest.raises(UserError) as error:
        rows_of(Source(path=str(file), template="{title}"))
    have = "n, text" if write is write_csv else "text"
    why = f"there is no column 'title'; there are {have}; name one of them in template (chat: messages)"
    assert str(error.value) == f"key.path: {file}: {why}"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize("write", [write_gzip, write_zstd, write_parquet, write_json_array])
def test_a_truncated_file_is_named(tmp_path: Path, write: Callable[[Path], str]) -> None:
    file = tmp_path / write(tmp_path)
    truncate(file)
    with pytest.raises(UserError, match=rf"key.path: {file}: cannot be read as "):
        rows_of(Source(path=str(file)))


@pytest.mark.parametrize("write", [write_parquet, write_arrow_file])
def test_a_damaged_file_that_is_to_be_cut_is_named(
    tmp_path: Path, write: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with pyarrow's own errors, ArrowInvalid and OSError, from where the pieces are counted."""
    monkeypatch.setattr(sources, "SMALLEST_SHARD", 100)
    file = tmp_path / write(tmp_path)
    content = file.read_bytes()
    for damaged in (bytes(2000), content[:-15], content[:-60] + bytes(50) + content[-10:]):
        file.write_bytes(damaged)
        assert f"key.path: {file}: cannot be read as " in error_of(file)


def test_a_megatron_index_is_no_token_file(tmp_path: Path) -> None:
    """Seen to fail for the pattern."""
    for name in ("a.bin", "a.idx"):
        (tmp_path / name).write_bytes(b"\1\0")
    places: list[dict[str, Any]] = [
        {"path": str(tmp_path)},
        {"path": f"{tmp_path}/*"},
        {"path": str(tmp_path), "glob": "*"},
    ]
    for where in places:
        pieces = find_pieces(Source(**where, format="tokens"), "key")
        assert [piece.path for piece in pieces] == [str(tmp_path / "a.bin")]


def test_garbage_in_a_gzip_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / write_gzip(tmp_path)
    data = bytearray(file.read_bytes())
    data[200:260] = bytes(60)
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"key.path: {file}: cannot be read as json"):
        rows_of(Source(path=str(file)))


def test_a_saved_dataset_without_the_split(tmp_path: Path) -> None:
    folder = tmp_path / write_saved_dataset(tmp_path)
    assert [len(shard) for shard in rows_of(Source(path=str(folder), split="other"))] == [3]
    with pytest.raises(UserError, match=r"data.sources.0.split: .*saved has no split 'test'; it has train, other"):
        rows_of(Source(path=str(folder), split="test"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset repository as it lies on the hub: two subsets, Parquet in several files, a README that names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("hub") / "owner_corpus"
    for subset in ("en", "de"):
        (folder / subset).mkdir(parents=True)
        for i in range(3):
            texts = [f"{subset} {text}" for text in TEXTS[100 * i : 100 * i + 100]]
            pq.write_table(pa.table({"body": texts}), folder / subset / f"train-0000{i}-of-00003.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.parquet\n"
        "- config_name: de\n  data_files: de/*.parquet\n---\n# A corpus\n"
    )
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_dataset(repository: Path, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source = Source(path=str(repository), subset="de", template="{body}", stream=stream, max_tokens=10**6)
    shards = rows_of(source)
    assert [row for shard in shards for row in shard] == [(f"de {text}", "") for text in TEXTS]
    assert len(shards) == (3 if stream else 1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subset": "fr"}, "BuilderConfig 'fr' not found"),
        ({"subset": "de", "split": "test"}, "Unknown split"),
        ({"subset": "de", "split": "train[:10%]"}, "a part of a split cannot be read"),
    ],
)
def test_a_hub_dataset_that_cannot_be_had(repository: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as error:
        rows_of(Source(path=str(repository), template="{body}", **changes))
    message = str(error.value)
    assert message.startswith("data.sources.0.") and why in message and "\n" not in message


def test_an_unreachable_hub_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: tuple[str, int], timeout: float) -> None:
        assert address == ("hub.example", 443) and timeout <= 5
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    for proxy, expected in (("https://proxy.example", None), ("", "1")):
        monkeypatch.setenv("HTTPS_PROXY", proxy) if proxy else monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is put back
        monkeypatch.delenv("HF_HUB_OFFLINE")
        hub.settle_hub()
        assert os.environ.get("HF_HUB_OFFLINE") == expected


def test_a_hub_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        rows_of(Source(path="nobody/nothing-of-this-name"))
    message = str(error.value)
    assert message.startswith(
        "data.sources.0.path: nobody/nothing-of-this-name: not a file here, and `datasets` cannot"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "more after the end of the array"),
        ('[{"text": "a"}] {"text": "b"}', "more after the end of the array"),
        ('[{"text": "a"} {"text": "b"}]', "no comma before it"),
        ('[,{"text": "a"}]', "a comma before it"),
        ('[{"text": "a"},]', "cannot be read as json"),
        ('[{"text": "a"}, ', "cannot be read as json"),
        ("[" * 100_000, "cannot be read as json"),
    ],
)
def test_what_is_not_one_array_is_an_error(tmp_path: Path, content: str, why: str) -> None:
    """Rather than the first of them: seen to give one document of two."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/a.json: .*{why}"):
        rows_of(Source(path=str(tmp_path / "a.json")))


def test_an_array_in_pieces_of_any_size(tmp_path: Path) -> None:
    """Entries and the white space between them end where a piece of the file does."""
    texts = ["x" * (2**16 - 40 + i) for i in range(60)]
    (tmp_path / "a.json").write_text("[\n" + " ,\n ".join(json.dumps({"text": text}) for text in texts) + "  ]\n\n")
    assert rows_of(Source(path=str(tmp_path / "a.json"))) == [[(text, "") for text in texts]]
    (tmp_path / "c.json").write_text(json.dumps([1234567890] * 10_000))  # the first half of a number is a number
    assert rows_of(Source(path=str(tmp_path / "c.json"))) == [[("", "not a JSON object")] * 10_000]
    (tmp_path / "b.json").write_text(" [ ] ")
    assert rows_of(Source(path=str(tmp_path / "b.json"))) == [[]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"text": "one"}, {"text": "caf\xe9"}, {"text": "\\udc80 two"}]'),
        ("a.csv", b'text\none\n"caf\xe9"\n\xed\xa0\x80 two\n'),
        ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "\\udc80 two"}\n'),
    ],
)
def test_a_byte_that_is_not_utf8_costs_its_row_alone(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    [rows] = rows_of(Source(path=str(tmp_path / name)))
    assert rows[:2] == [("one", ""), ("", "not UTF-8")] and len(rows) == 3
    assert rows[2] == (("", "not UTF-8") if name == "a.csv" else ("\udc80 two", ""))


def test_links_to_folders_are_gone_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "b.txt").write_text("b")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("a")
    (tmp_path / "own" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "itself").symlink_to(".")
    for pattern in ("", "**/*.txt"):
        assert rows_of(Source(path=str(tmp_path / "own"), glob=pattern)) == [[("a", ""), ("b", "")]]


@pytest.mark.parametrize(
    "pattern",
    ["**/*", "*", "*.txt", "**/*.txt", "a/*", "a/**/c/*", "**/b/**/*.txt", "./a/b/*", "[ab]/?.txt", "a/b", "x*"],
)
def test_globs_are_those_of_pathlib(tmp_path: Path, pattern: str) -> None:
    for name in ("1.txt", ".hidden", "a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "b/4.md", "a/c/b/5.txt", "a/c/6.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = sorted(path for path in tmp_path.glob(pattern) if path.is_file())
    try:
        found = [Path(piece.path) for piece in find_pieces(Source(path=str(tmp_path), glob=pattern), "key")]
    except UserError as error:
        assert "no file there that matches" in str(error)
        found = []
    assert sorted(found) == expected


def test_a_glob_is_below_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data.sources.0.glob: /etc/\*: is relative to"):
        rows_of(Source(path=str(tmp_path), glob="/etc/*"))
    assert rows_of(Source(path=str(tmp_path), glob="**.txt")) == [[("a", "")]]


@pytest.mark.parametrize("files", [{"state.json": "{}"}, {"state.json": "no"}, {"dataset_dict.json": "{}"}, {}])
def test_a_folder_that_is_no_saved_dataset(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="data.sources.0.path: .* not a folder that `save_to_disk` wrote"):
        find_pieces(Source(path=str(tmp_path), format="dataset"), "data.sources.0")


def test_a_state_of_somebody_elses_is_text(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"text": "a"}')
    assert rows_of(Source(path=str(tmp_path))) == [[("a", "")]]


def test_an_empty_compressed_file_is_a_truncated_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.jsonl.gz: cannot be read as json: it is empty"):
        rows_of(Source(path=str(tmp_path / "a.jsonl.gz")))


def pack(name: str, data: bytes) -> bytes:
    """`data`, compressed as the name says."""
    if name.endswith(".zst"):
        return pytest.importorskip("zstandard").compress(data)
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.mark.parametrize(
    ("name", "how", "content", "what"),
    [
        ("a.txt", "text", "x" * 1001, 'more than 1,000 bytes, the limit; split it, or set format = "lines"'),
        ("a.txt.gz", "text", "x" * 10**6, 'a document of more than 1,000 bytes, the limit; split it'),
        ("a.txt.gz", "lines", "ab\n" + "x" * 10**6, "line 2: a line of more than 1,000 bytes, the limit of one"),
        ("a.jsonl.zst", "auto", '{"text": "' + "x" * 10**6 + '"}', "line 1: a line of more than 1,000 bytes, the"),
        ("a.jsonl", "auto", '{"text": "' + "x" * 2000 + '"}', "line 1: a line of more than 1,000 bytes, the limit of"),
        ("a.json.gz", "auto", '[{"text": "' + "x" * 10**6 + '"}]', "entry 0: more than 1,000 characters, the limit of"),
    ],
)  # fmt: skip
def test_a_document_has_a_limit(
    tmp_path: Path, name: str, how: Any, content: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small compressed file may expand to more than there is memory. Seen to fail: all of it was read first."""
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1000)
    (tmp_path / name).write_bytes(pack(name, content.encode()))
    assert what in error_of(tmp_path / name, format=how)
    whole = content[:900].partition("\n")[0] if how in ("text", "lines") else json.dumps({"text": "y" * 900})
    (tmp_path / name).write_bytes(pack(name, whole.encode()))
    assert [len(shard) for shard in rows_of(Source(path=str(tmp_path / name), format=how))] == [1]


BOMB = """
import sys
from torchxihe.config.options import Source
from torchxihe.data.prepare.readers import read_rows
from torchxihe.data.prepare.sources import find_pieces
from torchxihe.data.prepare import readers
readers.LONGEST_DOCUMENT = 2**26
source = Source(path=sys.argv[1])
for piece in find_pieces(source, "key"):
    for row in read_rows(piece, ["text"], source, "key"):
        pass
"""


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.json.gz", "a.jsonl.zst"])
def test_a_decompression_bomb_takes_no_more_memory_than_the_limit(tmp_path: Path, name: str) -> None:
    """4 GiB of blanks in some MB, in a process that may have 1.5 GiB. Seen to fail with a MemoryError."""
    start = {"a.csv.gz": b'text\n"', "a.json.gz": b"[{"}.get(name, b"{")
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        content = zstandard.compress(start) + zstandard.compress(b" " * 2**26) * 64
    else:
        content = gzip.compress(start) + gzip.compress(b" " * 2**26, 1) * 64
    (tmp_path / name).write_bytes(content)
    limit = 3 * 2**29
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", BOMB, str(tmp_path / name)], env=environment, text=True, capture_output=True,
        timeout=100, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert result.stderr.splitlines()[-1].startswith(f"torchxihe.errors.UserError: key.path: {tmp_path / name}: cannot")
    assert "more than 67,108,864" in result.stderr


def test_a_gzip_file_with_zeros_after_its_end(tmp_path: Path) -> None:
    """Tapes and block devices leave them. Seen to fail."""
    file = tmp_path / write_gzip(tmp_path)
    file.write_bytes(file.read_bytes() + bytes(700))
    assert rows_of(Source(path=str(file))) == [[(text, "") for text in TEXTS]]
    file.write_bytes(file.read_bytes() + b"other data")
    assert "cannot be read as json: Not a gzipped file" in error_of(file)


def test_a_zstd_file_with_a_long_window_names_the_remedy(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(stream.compress(b'{"text": "a"}\n') + stream.flush())
    assert error_of(file).endswith(
        "its window is larger than 128 MiB; compress it again without --long, or decompress it: zstd -d --long=31"
    )


@pytest.mark.parametrize("place", ["path", "folder", "glob"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "link to nothing", "link to itself"])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_named(tmp_path: Path, place: str, kind: str) -> None:
    """Seen to fail: "no file there", or left out."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "b.jsonl"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(file))
    else:
        file.symlink_to(file if kind == "link to itself" else tmp_path / "nowhere")
    path = {"path": file, "folder": tmp_path, "glob": tmp_path / "*.jsonl"}[place]
    why = {
        "link to nothing": "a link to a file that is not there; restore the file or remove the link",
        "link to itself": "Too many levels of symbolic links",
    }.get(kind, "not a regular file (a FIFO, socket or device); copy its content to a file")
    assert error_of(path).startswith(f"data.sources.0.path: {file}: {why}")


@pytest.mark.timeout(20)
def test_a_device_and_a_file_that_becomes_a_fifo(tmp_path: Path) -> None:
    """Opening waits for no writer, whatever was there when the files were listed."""
    assert "not a regular file" in error_of(Path("/dev/zero"))
    (tmp_path / "a.bin").write_bytes(bytes(8))
    os.mkfifo(tmp_path / "a.idx")
    assert f"{tmp_path}/a.idx: not a regular file" in error_of(tmp_path / "a.bin", format="tokens")
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_text("text\n")
        source = Source(path=str(tmp_path / name))
        [piece] = find_pieces(source, "key")
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"^key.path: {tmp_path / name}: is not a regular file"):
            list(read_rows(piece, ["text"], source, "key"))


@pytest.mark.timeout(20)
def test_a_saved_dataset_of_fifos_and_deep_json(tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("[" * 10**6)
    assert "not a folder that `save_to_disk` wrote" in error_of(tmp_path, format="dataset")
    (tmp_path / "state.json").unlink()
    os.mkfifo(tmp_path / "state.json")
    assert "state.json is not a regular file" in error_of(tmp_path, format="dataset")


def test_too_many_open_files_names_the_limit(tmp_path: Path) -> None:
    """Seen to fail: "cannot be read as json: [Errno 24] Too many open files"."""
    source = Source(path=str(tmp_path / write_jsonl(tmp_path)))
    [piece] = find_pieces(source, "key")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = read_rows(piece, ["text"], source, "key")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(
            UserError, match=rf"key.path: {piece.path}: Too many open files; raise the limit: ulimit -n"
        ):
            next(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_line_that_is_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    deep = "[" * 10**6
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {deep}\n{{"text": "b"}}\n')
    assert rows_of(Source(path=str(tmp_path / "a.jsonl"))) == [[("a", ""), ("", "JSON nested too deeply"), ("b", "")]]
    (tmp_path / "b.json").write_text(f'[{{"text": "a"}}, {deep}')
    assert "b.json: cannot be read as json: entry 1: nested too deeply" in error_of(tmp_path / "b.json")


def invalid_utf8(values: list[bytes | None]) -> Any:
    """An Arrow array of strings that were not validated."""
    import pyarrow as pa

    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)


def write_table(file: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    batch = pa.record_batch(list(columns.values()), names=list(columns))
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_batches([batch]), file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_one_value_that_is_not_utf8_costs_its_row_alone(tmp_path: Path, ending: str) -> None:
    """Also inside of messages. Seen to fail: nothing of the file could be read."""
    import pyarrow as pa

    file = tmp_path / f"a{ending}"
    texts = [b"a%d" % i for i in range(600)]
    texts[300] = b"caf\xe9"
    write_table(file, {"text": invalid_utf8([*texts]), "n": pa.array(range(600))})
    good = [(text.decode(), "") for text in texts if text != texts[300]]
    assert rows_of(Source(path=str(file))) == [[*good[:300], ("", "not UTF-8"), *good[300:]]]

    contents = invalid_utf8([b"q", b"a", b"q", b"\xff", b"q", b"b"])
    roles = pa.array(["user", "assistant"] * 3)
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    write_table(file, {"messages": pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), messages)})
    source = Source(path=str(file))
    [piece] = find_pieces(source, "key")
    rows = list(read_rows(piece, ["messages"], source, "key"))
    assert [row.bad for row in rows] == ["", "not UTF-8", ""] and " row 1 of " in rows[1].where
    assert [row.columns["messages"][1]["content"] for row in rows[::2]] == ["a", "b"]


def test_an_arrow_file_whose_offsets_lie_is_an_error(tmp_path: Path) -> None:
    """Seen to fail with a segmentation fault, or with bytes of other rows as text."""
    import pyarrow as pa

    file = tmp_path / "a.arrow"
    for offsets in ([0, 2, 2**30, 9], [0, 5, 2, 9]):
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(b"x" * 9)]
        damaged = pa.Array.from_buffers(pa.string(), 3, buffers)
        write_table(file, {"text": damaged})
        assert f"key.path: {file}: cannot be read as arrow: " in error_of(file)
        behind = pa.StructArray.from_arrays([invalid_utf8([b"\xff"] * 3), damaged], ["role", "content"])
        write_table(file, {"text": pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), behind)})
        assert f"key.path: {file}: cannot be read as arrow: " in error_of(file)


def test_errors_of_pyarrow_of_any_type_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsupported codec, say, is no ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / write_parquet(tmp_path)
    for kind in (pa.ArrowNotImplementedError, pa.ArrowKeyError, pa.ArrowMemoryError):

        def fail(*_: Any, error: type[Exception] = kind, **__: Any) -> Any:
            raise error("one\ntwo")

        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, "iter_batches", fail)
            assert error_of(file).endswith("cannot be read as parquet: one two")


def test_errors_of_a_stream_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries of the network raise types of their own."""

    class Broken:
        num_shards = 1

        def shard(self, **_: Any) -> Any:
            raise RuntimeError("connection\nlost")

    monkeypatch.setattr(readers, "load_hub", lambda *_: Broken())
    source = Source(path="owner/name", stream=True, max_tokens=10)
    with pytest.raises(UserError) as error:
        list(read_rows(readers.Piece("owner/name", "stream", 0, 1), ["text"], source, "key"))
    assert str(error.value) == (
        "key.path: owner/name: shard 0 cannot be read: RuntimeError: connection lost; rerun to resume from the last "
        "finished shard"
    )


def test_paths_with_dots_and_a_nul(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    name = write_jsonl(tmp_path)
    assert len(rows_of(Source(path=f"{tmp_path}/b/../{name}"))[0]) == len(TEXTS)
    for path in ("a\0.jsonl", "a\0/*.jsonl"):
        assert "no file there" in error_of(Path(path))


def test_the_benchmark_empties_no_folder_but_its_own(tmp_path: Path) -> None:
    """Seen to fail: the file was deleted."""
    root = Path(__file__).parents[2]
    (tmp_path / "thesis.txt").write_text("years of work")
    command = [sys.executable, str(root / "benchmarks/data.py"), "--megabytes", "1", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=100)
    assert result.returncode == 1 and (tmp_path / "thesis.txt").read_text() == "years of work"
    assert result.stderr == f"--folder {tmp_path}: has files that this benchmark did not make; name an empty folder\n"
    script = "import pathlib, sys; sys.path.insert(0, sys.argv[1]); from data import *; make_empty(pathlib.Path('own'))"
    for left in (["corpus.jsonl", "cache"], []):
        make = [sys.executable, "-c", script, str(root / "benchmarks")]
        subprocess.run(make, env=environment, cwd=tmp_path, check=True, timeout=100)
        assert [path.name for path in (tmp_path / "own").iterdir()] == [".torchxihe_benchmark"]
        for name in left:  # what a run makes
            (tmp_path / "own" / name).mkdir()
