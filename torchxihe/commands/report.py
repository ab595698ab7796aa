"""Write the report of a run as one HTML file."""

from pathlib import Path

from torchxihe.components.observe.metrics import METRICS
from torchxihe.errors import UserError
from torchxihe.page.report import report_html
from torchxihe.page.run_files import RunFiles
from torchxihe.parsers import parse
from torchxihe.utils.files import write_text

MARK = "<!-- torchxihe report -->"
"""The end of the files that this command writes, which it may replace."""


def main(args: list[str]) -> None:
    """Write it, and print its name. Raises UserError."""
    options = parse("report", args)
    run, out = options.run, options.out
    if not any((run / name).exists() for name in (METRICS, "config.toml", "logs")):
        raise UserError(f"{run}: has neither {METRICS} nor config.toml nor logs/; give the directory of a run")
    _check_output(out)
    try:
        write_text(out, report_html(str(run), RunFiles(run)) + MARK + "\n")
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}; name a file that can be written") from None
    print(out)


def _check_output(file: Path) -> None:
    """Raise UserError unless `file` can be written, and may."""
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: {file}: must end in .html")
    if file.is_dir() or (file.exists() and not file.is_file()):
        raise UserError(f"--out: {file}: is not a regular file; name another")
    if file.is_file() and not file.read_bytes().rstrip().endswith(MARK.encode()):
        raise UserError(
            f"--out: {file}: exists and was not written by torchxihe report; delete it or name another file"
        )
