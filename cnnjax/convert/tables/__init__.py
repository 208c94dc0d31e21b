"""The names that other libraries give to the layers of a network, by the class of the network.

`torchvision`, `timm` and `keras` have those of the families that several libraries share; every
other module has a group of families, its tables named after the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

from cnnjax.convert.tables import keras, real, timm, torchvision
from cnnjax.convert.tables.torchvision import Table

TORCHVISION: Mapping[str, Table] = {**torchvision.TORCHVISION}
TIMM: Mapping[str, Table] = {**timm.TIMM}
LUKEMELAS: Mapping[str, Table] = {**real.LUKEMELAS}
KERAS: Mapping[str, Table] = {**keras.KERAS}
