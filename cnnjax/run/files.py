"""Files under other processes, signals, full disks and readers that leave."""

import contextlib
import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnnjax.devices import processes
from cnnjax.errors import UserError
from cnnjax.paths import read_text

# What a full disk, a quota, a size limit, a read-only or a broken file system answer.
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTDIR}


def make_directory(
    directory: Path, what: str = "the run directory", flag: str = "--run-dir"
) -> None:
    """Creates a directory; a UserError that names it if it cannot be written.

    Args:
      directory: it may exist.
      what: it is, for the message.
      flag: that names another one.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {what} {directory}: {error.strerror}; choose another {flag}."
        ) from None


def new_directory(path: Path) -> Path:
    """Creates a directory of this name, or with a number behind it if it is there, and returns it.

    Two processes that ask at the same moment get two.
    """
    number, candidate = 1, path
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        except OSError as error:
            raise UserError(
                f"cannot write the run directory {candidate}: {error.strerror}; choose another by "
                "--run-dir."
            ) from None


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
    """Turns what a full or read-only disk does to the files of a run into one `UserError`.

    A directory that nothing was written into is removed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write {error.filename or directory} ({error.strerror}): free some space or "
            f"mend the disk, then continue with --resume {directory}. What was saved is untouched."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            directory.rmdir()  # Only an empty one.


def write_json(path: Path, content: Any, *, mode: int = 0o666) -> None:
    """Writes JSON so that a crash leaves the old file or the new one, never half of one.

    Args:
      path: of the file, whose directory is made.
      content: of it.
      mode: its permissions, of which the umask takes some away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(temporary, flags, mode), "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # A full disk stays full if what was begun stays.
        raise


def read_json(path: Path, problem: str) -> dict[str, Any]:
    """Returns the content of a JSON file; a UserError that starts with `problem` if it has none."""
    if not os.path.exists(path):
        raise UserError(f"{problem}: there is no {path}.")
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{problem}: cannot read {path} ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{problem}: {path} holds {type(content).__name__}, not names and values.")
    return content


def figures(directory: Path) -> list[Path]:
    """Returns the figures of a run, by name."""
    return sorted((directory / "figures").glob("*.png"))


def share_directory(directory: Path) -> None:
    """Makes the run directory; a UserError if it cannot be written or a process does not see it."""
    if processes.is_first():
        make_directory(directory)
    processes.exchange("run directory made", None)
    if not directory.is_dir():
        raise UserError(
            f"process {processes.index()} does not see the run directory {directory} that "
            "process 0 made: put --run-dir on a file system that all processes share."
        )


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file; of a folder or a checkpoint, that of names and digests."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files_of = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}.*")
    lines = [f"{digest(each)} {each.name}" for each in sorted(files_of) if each.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
