"""A run directory among other processes and on disks that fill up: who writes, and what fails."""

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from cnnjax.errors import UserError

# What a full disk, a quota, a size limit, a read-only or a broken file system answer.
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTDIR}


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keeps other processes from writing to a run while this one does, for as long as it lives.

    Raises:
      UserError: another process is training there.
    """
    try:
        import fcntl
    except ImportError:  # Windows.
        yield
        return
    with (directory / ".lock").open("a+") as file:
        try:
            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{directory} is being trained by {file.read().strip() or 'another process'}: wait "
                "for it or stop it first."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            # A file system without locks: then it is up to the user.
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def writing_errors(directory: Path) -> Iterator[None]:
    """Turns what a full or read-only disk does to the files of a run into one `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write {error.filename or directory} ({error.strerror}): free some space or "
            f"mend the disk, then continue with --resume {directory}. What was saved is untouched."
        ) from error
