"""Fine-tuning: pretrained variables into a model, of which a part is trained.

    base = cnnjax.run.load.read_base("runs/mnist")
    loaded = finetune.load(base, model, (28, 28, 1), new=("head/.*",), key=key)
    tuned = finetune.FineTuned(model, finetune.make_method("lora:8", model, (28, 28, 1)))
    variables = finetune.start(tuned, loaded, (28, 28, 1), key)

`tuned` and `variables` then stand where a model and its variables do: in `create_state`,
`make_step`, `evaluate`, `features`. Frozen leaves are `variables["frozen"]`; no gradient, no
optimizer state and no average exists for them. `experiments.finetune` does all this by flags.
"""

from cnnjax.finetune import defaults
from cnnjax.finetune.adapters import init_adapters
from cnnjax.finetune.base import Base, variables_checksum
from cnnjax.finetune.groups import Group, layer_groups
from cnnjax.finetune.load import Loaded, format_loaded, load
from cnnjax.finetune.lora import init_lora, merge_lora, parse_ranks
from cnnjax.finetune.methods import METHODS, Method, check_method, make_method
from cnnjax.finetune.partition import frozen_norms, join_variables, split_variables
from cnnjax.finetune.rates import gradual_unfreezing, l2_sp, layer_wise_decay, remember_start
from cnnjax.finetune.start import (
    check_base,
    describe,
    needs_base,
    read_back,
    replace_trained,
    start,
)
from cnnjax.finetune.wrapped import FineTuned
from cnnjax.models.features import stage_features

__all__ = [
    "METHODS",
    "Base",
    "FineTuned",
    "Group",
    "Loaded",
    "Method",
    "check_base",
    "check_method",
    "defaults",
    "describe",
    "format_loaded",
    "frozen_norms",
    "gradual_unfreezing",
    "init_adapters",
    "init_lora",
    "join_variables",
    "l2_sp",
    "layer_groups",
    "layer_wise_decay",
    "load",
    "make_method",
    "merge_lora",
    "needs_base",
    "parse_ranks",
    "read_back",
    "remember_start",
    "replace_trained",
    "split_variables",
    "stage_features",
    "start",
    "variables_checksum",
]
