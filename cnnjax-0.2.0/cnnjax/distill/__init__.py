"""Distillation: a student that learns of a teacher, by outputs, layers, attention and relations.

    trained = cnnjax.run.load.load_classifier("runs/resnet")
    terms = distill.read("logits(temperature=4, weight=0.9), attention")
    model = distill.make(student, distill.teacher_of(trained), trained.variables, terms)
    variables = model.start(key, trained.variables)
    task = distill.distillation(classification(10), terms)

`model`, `variables` and `task` then stand where a model, its variables and a task do: in
`create_state`, `make_step`, `cnnjax.run.train`. `experiments.distill` does all this by flags.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    ("layers", "losses", "named", "objective", "wrapped"),
    {
        "named": ("LOSSES", "Term", "check_numbers", "label_weight", "read"),
        "objective": ("distillation",),
        "wrapped": (
            *("Distilled", "Teacher", "check_data", "make", "normalization", "student_variables"),
            "teacher_of",
        ),
    },
)

if TYPE_CHECKING:
    from cnnjax.distill import layers as layers
    from cnnjax.distill import losses as losses
    from cnnjax.distill import named as named
    from cnnjax.distill import objective as objective
    from cnnjax.distill import wrapped as wrapped
    from cnnjax.distill.named import LOSSES as LOSSES
    from cnnjax.distill.named import Term as Term
    from cnnjax.distill.named import check_numbers as check_numbers
    from cnnjax.distill.named import label_weight as label_weight
    from cnnjax.distill.named import read as read
    from cnnjax.distill.objective import distillation as distillation
    from cnnjax.distill.wrapped import Distilled as Distilled
    from cnnjax.distill.wrapped import Teacher as Teacher
    from cnnjax.distill.wrapped import check_data as check_data
    from cnnjax.distill.wrapped import make as make
    from cnnjax.distill.wrapped import normalization as normalization
    from cnnjax.distill.wrapped import student_variables as student_variables
    from cnnjax.distill.wrapped import teacher_of as teacher_of
