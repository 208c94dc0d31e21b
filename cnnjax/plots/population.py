"""Figures of a population: the curves of its members, and what they copied of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.plots.canvas import GRAY, new_figure, plain, save, tidy

MOST_NAMED = 12


def member_curves(
    scores: Mapping[int, Sequence[tuple[int, float]]],
    groups: Mapping[str, Sequence[int]],
    path: Path | str,
    *,
    score: str,
) -> Path:
    """Draws a validation score over epochs: a thin line a member, a thick one the mean of a group.

    Args:
      scores: member -> (epoch, score) of each validation.
      groups: name of a setting -> its members.
      path: where the PNG goes.
      score: what it is called.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    colors = colormaps["viridis"](np.linspace(0.0, 0.9, max(1, len(groups))))
    for color, (name, members) in zip(colors, groups.items(), strict=True):
        found = [dict(scores[each]) for each in members]
        for each in found:
            axes.plot(list(each), list(each.values()), color=color, alpha=0.35, linewidth=0.9)
        shared = sorted(set.intersection(*map(set, found))) if found else []
        means = [float(np.mean([each[epoch] for each in found])) for epoch in shared]
        label = plain(name) if len(groups) <= MOST_NAMED else None
        axes.plot(shared, means, color=color, linewidth=2, marker="o", markersize=3, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(plain(f"validation {score.replace('_', ' ')}"))
    _leave_out_start(axes, scores)
    if 1 < len(groups) <= MOST_NAMED:
        axes.legend(frameon=False, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    return save(figure, path)


def copied_settings(
    scores: Mapping[int, Sequence[tuple[int, float]]],
    settings: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]],
    copies: Sequence[tuple[int, int, int]],
    path: Path | str,
    *,
    score: str,
) -> Path:
    """Draws population based training: scores and settings of the members over epochs.

    Args:
      scores: member -> (epoch, score) of each validation.
      settings: name -> member -> (epoch, value): with which it trained in that epoch.
      copies: (epoch, member, source): after which epoch who copied whom; drawn as a line between
        their scores.
      path: where the PNG goes.
      score: what it is called.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7.2, 3.2 + 2.2 * len(settings))
    drawn = figure.subplots(1 + len(settings), 1, sharex=True, squeeze=False)[:, 0]
    colors = colormaps["viridis"](np.linspace(0.0, 0.95, max(1, len(scores))))
    color_of = dict(zip(scores, colors, strict=True))
    for member, found in scores.items():
        epochs, values = zip(*found, strict=True) if found else ((), ())
        drawn[0].plot(epochs, values, color=color_of[member], linewidth=1.1)
    known = {member: dict(found) for member, found in scores.items()}
    for epoch, member, source in copies:
        ends = known[member].get(epoch), known[source].get(epoch)
        drawn[0].plot([epoch, epoch], ends, color=GRAY, linewidth=0.7, linestyle=":")
        drawn[0].plot([epoch], ends[:1], "x", color=color_of[member], markersize=5)
    drawn[0].set_ylabel(plain(f"validation {score.replace('_', ' ')}"))
    _leave_out_start(drawn[0], scores)
    for axes, (name, members) in zip(drawn[1:], settings.items(), strict=True):
        for member, found in members.items():
            epochs, values = zip(*found, strict=True)
            axes.plot(epochs, values, color=color_of[member], drawstyle="steps-mid", linewidth=1.1)
        smallest = min(value for found in members.values() for _, value in found)
        if smallest > 0:
            axes.set_yscale("log")
        axes.set_ylabel(plain(name.replace("_", " ")))
    drawn[-1].set_xlabel("epoch")
    for axes in drawn:
        tidy(axes)
    drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(scores) <= MOST_NAMED:
        handles = [Line2D([], [], color=color_of[member]) for member in scores]
        names = [str(member) for member in scores]
        drawn[0].legend(handles, names, title="member", ncols=2, frameon=False, fontsize=8)
    return save(figure, path)


def _leave_out_start(axes: Any, scores: Mapping[int, Sequence[tuple[int, float]]]) -> None:
    """Cuts off what few members have far from all others, such as first epochs of a bad setting."""
    values = np.array([value for found in scores.values() for _, value in found])
    values = values[np.isfinite(values)]
    if len(values) < 8:
        return
    low, high = np.quantile(values, (0.1, 0.9))
    room = 0.6 * (high - low) or 1e-3
    axes.set_ylim(
        max(values.min(), low - room) - 0.02 * room, min(values.max(), high + room) + 0.02 * room
    )
