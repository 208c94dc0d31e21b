"""Installed packages as their metadata describe them: what is missing, does not fit, or is twice.

No package is imported but `packaging`, which reads versions, or the copy of it that pip carries.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a run stands on; others do not change whether it works.
WATCHED = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "ml-dtypes"),
    *("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "libtpu"),
    *("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("jax-rocm60-plugin", "jax-rocm7-plugin", "jax-metal"),
)
# What a file of this name in the working directory would hide.
IMPORTED = ("jax", "jaxlib", "flax", "optax", "orbax", "numpy", "scipy", "tensorflow", "cnnjax")


def installed() -> dict[str, list[dict[str, str]]]:
    """Returns each watched package -> its copies: version and location, the imported one first."""
    found: dict[str, list[dict[str, str]]] = {}
    seen = set()
    for distribution in importlib.metadata.distributions():
        name = _normal(_name(distribution))
        if name not in WATCHED:
            continue
        where = str(getattr(distribution, "_path", "?"))
        if os.path.realpath(where) in seen:
            continue
        seen.add(os.path.realpath(where))
        copy = {"version": _version(distribution), "location": str(Path(where).parent)}
        found.setdefault(name, []).append(copy)
    return dict(sorted(found.items()))


def unmet(roots: tuple[str, ...] = ("cnnjax", "jax", "flax", "optax")) -> list[dict[str, Any]]:
    """Returns the requirements of packages that what is installed does not meet.

    Each has `by` (with its version), `needs` (such as `jaxlib>=0.10`), and `found`, a version or
    None. Packages of `roots` that are missing are found by those that need them.
    """
    broken = []
    for root in roots:
        for requirement in _requirements(root):
            found = _installed_version(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                broken.append(
                    {
                        "by": f"{root} {_installed_version(root)}",
                        "needs": f"{requirement.name}{requirement.specifier}",
                        "found": found,
                    }
                )
    return broken


def shadows(directory: str) -> list[str]:
    """Returns the files of a directory that hide a package of the same name from programs there."""
    found = []
    for name in IMPORTED:
        file, package = Path(directory, f"{name}.py"), Path(directory, name, "__init__.py")
        mine = name == "cnnjax" and Path(__file__).is_relative_to(package.parent.resolve())
        found += [str(path) for path in (file, package) if path.exists() and not mine]
    return found


def _requirements(root: str) -> Iterator[Any]:
    """Yields the requirements of a package that hold here, without those of its extras."""
    packaging = _packaging()
    try:
        lines = importlib.metadata.requires(root) or []
    except importlib.metadata.PackageNotFoundError:
        return
    if packaging is None:
        return
    for line in lines:
        requirement = packaging.Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _packaging() -> Any:
    for name in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _installed_version(name: str) -> str | None:
    try:
        # Of a package whose removal was cut short the metadata are there, but not the version.
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError):
        return None


def _name(distribution: importlib.metadata.Distribution) -> str:
    try:
        return distribution.metadata["Name"] or ""
    except Exception:  # Metadata that were cut short: of many kinds.
        return ""


def _version(distribution: importlib.metadata.Distribution) -> str:
    try:
        return distribution.version or "?"
    except Exception:
        return "?"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
