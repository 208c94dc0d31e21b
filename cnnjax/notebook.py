"""What a notebook shows in place of plain text: progress bars, tables, summaries of runs.

Nothing here is needed outside of a notebook, and nothing here fails there: without pandas a table
is a list that Jupyter draws, without ipywidgets a bar is lines of text.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# A picture in a page, and a table that is wider than the screen scrolls by itself.
_STYLE = "max-width:100%;height:auto;background:#fff"


class Table(list):
    """Rows, name -> value, that a notebook draws as a table.

    What `table` returns where pandas is not installed.
    """

    def _repr_html_(self) -> str:
        columns = _columns(self)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(row.get(name, ''))}</td>" for name in columns) + "</tr>"
            for row in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Returns rows, name -> value, as a pandas DataFrame, or as a `Table` where pandas is missing.

    A row need not have every name.
    """
    rows = [dict(row) for row in rows]
    if importlib.util.find_spec("pandas") is None:
        return Table(rows)
    import pandas

    return pandas.DataFrame(rows, columns=_columns(rows))


def kernel_runs() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, Colab, VS Code)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


def draws_widgets() -> bool:
    """Whether a progress bar is a widget: in a notebook where ipywidgets is installed.

    The environment variable CNNJAX_PROGRESS=lines asks for lines of text, which a notebook that is
    shown on a page keeps.
    """
    if os.environ.get("CNNJAX_PROGRESS") == "lines":
        return False
    return kernel_runs() and importlib.util.find_spec("ipywidgets") is not None


def card(title: str, facts: Mapping[str, Any], pictures: Sequence[Path] = ()) -> str:
    """Returns HTML of a heading, a row per fact, and pictures: what `_repr_html_` is to return.

    Args:
      title: the heading.
      facts: name -> value; numbers are written as people read them.
      pictures: PNG files, which become part of the HTML; those that are not there are left out.
    """
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left;overflow-wrap:anywhere">{_cell(value)}</td></tr>'
        for name, value in facts.items()
    )
    images = "".join(
        f'<p><img alt="{html.escape(path.stem)}" width="640" style="{_STYLE}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for path in pictures
        if path.exists()
    )
    return f"<div><p><b>{html.escape(title)}</b></p><table>{rows}</table>{images}</div>"


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = str(value)
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return html.escape(text)
