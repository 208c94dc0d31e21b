"""GPUs and TPUs as the system knows them, and the processes that hold them; without JAX."""

from __future__ import annotations

import csv
import glob
import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Where TPU chips are, by generation.
TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/accel/[0-9]*", "/dev/vfio/[0-9]*")
TPU_LOCK = "/tmp/libtpu_lockfile"
ANSWER_SECS = 10


def describe() -> dict[str, Any]:
    """Returns what is there and who uses it.

    Keys: `gpus` (name, driver, total and used megabytes), `gpu_processes` (pid, name, megabytes),
    `nvidia_devices` (device files, there even where the driver's tools are not), `tpu_chips` (their
    device files), `tpu_holders` (pid, command of other processes that have one open) and `tpu_lock`
    (libtpu's lock file, or None).
    """
    gpus = _nvidia("--query-gpu=name,driver_version,memory.total,memory.used")
    apps = _nvidia("--query-compute-apps=pid,process_name,used_memory")
    chips = sorted(path for pattern in TPU_CHIPS for path in glob.glob(pattern))
    return {
        "gpus": [
            {"name": name, "driver": driver, "total_mb": _number(total), "used_mb": _number(used)}
            for name, driver, total, used in (row for row in gpus if len(row) == 4)
        ],
        "gpu_processes": [
            {"pid": int(pid), "name": name, "used_mb": _number(used)}
            for pid, name, used in (row for row in apps if len(row) == 3)
            if pid.isdigit()
        ],
        "nvidia_devices": sorted(glob.glob("/dev/nvidia[0-9]*")),
        "tpu_chips": chips if _is_tpu(chips) else [],
        "tpu_holders": holders(chips),
        "tpu_lock": TPU_LOCK if os.path.exists(TPU_LOCK) else None,
    }


def holders(files: list[str]) -> list[dict[str, Any]]:
    """Returns the other processes that have one of these files open, as far as it may be seen."""
    if not files:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            opened = {os.readlink(link) for link in (process / "fd").iterdir()}
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue  # It has ended, or is another user's.
        if opened & set(files):
            found.append({"pid": int(process.name), "command": " ".join(words).strip()})
    return found


def _is_tpu(chips: list[str]) -> bool:
    """Other devices than TPUs are given to programs by /dev/vfio too: Google's vendor number."""
    if any(not chip.startswith("/dev/vfio") for chip in chips):
        return True
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    try:
        return bool(chips) and any(Path(v).read_text().strip() == "0x1ae0" for v in vendors)
    except OSError:
        return False


def _nvidia(query: str) -> list[list[str]]:
    """Returns the rows that NVIDIA's own tool prints; none where it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(done.stdout))]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]", as of a GPU in parts.
