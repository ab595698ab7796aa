"""What a user did and can fix, as one line; and the operating system's errors in the same form."""

import errno
import shutil


class UserError(ValueError):
    """What a user did and can mend: one line a mistake, naming the file, the key and the remedy. Exit code 1."""


REMEDIES = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some space and run again",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "raise the limit: ulimit -n",
    errno.ENFILE: "raise the limit of the system: sysctl fs.file-max",
}


def explained(error: OSError, where: object = "a file") -> UserError:
    """An error of the disk as the one line that a user can act upon; `where` it was, if the error does not say."""
    if isinstance(error, shutil.Error):  # of copytree: a list of (from, to, why)
        _, place, why = error.args[0][0]
        return UserError(f"{place}: {why}; mend it and run again")
    if error.errno is None:  # one of ours, which says everything itself
        return UserError(str(error) or type(error).__name__)
    what = error.strerror or type(error).__name__
    return UserError(f"{error.filename or where}: {what}; {REMEDIES.get(error.errno, 'mend it and run again')}")
