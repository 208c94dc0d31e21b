"""Send runs to Weights & Biases or MLflow after their training: what they were not sent yet.

    cnnjax track --run RUN --track mlflow
    cnnjax track --run RUN1 RUN2 --track wandb mlflow --checkpoints tested

For runs that trained without `--track`, without a network, or whose tracker did not answer. A run
that was tracked goes on as the same one. W&B is offline unless WANDB_MODE or a key says otherwise;
MLflow's store is MLFLOW_TRACKING_URI, or MLflow's default in this directory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from cnnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs are sent where."""

    run: tuple[str, ...]
    """Directories of runs."""

    track: tuple[str, ...]
    """wandb, mlflow or both."""

    checkpoints: Literal["none", "tested", "all"] = "none"
    """Checkpoints to keep as artifacts: none, the one that was tested, or all there are."""


def main(config: Config) -> int:
    """Sends the runs; returns the exit code.

    Raises:
      UserError: no such run or tracker, a run that is being sent, or a tracker that fails.
    """
    from cnnjax.run import record
    from cnnjax.run.tracking import facts, follower, followers

    if not config.run or not config.track:
        raise UserError("give --run RUN and --track wandb or mlflow.")
    followers.check(config.track)
    directories = [Path(each) for each in config.run]
    for directory in directories:
        facts.of_run(directory)
    for directory in directories:
        status = "finished" if (directory / record.SUMMARY).exists() else "stopped"
        for tracker in dict.fromkeys(config.track):
            with follower.only_follower(directory, tracker, wait=False):
                sent = _send(follower.follow, tracker, directory, config.checkpoints, status)
            steps = ", ".join(f"{kind} to step {step}" for kind, step in sent.steps.items())
            print(f"{tracker:<12} {sent.place}: {steps or 'no metrics yet'}")
    return 0


def _send(follow, tracker: str, directory: Path, checkpoints: str, status: str):
    try:
        return follow(
            tracker, directory, checkpoints=checkpoints, ended=lambda: status, patient=False
        )
    except UserError:
        raise
    except Exception as error:  # Of many kinds: whatever the tracker's library raises.
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{tracker} fails ({type(error).__name__}: {text}): check its address and key, then "
            "try again; nothing that was sent is lost."
        ) from error
