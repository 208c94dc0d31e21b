"""Hyperparameters by search: what to choose, trials that are runs, and which setting is better.

Optuna keeps the study and draws the settings; a trial is the run of an experiment by a worker
process, judged on validation only. The commands are `cnnjax search` and `cnnjax finish-search`.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "cluster",
        "costs",
        "figures",
        "forecasts",
        "plan",
        "report",
        "space",
        "study",
        "trials",
        "workers",
    ),
    {
        "space": ("Choice", "Dimension", "Range", "Space", "read_space"),
        "study": ("ask", "grid_of", "open_study"),
        "plan": ("Objective", "Search"),
        "trials": ("run",),
    },
)

if TYPE_CHECKING:
    from cnnjax.search import cluster as cluster
    from cnnjax.search import costs as costs
    from cnnjax.search import figures as figures
    from cnnjax.search import forecasts as forecasts
    from cnnjax.search import plan as plan
    from cnnjax.search import report as report
    from cnnjax.search import space as space
    from cnnjax.search import study as study
    from cnnjax.search import trials as trials
    from cnnjax.search import workers as workers
    from cnnjax.search.plan import Objective as Objective
    from cnnjax.search.plan import Search as Search
    from cnnjax.search.space import Choice as Choice
    from cnnjax.search.space import Dimension as Dimension
    from cnnjax.search.space import Range as Range
    from cnnjax.search.space import Space as Space
    from cnnjax.search.space import read_space as read_space
    from cnnjax.search.study import ask as ask
    from cnnjax.search.study import grid_of as grid_of
    from cnnjax.search.study import open_study as open_study
    from cnnjax.search.trials import run as run
