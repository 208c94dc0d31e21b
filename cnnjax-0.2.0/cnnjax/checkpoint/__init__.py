"""Checkpoints: a step directory is whole and verified by digest, or ignored.

`saver` is the interface, `arrays` writes and reads leaves, `directories` knows which steps are
complete, `manifest` holds the digests. Orbax is imported by the functions that need it.
"""

from cnnjax.checkpoint.saver import (
    Saver,
    best,
    check_space,
    clean,
    item_names,
    latest,
    read_meta,
    restore,
    restore_items,
    save,
    state_bytes,
    steps,
)

__all__ = [
    "Saver",
    "best",
    "check_space",
    "clean",
    "item_names",
    "latest",
    "read_meta",
    "restore",
    "restore_items",
    "save",
    "state_bytes",
    "steps",
]
