"""The corpora of the track, each named by a list of files with hashes.

Python code: the sources in wheels from PyPI, a hash for each package. They are taken from this interpreter's
site-packages where it has the listed version, else from a folder of wheels. English: files of a dataset on the hub.
"""

import base64
import hashlib
import os
import platform
import re
import shutil
import sysconfig
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath

from torchxihe.data.prepare.sources import NOT_INSTALLED
from torchxihe.errors import UserError
from torchxihe.utils.files import write_text
from torchxihe.utils.records import DamagedError, Record, read_record
from torchxihe.utils.words import counted

SMALLEST = 250_000
"""Bytes of Python below which a package is not listed."""
PLATFORM = "--only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64"

Files = dict[str, bytes]
"""Contents by the path in site-packages."""


class Package(Record):
    """The Python files of one wheel, without its tests."""

    name: str
    version: str
    files: int
    bytes: int
    sha256: str
    """Of a line "PATH SHA256" for each file, sorted by path."""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


class Packages(Record):
    """code.json."""

    python: str
    """Version of Python that the wheels are for, "3.12": some packages have other files for another one."""
    packages: tuple[Package, ...]


class HubFile(Record):
    """A file of a dataset."""

    path: str
    bytes: int
    sha256: str


class HubFiles(Record):
    """english.json: files of one commit of a dataset."""

    repository: str
    revision: str
    files: tuple[HubFile, ...]


def collect(listed: Path, into: Path, wheels: Path | None = None) -> None:
    """Put the files of a list into `into`, which has nothing else afterwards.

    What is there already was checked when it was written. Raises UserError, with a line for each package or file that
    is missing or differs from the list.
    """
    try:
        corpus = read_record(listed, Packages | HubFiles)  # pyright: ignore[reportArgumentType]
    except FileNotFoundError:
        raise UserError(f"{listed}: no such file; make it with --write-list={listed}") from None
    except DamagedError as error:
        raise UserError(f"{listed}: {error}") from None
    into.mkdir(parents=True, exist_ok=True)
    if isinstance(corpus, Packages):
        _collect_packages(corpus, listed, into, wheels)
    else:
        _collect_hub(corpus, listed, into)


def write_hub_list(path: Path, repository: str, names: Sequence[str]) -> None:
    """List files of a dataset with the hashes that the hub has of them. Raises UserError."""
    import huggingface_hub  # slow, and for this corpus alone

    info = huggingface_hub.HfApi().dataset_info(repository, files_metadata=True)
    there = {file.rfilename: file.lfs for file in info.siblings or []}
    files = []
    for name in names:
        if not (lfs := there.get(name)):
            raise UserError(f"{repository}: has no file {name}")
        files.append(HubFile(path=name, bytes=lfs.size, sha256=lfs.sha256))
    corpus = HubFiles(repository=repository, revision=info.sha or "", files=tuple(files))
    write_text(path, corpus.model_dump_json(indent=2) + "\n")


def _collect_hub(corpus: HubFiles, listed: Path, into: Path) -> None:
    import huggingface_hub  # slow, and for this corpus alone

    for file in corpus.files:
        place = into / file.path
        if place.exists():
            continue
        found = huggingface_hub.hf_hub_download(
            corpus.repository, file.path, repo_type="dataset", revision=corpus.revision
        )
        if (digest := _sha256_of(Path(found))) != file.sha256:
            raise UserError(f"{listed}: {file.path}: SHA-256 {digest}, not {file.sha256}; delete {found}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.abspath(found))


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_list(path: Path) -> None:
    """List what is installed from wheels of an index, unchanged; prints what is left out and why."""
    packages, left_out = [], []
    for name, found in sorted(_installed().items()):
        package = _describe(name, found.version, _files_of(found))
        if package.bytes < SMALLEST:
            continue
        if why := _unfit(found):
            left_out.append(f"{package.requirement} ({why})")
        else:
            packages.append(package)
    if not packages:
        raise UserError(f"{_site_packages()}: no package of {SMALLEST:,} bytes of Python that is as its wheel")
    lines = ",\n".join(f"  {package.model_dump_json()}" for package in packages)
    python = ".".join(platform.python_version_tuple()[:2])
    write_text(path, f'{{"python": "{python}", "packages": [\n{lines}\n]}}\n')
    print(f"{path}: {_size(packages)}")
    print(f"left out: {', '.join(left_out) or 'none'}", flush=True)


def _collect_packages(corpus: Packages, listed: Path, into: Path, wheels: Path | None) -> None:
    installed, missing, mistakes = _installed(), [], []
    wanted = {f"{p.name}-{p.version}-{p.sha256[:16]}": p for p in corpus.packages}
    for folder in into.iterdir():
        if folder.name not in wanted:
            shutil.rmtree(folder)
    for folder, package in wanted.items():
        if (into / folder).exists():
            continue
        files = _from_wheel(package, wheels) if wheels else {}
        is_wheel = bool(files)
        if not files and package.name in installed and installed[package.name].version == package.version:
            files = _files_of(installed[package.name])
        if (found := _describe(package.name, package.version, files)) == package:
            _write(files, into, folder)
        elif is_wheel:
            why = f"{wheels}: {package.requirement} has {counted(found.files, 'Python file')}, SHA-256 {found.sha256}"
            mistakes.append(f"{why}, and not the {package.files}, {package.sha256} of {listed}; delete that wheel")
        else:
            missing.append(package.requirement)
    if missing:
        pip = f"pip download --no-deps --dest wheels --python-version {corpus.python} {PLATFORM}"
        what = f"not installed here as listed: {', '.join(missing)}"
        mistakes.append(f"{listed}: {what}; run `{pip} {' '.join(missing)}` and add --wheels=wheels")
    if mistakes:
        raise UserError("\n".join(mistakes))
    print(f"{into}: {_size(corpus.packages)}", flush=True)


def _size(packages: list[Package] | tuple[Package, ...]) -> str:
    files, size = sum(p.files for p in packages), sum(p.bytes for p in packages)
    return f"{counted(len(packages), 'package')}, {counted(files, 'file')}, {size / 1e6:.1f} MB"


def _site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _installed() -> dict[str, Distribution]:
    """The distributions in site-packages by their name on PyPI."""
    found = distributions(path=[str(_site_packages())])
    return {re.sub(r"[-_.]+", "-", name).lower(): d for d in found if (name := d.metadata["Name"])}


def _wanted(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path.endswith(".py") and ".." not in parts and not NOT_INSTALLED.intersection(parts)


def _files_of(package: Distribution) -> Files:
    """The Python files that an installed package's RECORD names and that are there."""
    names = [str(file) for file in package.files or () if file.hash and _wanted(str(file))]
    return {name: path.read_bytes() for name in names if (path := _site_packages() / name).is_file()}


def _unfit(package: Distribution) -> str:
    """Why not everybody can get the same files from PyPI; "" if they can."""
    if "+" in package.version:
        return "a local version"
    if package.read_text("direct_url.json"):
        return "not from an index"
    for file in package.files or ():
        if not (file.hash and _wanted(str(file))):
            continue
        path = _site_packages() / file
        if not path.is_file():
            return f"{file} is missing"
        content = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        if base64.urlsafe_b64encode(content).rstrip(b"=").decode() != file.hash.value:
            return f"{file} was changed"
    return ""


def _from_wheel(package: Package, wheels: Path) -> Files:
    """The Python files in a package's wheel; none if the folder has no wheel of it."""
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if (re.sub(r"[-_.]+", "-", name).lower(), version) == (package.name, package.version):
            with zipfile.ZipFile(wheel) as archive:
                return {n: archive.read(name) for name in archive.namelist() if _wanted(n := _place(name))}
    return {}


def _place(name: str) -> str:
    """Where a wheel's file is installed, relative to site-packages."""
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and parts[0].endswith(".data"):
        return "/".join(parts[2:]) if parts[1] in ("purelib", "platlib") else "../" + name
    return name


def _describe(name: str, version: str, files: Files) -> Package:
    lines = sorted(f"{path} {hashlib.sha256(content).hexdigest()}\n" for path, content in files.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    size = sum(map(len, files.values()))
    return Package(name=name, version=version, files=len(files), bytes=size, sha256=digest)


def _write(files: Files, into: Path, folder: str) -> None:
    """Write a package's folder; it exists only when it is complete."""
    draft = into / f"{folder}.tmp"
    for name, content in files.items():
        path = draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.rename(draft, into / folder)
