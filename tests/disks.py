"""File systems of a test's own: small ones, and some that nobody can write to."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def mounted(disk, options):
    """Yields the directory `disk`, a file system in memory; skips where mounting needs root."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
