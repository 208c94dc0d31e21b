"""A network as a page: a folder that opens without a server, and runs the network in the browser.

    web.write(Path("page"), forward_of(model), variables, signature, metadata=said)

The network is an ONNX file, and ONNX Runtime Web (MIT license, https://onnxruntime.ai) runs it, by
WebAssembly on one thread. Both are in scripts, as text: of a page that is a file on a disk browsers
fetch nothing else. The runtime is not part of cnnjax; `find_runtime` says where it comes from.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.export.program import Forward, Signature, Variables
from cnnjax.paths import cache_directory, expand, read_text

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
# What the page needs of the package's folder `dist`, with the SHA-256 of each.
LOADER, GLUE, WASM = (
    "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
SHA256 = {
    LOADER: "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    GLUE: "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
REMEDY = f"run npm pack {PACKAGE}@{VERSION}, and give --runtime {ARCHIVE}"
NPM_TIMEOUT_SECS = 300
PAGE = Path(__file__).parent / "page"
MODEL, MODEL_NAME = "model.js", "CNNJAX_MODEL"
PREPARE = ("digit", "image")


def write(
    path: Path,
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    metadata: Mapping[str, Any],
    runtime: str = "",
) -> None:
    """Writes the page of a classifier: `index.html`, and all that it needs beside it.

    Args:
      path: of the folder, which is made.
      forward: `forward(variables, image) -> logits`.
      variables: its arrays.
      signature: of the images: uint8 as they are stored.
      metadata: as `preprocessing.metadata` makes it of a classifier's run, with `prepare`: `digit`
        (written on the page, prepared as MNIST was) or `image` (chosen or dropped); `fit` says how.
      runtime: see `find_runtime`.

    Raises:
      UserError: no runtime, images of another type, or an operation that ONNX does not have.
    """
    from cnnjax.export import onnx_model

    files = find_runtime(runtime)
    said = _described(metadata, signature)
    content = onnx_model.make(forward, variables, signature, metadata=metadata)
    said["onnx"] = _base64(content.SerializeToString())
    path.mkdir(parents=True, exist_ok=True)
    for part in sorted(PAGE.iterdir()):
        shutil.copyfile(part, path / part.name)
    (path / MODEL).write_text(_script(MODEL_NAME, said))
    (path / "runtime").mkdir(exist_ok=True)
    (path / "runtime" / LOADER).write_bytes(files[LOADER])
    glue, packed = files[GLUE].decode(), gzip.compress(files[WASM], mtime=0)
    (path / "runtime" / "glue.js").write_text(_script("CNNJAX_GLUE", glue))
    (path / "runtime" / "wasm.js").write_text(_script("CNNJAX_WASM", _base64(packed)))


def read_onnx(path: Path) -> bytes:
    """Returns the ONNX file that is in a page; a UserError if the folder is no page."""
    start = f"globalThis.{MODEL_NAME} = "
    text = read_text(path / MODEL, "page's model")
    if not text.startswith(start):
        raise UserError(f"{path / MODEL} is not a model that cnnjax wrote: export the page again.")
    return base64.b64decode(json.loads(text.removeprefix(start).rstrip().removesuffix(";"))["onnx"])


def is_page(path: Path) -> bool:
    """Returns whether a folder is a page that may be written over."""
    return (path / MODEL).exists() and (path / "index.html").exists()


def find_runtime(source: str = "") -> dict[str, bytes]:
    """Returns the files of ONNX Runtime Web by name, each of the SHA-256 that is known.

    Args:
      source: the package's archive (`npm pack` writes it) or its folder, such as
        `node_modules/onnxruntime-web`. By default the archive in cnnjax's cache directory, where
        `npm pack` puts it if it is not there and npm is installed.

    Raises:
      UserError: it is not there, cannot be fetched, or has other content.
    """
    if source:
        place = Path(expand(source))
        if not place.exists():
            raise UserError(f"--runtime {source}: there is no such file or folder; {REMEDY}.")
        return _verified(_read(place), place)
    cache = cache_directory()
    archive = None if cache is None else cache / "cnnjax" / ARCHIVE
    if archive is None or not archive.exists():
        archive = _fetched(archive)
    return _verified(_read(archive), archive)


def _fetched(archive: Path | None) -> Path:
    npm = shutil.which("npm")
    if npm is None or archive is None:
        raise UserError(
            f"the page needs {PACKAGE} {VERSION}, and npm, which fetches it, is not installed: "
            f"elsewhere {REMEDY}."
        )
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
        command += ["--pack-destination", str(archive.parent)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECS, check=False
        )
        why = done.stderr.strip().partition("\n")[0] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why or not archive.exists():
        raise UserError(
            f"npm could not fetch {PACKAGE} {VERSION} ({why or 'no file'}): elsewhere {REMEDY}."
        )
    print(f"fetched   {archive}, by npm")
    return archive


def _read(place: Path) -> dict[str, bytes]:
    """Returns those of the files that an archive or folder has."""
    if place.is_dir():
        folders = (place, place / "dist", place / "package" / "dist")
        found = [folder / name for folder in folders for name in SHA256]
        return {path.name: path.read_bytes() for path in found if path.is_file()}
    try:
        with tarfile.open(place) as archive:
            members = {name: archive.extractfile(f"package/dist/{name}") for name in SHA256}
            return {name: file.read() for name, file in members.items() if file is not None}
    except (KeyError, tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{place} is no archive of {PACKAGE} ({error}): {REMEDY}.") from None


def _verified(found: dict[str, bytes], place: Path) -> dict[str, bytes]:
    for name, digest in SHA256.items():
        if name not in found:
            raise UserError(f"{place} has no {name}, which {PACKAGE} {VERSION} has: {REMEDY}.")
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise UserError(
                f"{name} of {place} is not that of {PACKAGE} {VERSION} (SHA-256 {digest[:12]}...): "
                f"delete it, {REMEDY}."
            )
    return found


def _described(metadata: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """Returns what the page knows of the network besides its file."""
    from cnnjax.data.image_files import parse_fit

    if signature.dtype != "uint8":
        raise UserError("a page gives the network uint8 images: leave --preprocess out.")
    prepare = metadata.get("prepare", "image")
    kind, how = parse_fit(metadata.get("fit", "pad"))
    fit = {"kind": kind, **(dataclasses.asdict(how) if kind == "center" else {"share": how})}
    model = metadata.get("model", "network")
    return {
        "title": f"{metadata.get('run', 'A network')}: {model}",
        "facts": f"Written by cnnjax; run by ONNX Runtime Web {VERSION} (MIT license, Microsoft).",
        "class_names": list(metadata["class_names"]),
        "image_shape": list(signature.shape),
        "prepare": prepare,
        "fit": fit,
    }


def _script(name: str, value: Any) -> str:
    return f"globalThis.{name} = {json.dumps(value)};\n"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
