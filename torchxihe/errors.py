"""Errors of the user, and of the operating system in the same form: one line with a remedy."""

import errno
import shutil


class UserError(ValueError):
    """A user's mistake: one line per mistake, naming file, key and remedy. Exit code 1."""


class LostPeerError(UserError):
    """Another process of the run has exited, and has said why. In an elastic run the rest continues without it."""


REMEDIES = {
    errno.ENOSPC: "free some space and rerun",
    errno.EDQUOT: "free some space and rerun",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "raise the limit: ulimit -n",
    errno.ENFILE: "raise the limit of the system: sysctl fs.file-max",
}


def explained(error: OSError, where: object = "a file") -> UserError:
    """An operating system error as one line with a remedy; `where` it happened, if the error names no file."""
    if isinstance(error, shutil.Error):  # of copytree: a list of (from, to, why)
        _, place, why = error.args[0][0]
        return UserError(f"{place}: {why}; fix it and rerun")
    if error.errno is None:  # one of ours, which says everything itself
        return UserError(str(error) or type(error).__name__)
    what = error.strerror or type(error).__name__
    return UserError(f"{error.filename or where}: {what}; {REMEDIES.get(error.errno, 'fix it and rerun')}")
