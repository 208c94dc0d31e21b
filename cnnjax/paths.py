"""Paths, environment variables and text files that come from outside.

What a user names is opened by way of this module: `~` is the home directory in every path, an empty
variable is one that is not set, and a text file is read whatever program wrote it.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from cnnjax.errors import UserError

# A mark of UTF-32 starts with one of UTF-16: the longer ones come first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DIRECTORY_VARIABLES = (
    *("HOME", "TMPDIR", "TEMP", "TMP", "TFDS_DATA_DIR", "MPLCONFIGDIR"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"),
)
_HOME_IN_FLAG = re.compile(r"(?P<flag>--[\w-]+=)?(?P<path>~([\w.-]*/.*)?)", re.DOTALL)


def home_directory() -> Path | None:
    """Returns the user's home directory; None for a user without one.

    `HOME` where it is an absolute path, or what the system has for the user. Containers run under
    user numbers that the system does not know.
    """
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            import pwd

            home = pwd.getpwuid(os.getuid()).pw_dir
        except (ImportError, KeyError):
            home = os.environ.get("USERPROFILE", "")
    return Path(home) if os.path.isabs(home) else None


def expand(path: str | os.PathLike[str]) -> str:
    """Returns the path with the home directory for a leading `~`, as shells do.

    Raises:
      UserError: there is no home directory.
    """
    text = os.fspath(path)
    if text != "~" and not text.startswith(("~/", f"~{os.sep}")):
        # Of a user that the system does not know, `~name` is a file's name.
        return os.path.expanduser(text) if text.startswith("~") else text
    home = home_directory()
    if home is None:
        raise UserError(
            f"cannot find the home directory for {text!r}: set HOME, or write the whole path"
        )
    return os.path.join(home, text[2:]) if text[2:] else str(home)


def expand_flags(argv: Sequence[str] | None = None) -> list[str]:
    """Returns the words of a command line with `~` expanded: `--flag=~/x` too, which shells leave.

    Args:
      argv: without the program's name; by default the words that this program was started with.
    """
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        found = _HOME_IN_FLAG.fullmatch(word)
        words.append((found["flag"] or "") + expand(found["path"]) if found else word)
    return words


def cache_directory() -> Path | None:
    """Returns where programs keep what they can make again; None where there is no such place.

    That is `XDG_CACHE_HOME`, which counts only as an absolute path (XDG Base Directory
    Specification 0.8), or `.cache` in the home directory.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = home_directory()
    return None if home is None else home / ".cache"


def default_data_dir() -> str:
    """Where tfds keeps prepared datasets: `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return os.environ.get("TFDS_DATA_DIR", "").strip() or os.path.join("~", "tensorflow_datasets")


def forget_empty_variables() -> None:
    """Unsets the variables that name directories but are empty.

    That holds for this process and those that it starts. Libraries disagree about empty ones: to
    some, such a `HOME` is the root of the file system.
    """
    for name in _DIRECTORY_VARIABLES:
        if not os.environ.get(name, "set").strip():
            del os.environ[name]


def read_text(path: str | os.PathLike[str], what: str = "text file") -> str:
    r"""Returns the text of a file, its lines ended by `\n`.

    The file may be UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32 with one, and its
    lines may end as those of any system.

    Args:
      path: of the file.
      what: it is, for the error.

    Raises:
      UserError: it cannot be read, or is no such text.
    """
    name = expand(path)
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {name!r}: {error.strerror}") from None
    return decode_text(content, f"{what} {name!r}")


def decode_text(content: bytes, name: str) -> str:
    """Returns the text that the bytes of `name` hold: see `read_text`."""
    encoding = next((each for mark, each in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"the {name} is not {encoding.removesuffix('-sig').upper()} (byte {error.start} is "
            f"{content[error.start]:#04x}): save it as UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(f"the {name} is not text (it holds zero bytes): save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_shown(name: str, what: str) -> None:
    """Raises UserError for a name that no figure, terminal or text file can hold."""
    kinds = {unicodedata.category(char) for char in name}
    if kinds & {"Cs", "Cc", "Zl", "Zp"} or not name.strip():
        why = "is not UTF-8" if "Cs" in kinds else "has characters that cannot be shown"
        raise UserError(f"the name of the {what} {why}: {name!a}: rename it")
