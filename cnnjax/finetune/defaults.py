"""How long, how fast and in which batches to fine-tune, where nobody says.

The numbers are those of the study of few labels (docs/few_labels.md): 300 updates of Adam in
batches of about 25, and for each method the learning rate that its sweep over three decades found
best, on a network of 60,000 parameters.
"""

from __future__ import annotations

from cnnjax.errors import UserError

# Best of the sweep from MNIST's digits 0-4 to 5-9, by the name of the method.
RATES = {
    "scratch": 1e-2,
    "full": 3e-3,
    "head": 3e-2,
    "last": 1e-2,
    "bitfit": 3e-2,
    "norm": 3e-2,
    "lora": 3e-3,
    "adapter": 3e-2,
}
# Of optimizers whose updates are as long as the learning rate, whatever the gradient's length.
RATE_OPTIMIZERS = ("adam", "adamw", "lamb")
OTHER_RATE = 1e-3
# Above this, no sweep was made: what trains whole layers gets a tenth.
LARGE_PARAMETERS = 10**6
WHOLE_LAYERS = ("scratch", "full", "last")
UPDATES, LEAST_EPOCHS = 300, 10
FEW_EXAMPLES, FEW_BATCH, BATCH = 1000, 24, 64


def kind(method: str) -> str:
    """Returns what a method's name begins with: `lora` of `lora:2` and of `lora(rank=2)`."""
    return method.partition(":")[0].partition("(")[0]


def learning_rate(method: str, optimizer: str, num_parameters: int) -> float:
    """Returns the learning rate of a method.

    Args:
      method: as `make_method` takes it, or `scratch`.
      optimizer: a name of `cnnjax.optim`.
      num_parameters: of the model.
    """
    name = kind(method)
    if optimizer not in RATE_OPTIMIZERS:
        return OTHER_RATE
    large = num_parameters > LARGE_PARAMETERS and name in WHOLE_LAYERS
    return RATES.get(name, OTHER_RATE) * (0.1 if large else 1)


def batch_size(num_examples: int, num_devices: int) -> int:
    """Returns how many examples a step gets: 64, or of few examples 24, a multiple of the devices.

    Raises:
      UserError: there are fewer examples than devices.
    """
    most = min(BATCH if num_examples >= FEW_EXAMPLES else FEW_BATCH, num_examples)
    if most < num_devices:
        raise UserError(
            f"{num_examples} training images cannot be shared by {num_devices} devices: give "
            "--devices 1."
        )
    return most - most % num_devices


def epochs(num_examples: int, batch_size: int) -> int:
    """Returns how many passes over the examples make 300 updates, and at least 10."""
    steps_per_epoch = max(1, num_examples // batch_size)
    return max(LEAST_EPOCHS, -(-UPDATES // steps_per_epoch))
