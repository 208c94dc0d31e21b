"""The flags of `cnnjax serve` that say what traffic is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from cnnjax.serve.measures import Measures
    from cnnjax.serve.models import Source
    from cnnjax.serve.watch.observer import Watch


@dataclasses.dataclass(frozen=True)
class Watching:
    """What traffic is compared with."""

    watch: bool = True
    """Compare images and answers with the run's reference.npz, if it has one, and take labels."""

    watch_embeddings: bool = True
    """Compare what enters the network's head, too; takes up to a fifth of a core."""

    reference: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """For a model that is a file: NAME=RUN, the run that it was exported from."""


def runs_of(watching: Watching, sources: Sequence[Source]) -> dict[str, str]:
    """Returns the runs whose references are for models that are files, by the models' names.

    Raises:
      UserError: a reference of no model, or that is not there.
    """
    from cnnjax.errors import UserError, unknown_name
    from cnnjax.paths import expand
    from cnnjax.run.report import REFERENCE

    runs = {}
    for text in watching.reference:
        name, _, run = text.partition("=")
        if not run:
            raise UserError(f"--reference {text}: write NAME=RUN.")
        if name not in {source.name for source in sources}:
            raise unknown_name("model", name, {source.name for source in sources})
        if not (Path(expand(run)) / REFERENCE).exists():
            raise UserError(
                f"--reference {text}: {run} has no {REFERENCE}: make it by cnnjax serve-reference "
                f"--run {run}"
            )
        runs[name] = run
    return runs


def check_references(watching: Watching, sources: Sequence[Source]) -> None:
    """Raises a UserError for a reference of no model, that is not there, or that is damaged."""
    from cnnjax.evaluation.references import read_reference
    from cnnjax.paths import expand
    from cnnjax.run.report import REFERENCE

    runs = runs_of(watching, sources)
    for source in sources if watching.watch else ():
        path = Path(expand(runs.get(source.name, source.path))) / REFERENCE
        if path.exists():
            read_reference(path)


def watch_of(watching: Watching, sources: Sequence[Source], measures: Measures) -> Watch | None:
    """Returns what watches these models; None where nothing is to be watched.

    Raises:
      UserError: a reference that is damaged, of no model, or not there.
    """
    from cnnjax.serve.logs import log
    from cnnjax.serve.watch.observer import Watch, open_watched

    runs = runs_of(watching, sources)
    if not watching.watch:
        return None
    watched = {}
    for source in sources:
        run = runs.get(source.name, source.path)
        found = open_watched(run, embeddings=watching.watch_embeddings)
        if found.reference is None:
            log("drift_not_watched", model=source.name, why="no reference: cnnjax serve-reference")
        watched[source.name, source.version] = found
    return Watch(watched, measures.registry, say=lambda event: log(**event))
