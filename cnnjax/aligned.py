"""Tables of text for terminals: columns that are aligned."""

from collections.abc import Sequence


def padded(rows: Sequence[Sequence[str]], sides: str) -> list[list[str]]:
    """Returns the cells of a table, those of each column as long as its longest.

    Args:
      rows: with as many cells each.
      sides: `l` or `r` for each column: where its text is; the last is that of all further columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    places = sides.ljust(len(widths), sides[-1])
    return [
        [
            text.rjust(width) if place == "r" else text.ljust(width)
            for text, width, place in zip(row, widths, places, strict=False)
        ]
        for row in rows
    ]


def lines(rows: Sequence[Sequence[str]], sides: str, *, ruled: bool = False) -> list[str]:
    """Returns the lines of a table, two spaces between its columns.

    >>> print("\\n".join(lines([("layer", "MACs"), ("conv1", "86,400")], "lr", ruled=True)))
    layer    MACs
    -------------
    conv1  86,400

    Args:
      rows, sides: see `padded`.
      ruled: whether a line of dashes follows the first row.
    """
    found = ["  ".join(row) for row in padded(rows, sides)]
    rule = "-" * max(map(len, found), default=0)
    found = [line.rstrip() for line in found]
    return [found[0], rule, *found[1:]] if ruled and found else found
