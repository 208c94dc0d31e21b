"""How a program ends: one line for a mistake, a code for each end, and stops that are asked for."""

import contextlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from cnnjax import paths
from cnnjax.devices import processes
from cnnjax.devices.channel import PEER_LOST_EXIT_CODE, PeerLost
from cnnjax.errors import UserError
from cnnjax.run.files import CANNOT_WRITE

USAGE_EXIT_CODE = 2
# 128 + the signal's number, as shells report it; schedulers requeue on it.
INTERRUPT_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
# 128 + SIGPIPE, as shells report a program whose reader has gone.
BROKEN_PIPE_EXIT_CODE = 141

# Without these nothing is computed.
FOUNDATIONS = ("jax", "jaxlib", "flax", "optax", "orbax", "numpy", "scipy", "ml_dtypes")
DOCTOR = "cnnjax doctor says what is wrong with this installation, and the mend"


@contextlib.contextmanager
def one_line_errors():
    """Turns a `UserError` into one line on stderr and exit code 2.

    So does it what no program here can mend: a platform that JAX has not got, a path that cannot be
    used, a full disk. Where the reader of the output has gone the program ends quietly.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    paths.forget_empty_variables()
    try:
        with output_errors(), _platform_errors():
            yield
    except PeerLost:
        processes.end(PEER_LOST_EXIT_CODE)
    except UserError as error:
        if os.environ.get("CNNJAX_TRACEBACK"):
            raise
        with contextlib.suppress(OSError):  # The code says it where nobody reads.
            print(f"error: {error}", file=sys.stderr)
        processes.end(USAGE_EXIT_CODE)


@contextlib.contextmanager
def _platform_errors():
    """Where JAX fails, says so if that is because it has no device to compute on."""
    try:
        yield
    except ImportError as error:
        _check_import(error)
        raise
    except (RuntimeError, AssertionError, AttributeError) as error:
        if "jax" not in sys.modules:
            _check_import(error)  # JAX refuses a jaxlib of another version so.
            raise
        from cnnjax.devices import backend

        backend.check_platform(error)
        error.add_note(f"({DOCTOR})")
        raise


def _check_import(error: Exception) -> None:
    """Raises a UserError if what failed is the import of a package that everything stands on."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if package not in FOUNDATIONS and "jaxlib" not in str(error):
        return
    text = " ".join(str(error).split()).rstrip(".")
    raise UserError(f"cannot import {package or 'jax'} ({text}): {DOCTOR}") from error


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Ends the program quietly where the reader of its output has gone, as after `| head -1`.

    Raises:
      UserError: what it printed cannot be written, such as to a full disk; or a file cannot.
    """
    if sys.stdout is None:  # It was closed, as by `>&-`.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the program lives
    try:
        try:
            yield
        finally:
            # What is still in the buffer would be lost later on, and with a traceback.
            sys.stdout.flush()
    except BrokenPipeError:
        if not (_reader_left(sys.stdout) or _reader_left(sys.stderr)):
            raise
        _discard_output()
        # Other processes of the run would wait for this one: they end too.
        processes.end(BROKEN_PIPE_EXIT_CODE if processes.count() == 1 else 1)
    except OSError as error:
        if error.filename is not None:
            raise UserError(
                f"cannot use {error.filename}: {error.strerror or error}; choose another path, or "
                "mend this one."
            ) from error
        if error.errno not in CANNOT_WRITE:
            raise
        _discard_output()
        raise UserError(
            f"cannot write what is printed ({error.strerror}): free some space, or print it "
            "elsewhere."
        ) from error


def _reader_left(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return True  # There is nothing to ask: the error itself says so.


def _discard_output() -> None:
    """Sends what is still in the buffer nowhere: Python would fail over it once more at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Within this context SIGINT and SIGTERM are noted instead of obeyed; a second one is obeyed.

    Yields a function that returns the name of the signal received, or None.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may listen to signals; elsewhere they are whoever's that is there.
        yield lambda: None
        return

    def note(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(signal.Signals(number).name)
        print(f"\n{received[0]}: saving and stopping; once more to stop at once", file=sys.stderr)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
