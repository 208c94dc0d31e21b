"""What can be known of this installation without importing any package of it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax import paths
from cnnjax.devices import host
from cnnjax.doctor import accelerators, packages, probe

# What changes how JAX, XLA, CUDA, TensorFlow or cnnjax start.
PREFIXES = (
    *("JAX_", "XLA_", "CUDA_", "NVIDIA_", "TPU_", "LIBTPU_", "TFDS_", "CNNJAX_"),
    *("TF_CPP_", "TF_CUDNN_", "TF_ENABLE_", "TF_FORCE_", "TF_GPU_", "TF_XLA_"),
)
NAMES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME", "HOME")
# A variable of these may hold a secret: it is no matter of the report.
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")

Facts = dict[str, Any]


def collect(*, train: bool = True, timeout_secs: float = 120.0) -> Facts:
    """Returns all facts, as JSON has them; takes as long as the probe.

    Args:
      train: whether the probe trains, or only starts JAX.
      timeout_secs: after which a probe that has not ended is ended.
    """
    return {
        "cnnjax": {"version": cnnjax.__version__, "location": str(Path(cnnjax.__file__).parent)},
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "packages": packages.installed(),
        "unmet": packages.unmet(),
        "shadows": packages.shadows(os.getcwd()),
        "variables": variables(os.environ),
        "host": _host(),
        **accelerators.describe(),
        "directories": directories(),
        "datasets": datasets(),
        "probe": probe.run(train=train, timeout_secs=timeout_secs),
    }


def variables(environment: Any) -> dict[str, str]:
    """Returns the variables that change how things start, without what may be secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(PREFIXES) or name in NAMES)
        and not any(word in name.upper() for word in SECRET)
    }


def _host() -> dict[str, Any]:
    soft, hard = _descriptors()
    return {
        "processor": host.processor(),
        "cores": host.usable_cores(),
        "memory_bytes": host.memory_bytes(),
        "memory_available_bytes": _available_memory(),
        "descriptors": soft,
        "descriptors_limit": hard,
    }


def _descriptors() -> tuple[int | None, int | None]:
    """Returns how many files a process may have open: now, and at most; None: no limit."""
    try:
        import resource
    except ImportError:  # Windows.
        return None, None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, hard


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    available = next((1024 * int(kilobytes) for kilobytes in found), None)
    total = host.memory_bytes()
    return available if total is None or available is None else min(available, total)


def directories() -> list[dict[str, Any]]:
    """Returns what a run writes to and reads of: what, path, whether it can be, and free bytes.

    A directory that is not there is writable if it can be made.
    """
    cache = host.compilation_cache()
    named = [
        ("compile cache", None if cache is None else str(cache)),
        ("datasets", _expanded(paths.default_data_dir())),
        ("runs", os.path.join(os.getcwd(), "runs")),
        ("temporary files", _temporary()),
    ]
    return [_directory(what, path) for what, path in named]


def _directory(what: str, path: str | None) -> dict[str, Any]:
    if path is None:
        return {"what": what, "path": None, "exists": False, "writable": False, "free_bytes": None}
    there = Path(path)
    nearest = there
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        free = shutil.disk_usage(nearest).free
    except OSError:
        free = None
    return {
        "what": what,
        "path": path,
        "exists": there.exists(),
        "readable": os.access(nearest, os.R_OK | os.X_OK),
        "writable": nearest.is_dir() and can_write(nearest),
        "free_bytes": free,
    }


def can_write(directory: Path) -> bool:
    """Whether a file can be made there: tried, because of read-only disks and quotas."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def datasets() -> list[str]:
    """Returns the names of the datasets that are prepared, `mnist` among them: it is shipped."""
    found = {"mnist (shipped)"}
    directory = _expanded(paths.default_data_dir())
    try:
        infos = [] if directory is None else list(Path(directory).glob("*/**/dataset_info.json"))
    except OSError:
        infos = []
    for info in infos:
        found.add("tfds:" + str(info.parent.parent.relative_to(str(directory))))
    return sorted(found)


def _expanded(path: str) -> str | None:
    try:
        return paths.expand(path)
    except ValueError:  # No home directory.
        return None


def _temporary() -> str | None:
    try:
        return tempfile.gettempdir()
    except OSError:
        return None
