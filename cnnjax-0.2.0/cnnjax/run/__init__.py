"""A whole run: its directory, settings, start or resume, report, and its model read back.

The outermost room: only here is the whole config known.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "again",
        "checks",
        "classifier",
        "cli",
        "exits",
        "files",
        "finish",
        "groups",
        "help",
        "load",
        "logs",
        "recipe",
        "record",
        "report",
        "scoring",
        "settings",
        "state",
        "trainer",
        "training",
        "verify_resume",
        "writer",
    ),
    {"training": ("Trained", "train")},
)

if TYPE_CHECKING:
    from cnnjax.run import again as again
    from cnnjax.run import checks as checks
    from cnnjax.run import classifier as classifier
    from cnnjax.run import cli as cli
    from cnnjax.run import exits as exits
    from cnnjax.run import files as files
    from cnnjax.run import finish as finish
    from cnnjax.run import groups as groups
    from cnnjax.run import help as help
    from cnnjax.run import load as load
    from cnnjax.run import logs as logs
    from cnnjax.run import recipe as recipe
    from cnnjax.run import record as record
    from cnnjax.run import report as report
    from cnnjax.run import scoring as scoring
    from cnnjax.run import settings as settings
    from cnnjax.run import state as state
    from cnnjax.run import trainer as trainer
    from cnnjax.run import training as training
    from cnnjax.run import verify_resume as verify_resume
    from cnnjax.run import writer as writer
    from cnnjax.run.training import Trained as Trained
    from cnnjax.run.training import train as train
