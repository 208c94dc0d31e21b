"""Many small runs side by side, as one program and one table."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "adapting",
        "compress_rounds",
        "compared",
        "compressed",
        "compressing",
        "evaluated",
        "few_label_study",
        "few_labels",
        "full_scores",
        "probing",
        "quantized_runs",
        "quantizing",
        "tables",
        "trials",
    ),
)

if TYPE_CHECKING:
    from cnnjax.studies import adapting as adapting
    from cnnjax.studies import compared as compared
    from cnnjax.studies import compress_rounds as compress_rounds
    from cnnjax.studies import compressed as compressed
    from cnnjax.studies import compressing as compressing
    from cnnjax.studies import evaluated as evaluated
    from cnnjax.studies import few_label_study as few_label_study
    from cnnjax.studies import few_labels as few_labels
    from cnnjax.studies import full_scores as full_scores
    from cnnjax.studies import probing as probing
    from cnnjax.studies import quantized_runs as quantized_runs
    from cnnjax.studies import quantizing as quantizing
    from cnnjax.studies import tables as tables
    from cnnjax.studies import trials as trials
