"""The documents as a site: mkdocs builds it strictly, and its order is README's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml: Any = pytest.importorskip("yaml")
pytest.importorskip("mkdocs")
ROOT = Path(__file__).parents[2]
PARTS = ("docs", "configs", "cluster", "torchxihe", "benchmarks")
FILES = ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_every_page_is_built_and_needs_no_other_host(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout
    for name in ["", *(path.stem for path in ROOT.glob("docs/*.md")), "torchxihe/trainer.py", "benchmarks/results"]:
        page = (tmp_path / name / "index.html").read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|img|link)[^>]+(?:src|href)=["']?https?:(?!//None)[^>]*""", page)
    assert 'href="docs/' not in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "added", "named"),
    [
        ("docs/watch.md", "[x](missing.md)", "missing.md"),
        ("docs/watch.md", "[x](serve.md#missing)", "#missing"),
        ("docs/watch.md", "[x](../README.md#missing)", "#missing"),
        ("docs/watch.md", "[x](#missing)", "#missing"),
        ("docs/watch.md", "[x](../torchxihe/missing.py)", "torchxihe/missing.py"),
        ("docs/watch.md", "![x](missing.png)", "missing.png"),
        ("README.md", "[x](docs/missing.md)", "missing.md"),
        ("CONTRIBUTING.md", "[x](README.md#missing)", "#missing"),
        ("docs/unlisted.md", "# A page that nav has not", "unlisted.md"),
    ],
)
def test_what_is_broken_is_refused_by_name(tmp_path: Path, name: str, added: str, named: str) -> None:
    root = tmp_path / "root"
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, root / part, ignore=ignored, symlinks=True)
    for file in FILES:
        shutil.copy(ROOT / file, root / file)
    with (root / name).open("a", encoding="utf-8") as page:
        page.write(f"\n{added}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0
    assert named in done.stdout.partition("WARNING")[2]


def test_readme_lists_the_pages_in_the_order_of_the_site() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for inner in entries for page in pages(inner)]

    site = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Documentation\n")[2].partition("\n## ")[0]
    assert re.findall(r"\]\(docs/([^)]+)\)", readme) == [page for page in site if (ROOT / "docs" / page).is_file()]
