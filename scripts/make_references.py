"""Records what PyTorch computes, for the tests of `cnnjax.convert` to compare with.

    python scripts/make_references.py                # all
    python scripts/make_references.py resnet18 files # some

Needs torch, torchvision and timm; the tests need none of them. Weights are not stored but drawn
again by the tests, from a formula of their names (`tests/convert/weights.py`).
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "tests" / "convert" / "references"


def make_files() -> None:
    """Small files in each form of torch.save, old and new."""
    import torch

    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "weight": weight,
        "transposed": weight.T,
        "row": weight[1],
        "half": torch.tensor([0.5, -1.5], dtype=torch.float16),
        "bfloat16": torch.tensor([0.5, -1.5], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }
    torch.save(state, REFERENCES / "tiny.pth")
    torch.save(state, REFERENCES / "tiny_before_1_6.pth", _use_new_zipfile_serialization=False)
    training = {
        "state_dict": {"module.weight": torch.nn.Parameter(weight)},
        "epoch": 3,
        "extra": {"ema": {"weight": weight}, "betas": (0.9, 0.999), "note": None},
    }
    torch.save(training, REFERENCES / "tiny_training.pth")
