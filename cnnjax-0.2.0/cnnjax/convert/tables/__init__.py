"""The names that other libraries give to the layers of a network, by the class of the network.

`torchvision`, `timm`, `keras` and `slim` have those of the families that several libraries share;
every other module has a group of families, its tables named after the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

from cnnjax.convert.tables import (
    attention,
    branched,
    keras,
    mobile,
    packaged,
    residual,
    slim,
    timm,
    torchvision,
)
from cnnjax.convert.tables.torchvision import Table

TORCHVISION: Mapping[str, Table] = {
    **torchvision.TORCHVISION,
    **attention.TORCHVISION,
    **mobile.TORCHVISION,
    **residual.TORCHVISION,
}
TIMM: Mapping[str, Table] = {
    **timm.TIMM,
    **attention.TIMM,
    **branched.TIMM,
    **mobile.TIMM,
    **residual.TIMM,
}
LUKEMELAS: Mapping[str, Table] = {**packaged.LUKEMELAS}
KERAS: Mapping[str, Table] = {**keras.KERAS}
SLIM: Mapping[str, slim.Table] = {**slim.SLIM}
