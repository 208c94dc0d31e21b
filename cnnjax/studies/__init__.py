"""Many small runs side by side, as one program and one table."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "tables",
        "trials",
    ),
)

if TYPE_CHECKING:
    from cnnjax.studies import tables as tables
    from cnnjax.studies import trials as trials
