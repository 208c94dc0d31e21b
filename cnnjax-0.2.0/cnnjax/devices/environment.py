"""The environment of a run: versions, devices, flags, commit; and what changing them may alter."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax.devices import backend

PACKAGES = ("cnnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The options of JAX that change values or the programs that compute them.
JAX_OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
)
# Variables that JAX and XLA read before they start.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_CUDNN_DETERMINISTIC", "NVIDIA_TF32_OVERRIDE")
ROUNDING = "compiled code may round differently: bits may differ"
EFFECTS = {
    "python": "nothing that is computed depends on it",
    "numpy": "it draws the order of the data: if that changed, so does what follows",
    "orbax-checkpoint": "it stores arrays and computes nothing: bits stay",
    "flax": "layers or their initialization may be computed differently: bits may differ",
    "optax": "updates may be computed differently: bits may differ",
    "cnnjax": "the steps may be computed differently: bits may differ",
}
Environment = dict[str, Any]


def describe() -> Environment:
    """Returns what the results of this process depend on, besides its settings and data.

    Keys: `versions` of Python and of `PACKAGES`, `devices` in one line, `flags` (those of
    `VARIABLES` that are set), `jax` (`JAX_OPTIONS`), and `code`: for cnnjax and for the program
    that runs, where they lie in git, the commit and a digest of what is not committed ("" if
    nothing is). JSON holds all of it. JAX is started.
    """
    import jax

    return {
        "versions": versions(),
        "devices": backend.describe(),
        "flags": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "jax": {name: getattr(jax.config, name) for name in JAX_OPTIONS},
        "code": _commits(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that what is saved depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def changes(before: Environment, now: Environment) -> list[str]:
    """Returns one line for each difference between two environments: what, and what it may do."""
    lines = [
        f"{name} {old} -> {new}: {EFFECTS.get(name, ROUNDING)}"
        for name, old, new in _different(before["versions"], now["versions"])
    ]
    if before["devices"] != now["devices"]:
        lines.append(
            f"devices {before['devices']} -> {now['devices']}: sums are made in another order: "
            "bits may differ"
        )
    for kind in ("flags", "jax"):
        lines += [
            f"{name} {old!r} -> {new!r}: {ROUNDING}"
            for name, old, new in _different(before[kind], now[kind])
        ]
    for name, old, new in _different(before["code"], now["code"]):
        if old and new:
            lines.append(
                f"code of {name} {_commit_text(old)} -> {_commit_text(new)}: it may compute "
                "something else"
            )
    return lines


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*before, *now])
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]


def _commit_text(commit: Mapping[str, str]) -> str:
    changed = commit["uncommitted"]
    return commit["commit"][:10] + (f" with changes {changed[:6]}" if changed else "")


@functools.cache  # Code is read once, when it is imported: its state then is what counts.
def _commits() -> dict[str, dict[str, str] | None]:
    folders = {"cnnjax": Path(cnnjax.__file__).parent}
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program:
        folders["the program"] = Path(program).absolute().parent
    return {name: _commit(folder) for name, folder in folders.items()}


def _commit(folder: Path) -> dict[str, str] | None:
    """Returns the commit of a checkout and a digest of its changes, or None outside of git."""
    commit = _git(folder, "rev-parse", "HEAD")
    # A folder that git ignores, such as an environment inside a checkout, is not of that checkout.
    if commit is None or _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    changed = _git(folder, "diff", "HEAD", "--no-ext-diff", "--binary") or b""
    listed = _git(folder, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py") or b""
    for name in listed.split(b"\0")[:-1]:
        with contextlib.suppress(OSError):
            changed += name + (folder / os.fsdecode(name)).read_bytes()
    digest = hashlib.sha256(changed).hexdigest() if changed else ""
    return {"commit": commit.decode().strip(), "uncommitted": digest}


def _git(folder: Path, *arguments: str) -> bytes | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        # Without locks: a run must not be in the way of who works in the checkout.
        variables = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, timeout=10, env=variables)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
