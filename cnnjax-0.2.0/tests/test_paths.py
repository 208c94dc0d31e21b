"""The home directory, variables that are empty, and text files of every program."""

import codecs
import os
import pwd

import pytest

from cnnjax import paths
from cnnjax.errors import UserError

TEXT = "cat\ndög\n猫\n"
WRITTEN = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16 little": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16 big": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "windows": codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode(),
    "old mac": TEXT.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_text_is_read_whatever_wrote_it(tmp_path, name):
    (tmp_path / "names.txt").write_bytes(WRITTEN[name])
    assert paths.read_text(tmp_path / "names.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("dög".encode("latin-1"), r"is not UTF-8 \(byte 1 is 0xf6\): save it as UTF-8"),
        ("dog".encode("utf-16-le"), "is not text .*: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"dog", "is not UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8"),
        (None, "cannot read the list of classes '.*names.txt': No such file"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        paths.read_text(path, "list of classes")
    assert "names.txt" in str(error.value) and str(error.value).isprintable()


@pytest.fixture
def nobody(monkeypatch):
    """A user number that the system does not know, as in a container, without HOME."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", ["", "relative"])
def test_an_empty_home_is_none(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert str(paths.home_directory()) == pwd.getpwuid(os.getuid()).pw_dir


def test_empty_variables_are_not_set(monkeypatch):
    for name, value in {"HOME": "", "TMPDIR": " ", "XDG_CONFIG_HOME": "", "TEMP": "/x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TMP", raising=False)
    paths.forget_empty_variables()
    assert not {"HOME", "TMPDIR", "XDG_CONFIG_HOME", "TMP"} & set(os.environ)
    assert os.environ["TEMP"] == "/x"


def test_the_cache_is_in_an_absolute_directory_or_nowhere(monkeypatch, tmp_path, nobody):
    assert paths.cache_directory() is None
    monkeypatch.setenv("HOME", str(tmp_path))
    for empty in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", empty)
        assert paths.cache_directory() == tmp_path / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paths.cache_directory() == tmp_path / "cache"


def test_home_in_paths_and_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.expand("~") == str(tmp_path)
    assert paths.expand("~/a/b") == f"{tmp_path}/a/b"
    for same in ("a/~", "", "./~/a", "~no-such-user", "/a/~/b"):
        assert paths.expand(same) == same
    words = ["--out=~/x", "~/y", "--trainable=~head", "-3", "--out", "~", "folder:~/z", "a=~/b"]
    assert paths.expand_flags(words) == [
        f"--out={tmp_path}/x",
        f"{tmp_path}/y",
        "--trainable=~head",
        "-3",
        "--out",
        str(tmp_path),
        "folder:~/z",
        "a=~/b",
    ]


def test_without_a_home_a_path_in_it_is_refused(nobody):
    with pytest.raises(UserError, match=r"home directory for '~/a': set HOME"):
        paths.expand("~/a")
    assert paths.expand("/a") == "/a"
