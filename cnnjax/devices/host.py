"""The machine, as the system describes it: processor, memory, where compiled programs are kept.

JAX is neither imported nor needed, so that this can be asked where JAX does not work.
"""

import hashlib
import os
import platform
from pathlib import Path

from cnnjax import paths

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def processor() -> str:
    """Returns the name of the processor."""
    name = _processor_line("model name").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def processor_features() -> str:
    """Returns what the processor can do, as the system lists it."""
    return _processor_line("flags", "Features") or platform.processor()


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Returns the memory that this process may use, by its container or the machine."""
    limits = []
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # No such container, or one without a limit ("max").
    return min(limits, default=None)


def compilation_cache() -> Path | None:
    """Returns where compiled programs are kept; None where there is no such place.

    A directory of its own for each kind of processor: compiled CPU code fits no other kind.
    """
    base = paths.cache_directory()
    if base is None:
        return None
    fingerprint = hashlib.sha256(processor_features().encode()).hexdigest()[:12]
    return base / "cnnjax" / "xla" / f"{platform.machine()}-{fingerprint}"


def _processor_line(*names: str) -> str:
    """Returns the first line of Linux's description of the processor that starts so, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(names)), "")
