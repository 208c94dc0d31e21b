"""The study of a search, which Optuna keeps: samplers, pruners, storage, and which trials count."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator
from cnnjax.search.space import Choice, Dimension, Range, Space, Value, suggest

if TYPE_CHECKING:
    import optuna

# What is said of a trial in the storage.
SKIPPED = "skipped"
BROKEN = "breaks a constraint"
SEARCH = "search"
# Draws of the sampler that break a constraint, one after another, before one is drawn evenly.
MOST_REJECTED = 20
MOST_COMBINATIONS = 100_000
MOST_OPENINGS = 8
MADE_TWICE = ("already exists", "duplicate key", "UNIQUE constraint")
# What a storage's own words mean.
HINTS = {
    "locked": "another program holds it: wait for it",
    "not a database": "name another file",
    "malformed": "put a copy back that is whole, or begin another search with another --out",
}
EXTRA = "pip install 'cnnjax[search]'"


def optuna_module() -> Any:
    """Returns Optuna, quiet. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(f"a search needs Optuna: {EXTRA}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return optuna


# The samplers take the seed and the space, and return one of Optuna's.


def grid(*, points: int = 5, seed: int, space: Space) -> Any:
    """Every combination, with so many points of each range, in a drawn order; then it ends."""
    if not 2 <= points <= MOST_COMBINATIONS:
        raise UserError(f"points is {points}: give 2 to {MOST_COMBINATIONS:,}")
    # What is tried is decided by `ask`.
    return optuna_module().samplers.RandomSampler(seed=seed)


def random(*, seed: int, space: Space) -> Any:
    """Each trial drawn alone: Bergstra & Bengio 2012."""
    return optuna_module().samplers.RandomSampler(seed=seed)


def quasi(*, seed: int, space: Space) -> Any:
    """Sobol's sequence, scrambled: more even than random."""
    with _quiet():
        return optuna_module().samplers.QMCSampler(seed=seed, scramble=True)


def tpe(*, startup: int = 10, multivariate: bool = True, seed: int, space: Space) -> Any:
    """Tree-structured Parzen estimators: Bergstra et al. 2011; jointly, Falkner et al. 2018."""
    if startup < 1:
        raise UserError(f"startup is {startup}: give at least 1")
    with _quiet():
        return optuna_module().samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=multivariate,
            group=multivariate,
            constant_liar=True,
        )


def gp(*, startup: int = 10, seed: int, space: Space) -> Any:
    """A Gaussian process with expected improvement; Optuna computes it with PyTorch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("the sampler gp needs PyTorch: pip install torch, or take tpe") from None
    with _quiet():
        return optuna_module().samplers.GPSampler(seed=seed, n_startup_trials=startup)


def cmaes(*, seed: int, space: Space) -> Any:
    """Covariance matrix adaptation: Hansen & Ostermeier 2001; choices are drawn at random."""
    try:
        import cmaes as _  # noqa: F401
    except ImportError:
        raise UserError(f"the sampler cmaes needs the package cmaes: {EXTRA}") from None
    return optuna_module().samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


def evolution(*, population: int = 20, seed: int, space: Space) -> Any:
    """NSGA-II: Deb et al. 2002; for one objective or several."""
    return optuna_module().samplers.NSGAIISampler(seed=seed, population_size=population)


SAMPLERS: spec.Registry = {
    "grid": grid,
    "random": random,
    "quasi": quasi,
    "tpe": tpe,
    "gp": gp,
    "cmaes": cmaes,
    "evolution": evolution,
}


def none(*, epochs: int) -> Any:
    """Every trial trains to its end."""
    return optuna_module().pruners.NopPruner()


def median(*, startup: int = 5, warmup: int = 0, epochs: int) -> Any:
    """Stops what is worse than the median of the earlier trials at the same epoch."""
    return optuna_module().pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)


def asha(*, min_epochs: int = 1, factor: int = 3, epochs: int) -> Any:
    """Asynchronous successive halving: Li et al. 2020. The best 1 / factor goes on at each rung."""
    return optuna_module().pruners.SuccessiveHalvingPruner(
        min_resource=min_epochs, reduction_factor=factor
    )


def hyperband(*, min_epochs: int = 1, factor: int = 3, epochs: int) -> Any:
    """Brackets of successive halving: Li et al. 2018."""
    if min_epochs < 1 or factor < 2:
        raise UserError(f"min_epochs {min_epochs}, factor {factor}: give at least 1 and 2")
    return optuna_module().pruners.HyperbandPruner(
        min_resource=min_epochs, max_resource=max(epochs, min_epochs), reduction_factor=factor
    )


PRUNERS: spec.Registry = {"none": none, "median": median, "asha": asha, "hyperband": hyperband}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def refused(flag: str, text: str) -> Iterator[None]:
    """Turns what Optuna says of an argument into one line."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{flag} {text}: {str(error).splitlines()[0]}") from None


def check_storage(url: str) -> None:
    """Raises UserError where a storage cannot be opened or written."""
    scheme, _, place = url.partition("://")
    file = Path(place.removeprefix("/").partition("?")[0])
    if scheme.startswith("sqlite") and (file.name in ("", ":memory:")):
        raise UserError(f"--storage {url}: what is in memory cannot be resumed: name a file")
    if scheme.startswith("sqlite") and not file.parent.is_dir():
        raise UserError(f"--storage {url}: there is no directory {file.parent}")
    with storage_errors(url):
        open_storage(url, wait_secs=5)


def open_study(
    name: str,
    storage: str,
    *,
    directions: Sequence[str],
    sampler: Any,
    pruner: Any,
    what: Mapping[str, Any],
) -> optuna.Study:
    """Opens or makes a study.

    Args:
      name: of the study in its storage.
      storage: an URL of SQLAlchemy, such as `sqlite:///study.db` or `postgresql://host/db`.
      directions: "maximize" or "minimize" for each objective.
      sampler, pruner: of Optuna.
      what: what the search is of: another with the same name must say the same.

    Raises:
      UserError: the storage cannot be reached or is no study's, or the study is of another search.
    """
    optuna = optuna_module()
    with storage_errors(storage):
        study = optuna.create_study(
            study_name=name,
            storage=open_storage(storage),
            directions=list(directions),
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        found = [each.name.lower() for each in study.directions]
        if found != list(directions):
            raise UserError(f"the study {name} has other objectives: they are to {found}")
        known = study.user_attrs.get(SEARCH)
        if known is None:
            study.set_user_attr(SEARCH, dict(what))
    if known is not None and known != what:
        other = sorted(key for key in {*known, *what} if known.get(key) != what.get(key))
        raise UserError(
            f"the study {name} is of another search ({', '.join(other)}): go on with the settings "
            "it was started with, or give another --out"
        )
    return study


def open_storage(url: str, *, wait_secs: int = 60) -> Any:
    """Returns Optuna's storage at an URL; of a file that another holds after a wait."""
    import sqlalchemy.exc

    storage = optuna_module().storages.RDBStorage
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        # Several workers write to one file: wait for each other.
        options = {"connect_args": {"timeout": wait_secs}}
    # SQLAlchemy 2.0 asks for psycopg2 where a URL names no driver.
    if url.startswith("postgresql://") and not importlib.util.find_spec("psycopg2"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    for left in reversed(range(MOST_OPENINGS)):
        try:
            with _quiet():  # Of words in the URL that the driver does not know.
                return storage(url, engine_kwargs=options)
        except sqlalchemy.exc.DBAPIError as error:
            # Searches that start together make the tables together; all but one find them made.
            made = any(text in str(error) for text in MADE_TWICE)
            if not (made and left):
                raise
            time.sleep(0.5)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns what a storage refuses into one line."""
    import sqlalchemy.exc

    optuna = optuna_module()
    shown = _without_password(url)
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(
            f"--storage {shown} needs a driver that is not installed for it: for "
            "PostgreSQL, pip install 'cnnjax[postgresql]'"
        ) from None
    except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ValueError):
        raise UserError(
            f"--storage {shown} is no URL of a database: write sqlite:///FILE or "
            "postgresql://USER@HOST/DATABASE"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        text = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        hint = next((hint for sign, hint in HINTS.items() if sign in text), "is it there?")
        raise UserError(f"the storage {shown} cannot be used ({text}): {hint}") from None


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{mark}{user.partition(':')[0]}{at}{host}"


def ask(
    study: optuna.Study,
    space: Space,
    budget: int,
    allows: Callable[[dict[str, Value]], bool],
    combinations: Sequence[dict[str, Value]] | None = None,
    draw: Callable[[], dict[str, Value]] | None = None,
) -> Any | None:
    """Returns a new trial whose settings keep the constraints; None when there is none to make.

    Args:
      study: of `open_study`.
      space: what is chosen.
      budget: how many trials count.
      allows: chosen -> whether the constraints hold.
      combinations: of a grid, see `grid_of`: one after another is tried instead of drawn.
      draw: returns settings that keep the constraints, where the sampler finds none.

    Raises:
      UserError: no settings keep the constraints.
    """
    for rejected in range(2 * MOST_REJECTED):
        trials = counted(study)
        if len(trials) >= budget:
            return None
        if combinations is not None:
            tried = [each.params for each in trials]
            left = [each for each in combinations if each not in tried]
            if not left:
                return None
            study.enqueue_trial(left[0])
        elif draw is not None and rejected >= MOST_REJECTED:
            study.enqueue_trial(draw())
        trial = study.ask()
        chosen = suggest(space, functools.partial(_suggested, trial, combinations))
        # Others may have asked at the same moment: those that came first are counted.
        earlier = [each for each in counted(study) if each.number < trial.number]
        if combinations is not None and any(each.params == chosen for each in earlier):
            skip(study, trial, "tried by another")
        elif not allows(chosen):
            skip(study, trial, BROKEN)
        elif len(earlier) >= budget:
            skip(study, trial, "over the budget")
        else:
            return trial
    raise UserError(
        f"{2 * MOST_REJECTED} drawn settings in a row break --where: no trial can be made; widen it"
    )


def grid_of(
    space: Space, points: int, seed: int, allows: Callable[[dict[str, Value]], bool]
) -> list[dict[str, Value]]:
    """Returns every combination that keeps the constraints, in a drawn order."""
    found: list[dict[str, Value]] = [{}]
    for each in space.dimensions:
        longer: list[dict[str, Value]] = []
        for chosen in found:
            if each.condition and chosen.get(each.condition[0]) != each.condition[1]:
                longer.append(chosen)
                continue
            longer += [{**chosen, each.name: value} for value in _points(each.domain, points)]
        found = longer
        if len(found) > MOST_COMBINATIONS:
            raise UserError(
                f"the grid has more than {MOST_COMBINATIONS:,} combinations: give fewer points, "
                "such as grid(points=3), or another sampler"
            )
    found = [chosen for chosen in found if allows(chosen)]
    order = numpy_generator(seed, "grid").permutation(len(found))
    return [found[number] for number in order]


def skip(study: optuna.Study, trial: Any, why: str) -> None:
    """Ends a trial that does not count."""
    trial.set_user_attr(SKIPPED, why)
    study.tell(trial, state=optuna_module().trial.TrialState.FAIL, skip_if_finished=True)


def counted(study: optuna.Study) -> list[Any]:
    """Returns the trials that count: running, ended, pruned and failed, but not skipped."""
    return [each for each in study.get_trials(deepcopy=False) if SKIPPED not in each.user_attrs]


def _suggested(trial: Any, combinations: Any, each: Dimension) -> Value:
    domain = each.domain
    if isinstance(domain, Choice):
        return trial.suggest_categorical(each.name, list(domain.values))
    if combinations is not None:
        found = [chosen[each.name] for chosen in combinations if each.name in chosen]
        return trial.suggest_categorical(each.name, sorted(set(found)))
    if domain.is_whole:
        low, high = int(domain.low), int(domain.high)
        if domain.is_log:
            return trial.suggest_int(each.name, low, high, log=True)
        return trial.suggest_int(each.name, low, high, step=int(domain.step or 1))
    return trial.suggest_float(
        each.name, domain.low, domain.high, log=domain.is_log, step=domain.step
    )


def _points(domain: Choice | Range, points: int) -> list[Value]:
    """So many values of a range, evenly or in the logarithm, whole ones once each; every choice."""
    if isinstance(domain, Choice):
        return list(domain.values)
    if domain.step is not None and (domain.high - domain.low) / domain.step < points:
        count = math.floor((domain.high - domain.low) / domain.step + 1e-9) + 1
        found = [domain.low + number * domain.step for number in range(count)]
    else:
        low, high = (math.log(x) if domain.is_log else x for x in (domain.low, domain.high))
        found = [low + (high - low) * number / (points - 1) for number in range(points)]
        found = [math.exp(each) if domain.is_log else each for each in found]
        found[0], found[-1] = domain.low, domain.high
    if domain.is_whole:
        return list(dict.fromkeys(round(each) for each in found))
    return list(dict.fromkeys(found))
