"""A run at Weights & Biases, or in an offline folder of it for `wandb sync`.

Online where `WANDB_MODE` or a key that W&B finds says so; offline elsewhere: then nothing leaves
the machine, and the folder lies in the run's directory under `tracking/wandb`. A run that is
resumed offline gets one more folder with the same identifier: `wandb sync` joins them.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cnnjax import paths
from cnnjax.run.tracking import DIRECTORY, facts
from cnnjax.run.tracking.sent import Record, Sent, scalars

PROJECT = "cnnjax"
SERVER = "https://api.wandb.ai"
ANSWER_SECS = 30


class WandbRun:
    """An open run of W&B. Arguments as for `cnnjax.run.tracking.follower.open_run`."""

    def __init__(self, directory: Path, sent: Sent, trainer_pid: int | None):
        import wandb

        self._wandb, self._directory = wandb, directory
        mode = _mode()
        if not sent.clean and mode == "offline":
            # What a killed process had not written to its folder is not known: all is written once
            # more, under the same steps.
            sent.steps.clear()
        sent.key = sent.key or secrets.token_hex(4)
        described = facts.of_run(directory)
        folder = directory.absolute() / DIRECTORY
        folder.mkdir(exist_ok=True)
        (folder / "wandb").mkdir(exist_ok=True)  # Without it W&B takes the system's temporary one.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or described.name,
            group=os.environ.get("WANDB_RUN_GROUP") or described.experiment,
            id=sent.key,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config={
                **described.settings,
                "versions": described.versions,
                "run": described.tags,
            },
            allow_val_change=True,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=ANSWER_SECS,
                x_stats_pid=trainer_pid or os.getpid(),
                x_stats_sampling_interval=5.0,
            ),
        )
        sent.where = mode
        sent.place = self._run.url or f"offline in {Path(self._run.dir).parent}"

    def log(self, records: list[Record]) -> None:
        """Sends records in the order in which they were written."""
        for record in records:
            step = record["step"]
            self._run.log({**scalars(record), "step": step}, step=step)

    def sample(self, number: int) -> None:
        """The system's metrics are W&B's own business."""

    def figure(self, path: Path, step: int) -> None:
        """Sends a figure."""
        self._run.log({f"figures/{path.stem}": self._wandb.Image(str(path))}, step=step)

    def file(self, path: Path) -> None:
        """Sends a file of the run."""
        # A copy: of a file elsewhere W&B keeps a link, which dangles once the folder is moved.
        copy = Path(self._run.dir) / path.name
        shutil.copyfile(path, copy)
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def checkpoint(self, path: Path) -> None:
        """Keeps a step directory as an artifact."""
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
        artifact.add_dir(str(path), name=path.name)
        card = self._directory / "model.json"
        if card.exists():
            artifact.add_file(str(card))
        self._run.log_artifact(artifact, aliases=[f"step-{int(path.name.partition('.')[0])}"])

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the run: `finished`, `stopped` or `killed`."""
        self._run.summary.update({name: value for name, value in summary.items() if value != ""})
        self._run.summary["ended"] = summary.get("ended", status)
        self._run.finish(exit_code=1 if status == "killed" else 0)


def _mode() -> Any:
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _has_login() else "offline"


def _has_login() -> bool:
    """Whether `wandb login` has left a key for the server in use."""
    home = paths.home_directory()
    file = os.environ.get("NETRC") or (str(home / ".netrc") if home else "")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER).hostname or ""
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
