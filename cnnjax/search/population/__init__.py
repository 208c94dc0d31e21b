"""Many small runs as one program: seeds, settings and data that differ from member to member.

`members` stacks states and places them on devices, `program` compiles the steps of all in one of
three ways, `varied` says what may differ, `stopping` and `pbt` who ends and who copies whom. The
command is `cnnjax population`.
"""

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "examples",
        "member_runs",
        "members",
        "pbt",
        "prepare",
        "program",
        "progress",
        "report",
        "run",
        "stopping",
        "training",
        "varied",
    ),
)
