"""Hook of mkdocs (`mkdocs.yml`): the site has the repository's layout, with README.md and docs/ at its root.

Links are written for the repository, where a code host shows them. What they point to outside docs/ becomes part of the
site, and they are rewritten to where it is there; mkdocs then checks them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, CHANGELOG.md, the measurements, and what pages link to outside docs/: files as pages."""
    patterns = ("README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/results/*.md")
    waiting = [path for pattern in patterns for path in ROOT.glob(pattern)]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(ROOT))
        if path.suffix == ".md":
            targets = {ROOT / _target(name, link) for link in LINK.findall(path.read_text(encoding="utf-8"))}
            waiting += sorted(target for target in targets - seen if target.exists())
            seen |= targets
        if name.startswith("docs/"):
            continue
        if path.suffix == ".md":
            files.append(File.generated(config, _on_site(name), abs_src_path=str(path)))
        else:
            files.append(File.generated(config, _on_site(name), content=f"# {name}\n\n{_content(path)}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page from the repository's layout to the site's."""
    if page.file.abs_src_path is None:
        return markdown  # made above
    name = str(Path(page.file.abs_src_path).relative_to(ROOT))
    here = posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda found: posixpath.relpath(_on_site(_target(name, found[1])), here or "."), markdown)


def _target(name: str, link: str) -> str:
    """The path in the repository that `link` means in the file `name`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _content(path: Path) -> str:
    """The pages in a directory, or the text of a file."""
    if path.is_dir():
        return "\n".join(f"- [{page.stem}]({page.name})" for page in sorted(path.glob("*.md")))
    return f"~~~~~\n{path.read_text(encoding='utf-8').rstrip()}\n~~~~~"


def _on_site(name: str) -> str:
    """Where the repository's file or directory `name` is on the site."""
    if (ROOT / name).is_dir():
        return f"{name}/index.md"
    site = PAGES.get(name, name.removeprefix("docs/"))
    return site if name.startswith("docs/") or site.endswith(".md") else f"{site}.md"
