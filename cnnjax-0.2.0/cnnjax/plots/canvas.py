"""What all figures share: colors, size, spines, and how they are saved.

Colors are those of Okabe and Ito (2008), told apart with every kind of color vision. Matplotlib
is imported on use, through its object-oriented interface: no figure lives on in global state, and
no display is needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, "#CC79A7", "#000000", "#B8A800")
GRAY = "#8C8C8C"
_MAX_NAME_LENGTH = 18
# Such as that it builds its cache of fonts, or has no directory to keep it in.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def new_figure(width_inches: float, height_inches: float, *, pad_inches: float = 0.05) -> Figure:
    """Returns an empty figure whose contents never overlap, `pad_inches` of space around each."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(
        figsize=(width_inches, height_inches),
        dpi=DOTS_PER_INCH,
        layout=ConstrainedLayoutEngine(w_pad=pad_inches, h_pad=pad_inches, wspace=0, hspace=0),
    )


def save(figure: Figure, path: Path | str) -> Path:
    """Writes the PNG, whatever the path's extension, and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # A figure made without pyplot has the Agg canvas, whatever the display.
        figure.savefig(path, format="png")
    return path


def attempt(draw: Callable[[Path], Any], path: Path) -> bool:
    """Calls `draw(path)`, and returns whether there is a figure now.

    What goes wrong is one line on stderr, whatever it is: a figure must not cost the scores that it
    stands beside. What was drawn there before, or in part, is removed. `CNNJAX_TRACEBACK=1` asks
    for the traceback too.
    """
    try:
        draw(path)
    except Exception as error:
        if os.environ.get("CNNJAX_TRACEBACK"):
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        # There may be nobody to tell.
        with contextlib.suppress(OSError):
            print(f"warning: no figure {path} ({text}); nothing else is lost", file=sys.stderr)
        return False
    return True


def tidy(axes: Axes) -> None:
    """Gives the axes a pale grid and takes their upper and right border."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def short_names(class_names: Sequence[str], num_classes: int) -> list[str]:
    """Returns the names cut to a length that fits a figure, literally.

    Raises:
      UserError: a wrong number of names.
    """
    if len(class_names) != num_classes:
        raise UserError(f"{len(class_names)} class names for {num_classes} classes: give one each.")
    return [
        plain(name) if len(name) <= _MAX_NAME_LENGTH else plain(f"{name[: _MAX_NAME_LENGTH - 1]}…")
        for name in map(str, class_names)
    ]


def plain(text: str) -> str:
    """Returns text that Matplotlib draws as it is: no formula between dollars, in every legend."""
    text = re.sub(r"(?<!\\)\$", r"\\$", text)
    return f" {text}" if text.startswith("_") else text


def percent(probability: float) -> str:
    """A probability that is neither 0 nor 1 never reads as 0% or 100%."""
    if 0 < probability < 0.001:
        return "<0.1%"
    if 0.999 < probability < 1:
        return ">99.9%"
    return f"{probability:.1%}"
