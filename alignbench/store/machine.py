"""What alignbench needs of the machine that it runs on: what is missing is one line, which names what to set."""

from __future__ import annotations

import errno
import getpass
import locale
import os
import sys
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, *DISK_FULL)


def obstacle() -> str | None:
    """Return one line on what keeps this process from working, whatever it is asked for; None if nothing does."""
    if sys.flags.optimize:
        return "PYTHONOPTIMIZE (or -O) is set: Python drops the checks and docstrings that are relied on; unset it"
    if (encoding := locale.getpreferredencoding(False)).replace("-", "").lower() != "utf8":
        return f"the text encoding of this locale is {encoding}, and files are UTF-8; set PYTHONUTF8=1"
    try:
        Path.home()
    except RuntimeError:
        return f"HOME is not set, and user {user()} has no entry in /etc/passwd; set HOME to a folder of this user"
    try:
        os.getcwd()
    except OSError as error:
        return f"the current folder cannot be used ({error.strerror}); change to another one"
    return None


def user() -> str:
    """Return the name of the user; the number if it has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def denial(error: OSError) -> str | None:
    """Return one line for an error that the machine causes, not the program; None for others."""
    why = error.strerror or str(error)
    if error.errno == errno.ENOENT and error.filename is None:  # as raised by tempfile
        return f"{why}; set TMPDIR to a folder that can be written"
    if error.filename is None:  # no file of ours: the standard output
        return f"the output cannot be written: {why}" if error.errno in DISK_FULL else None
    if error.errno not in DENIED:
        return None
    instead = "fix that, or name another folder (--store, --out, HOME, TMPDIR, ALIGNBENCH_CACHE)"
    return f"{error.filename}: {why}; {instead}"
