"""Tasks: what a network is trained for, as values of plain functions, one file per task."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "class_scores",
        "classification",
        "contrastive",
        "frechet",
        "generation",
        "nt_xent",
        "segmentation",
        "task",
    ),
    {"task": ("Forward", "Report", "Task", "example_weights")},
)

if TYPE_CHECKING:
    from cnnjax.tasks import class_scores as class_scores
    from cnnjax.tasks import classification as classification
    from cnnjax.tasks import contrastive as contrastive
    from cnnjax.tasks import frechet as frechet
    from cnnjax.tasks import generation as generation
    from cnnjax.tasks import nt_xent as nt_xent
    from cnnjax.tasks import segmentation as segmentation
    from cnnjax.tasks import task as task
    from cnnjax.tasks.task import Forward as Forward
    from cnnjax.tasks.task import Report as Report
    from cnnjax.tasks.task import Task as Task
    from cnnjax.tasks.task import example_weights as example_weights
