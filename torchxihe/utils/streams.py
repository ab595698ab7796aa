"""Standard output and error that may be closed, full, or unable to encode a character."""

import errno
import io
import os
import sys


class Stream(io.TextIOWrapper):
    """A standard stream that never raises OSError or UnicodeEncodeError.

    A character that its encoding lacks is written as an escape. When writing fails (a closed pipe, a full disk), a
    `lasting` stream discards everything from then on; another ends the program: silently if the reader has closed the
    pipe, with one line on stderr otherwise, and with exit code 1.
    """

    def __init__(self, stream: io.TextIOWrapper, lasting: bool) -> None:
        """`stream`: the interpreter's, whose buffer this one takes over."""
        encoding, by_line, unbuffered = stream.encoding, stream.line_buffering, stream.write_through
        errors = "backslashreplace"
        super().__init__(stream.detach(), encoding, errors, line_buffering=by_line, write_through=unbuffered)
        self._lasting = lasting

    def write(self, text: str, /) -> int:
        """Write `text`; the number of characters."""
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Flush, unless the stream is closed."""
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Send what is buffered, and everything to come, to /dev/null."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if not self._lasting:
            raise SystemExit(1 if error.errno == errno.EPIPE else f"standard output: {error.strerror}")


def guard_streams(lasting: bool) -> None:
    """Replace `sys.stdout` (`lasting` or not) and `sys.stderr` (lasting) by streams that do not raise.

    Called first thing: a descriptor 0, 1 or 2 that is closed is opened on /dev/null, because the next file to be opened
    would get its number, and with it what libraries print.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(descriptor, "w", encoding="utf-8")  # None: was closed at the start
        setattr(sys, name, Stream(stream, lasting or name == "stderr"))
