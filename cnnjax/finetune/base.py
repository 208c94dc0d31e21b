"""Pretrained variables from wherever they were saved, and the digest by which they are known."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import checkpoint, manifest, step_directories, trained_model
from cnnjax.errors import UserError
from cnnjax.trees import named_leaves

Variables = dict[str, Any]
# What Orbax calls the file that describes the arrays of a directory.
ORBAX_METADATA = "_METADATA"


@dataclasses.dataclass(frozen=True)
class Base:
    """Pretrained variables.

    Attributes:
      source: where they were read, for messages.
      variables: `params` and `batch_stats`, nested dicts of NumPy arrays.
      card: the content of `model.json` if they are those of a run (trained here or converted),
        else `{}`.
      checksum: of all of them; see `variables_checksum`.
    """

    source: str
    variables: Variables
    card: dict[str, Any]
    checksum: str


def read_base(source: str | Path) -> Base:
    """Reads the variables of a run or checkpoint; no device takes part, and nothing else is read.

    Args:
      source: a directory: a run (trained here, fine-tuned here, or made by `python -m
        cnnjax.convert`), the `checkpoints` of a run, one step of them, or what Orbax saved of a
        tree with `params` and perhaps `batch_stats` (or of parameters alone). Where a run kept an
        average of the parameters, that is taken. A run gives the step that its summary names, other
        directories the newest that is undamaged.

    Raises:
      UserError: there is no such directory, or no variables in it.
    """
    directory = Path(source)
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory} to fine-tune from: name a run or a checkpoint "
            "directory; a file of weights is first made into a run by python -m cnnjax.convert."
        )
    card: dict[str, Any] = {}
    if (directory / "model.json").exists():
        trained = trained_model.load_trained(directory)
        if not _is_plain(trained.variables):
            raise UserError(
                f"{directory} is a model with adapters: fine-tune from the base of its own, "
                f"{trained.card['finetune']['base']}."
            )
        variables, card = trained.variables, trained.card
    elif step_directories.listed(directory):
        variables = _saved_variables(directory, None)
    elif (directory / manifest.NAME).exists():
        variables = _saved_variables(directory.parent, int(directory.name.partition(".")[0]))
    elif (directory / ORBAX_METADATA).exists():
        variables = _orbax_variables(directory)
    else:
        raise UserError(
            f"{directory} is no run (it has no model.json), no directory of checkpoints, and no "
            f"Orbax checkpoint (it has no {ORBAX_METADATA})."
        )
    return Base(str(directory), variables, card, variables_checksum(variables))


def variables_checksum(variables: Variables) -> str:
    """Returns the SHA-256 over every leaf's collection, path, dtype, shape and values."""
    digest = hashlib.sha256()
    for name in ("params", "batch_stats"):
        for path, leaf in sorted(named_leaves(variables.get(name, {})).items()):
            leaf = np.asarray(leaf)
            values = manifest.array_digest(leaf)
            digest.update(f"{name}/{path} {leaf.dtype} {leaf.shape} {values}\n".encode())
    return digest.hexdigest()


def _is_plain(variables: Variables) -> bool:
    return "frozen" not in variables


def _saved_variables(directory: Path, step: int | None) -> Variables:
    """Reads one of our checkpoints: the average where there is one, else the parameters."""
    names = checkpoint.item_names(directory, step=step)
    if "params" not in names:
        raise UserError(f"the checkpoints in {directory} hold no params, but {', '.join(names)}.")
    wanted = [name for name in ("params", "batch_stats", "ema") if name in names]
    items = checkpoint.restore_items(directory, wanted, step=step)
    return {
        "params": items.get("ema") or items["params"],
        "batch_stats": items.get("batch_stats") or {},
    }


def _orbax_variables(directory: Path) -> Variables:
    """Reads `params` and `batch_stats` of a tree that Orbax saved, on whatever devices."""
    import jax
    import orbax.checkpoint as ocp

    try:
        with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as reader:
            tree = reader.metadata(directory.absolute()).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
            wanted = wanted if "params" in wanted else tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            arguments = ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            )
            found = reader.restore(directory.absolute(), args=arguments)
    except Exception as error:  # Of many types, none of them documented.
        text = str(error).partition("\n")[0]
        raise UserError(
            f"Orbax cannot read {directory} ({type(error).__name__}: {text}): name a directory "
            "that holds a tree with params."
        ) from None
    if "params" not in wanted:
        found = {"params": found}
    return {"params": found["params"], "batch_stats": found.get("batch_stats", {})}
