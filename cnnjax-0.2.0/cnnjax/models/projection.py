"""An encoder with a projection head, for losses that compare embeddings.

Chen et al. 2020 (arXiv 2002.05709), section 2.1: the loss sees `z = W2 relu(W1 h)`, and what is
used afterwards is `h`, the encoder's features, which keep more (section 4.2).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from cnnjax.errors import UserError


class Projected(nn.Module):
    """The features of an encoder, and their projection by a network of one hidden layer.

    The encoder's parameters are under `encoder`, with the names of the classifier that it is
    without its head.

    Attributes:
      encoder: any model of `cnnjax.models` with `num_classes=None`.
      width: units of the hidden layer.
      features: of the projection.
      dtype: of the projection's computation; None: that of features and parameters.

    Call: `image [batch, height, width, channels]` -> `{"features": [batch, encoder's features],
    "projection": [batch, features]}`.
    """

    encoder: nn.Module
    width: int = 128
    features: int = 64
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        if getattr(self.encoder, "num_classes", None) is not None:
            raise UserError(
                f"the encoder {type(self.encoder).__name__} ends in {self.encoder.num_classes} "  # type: ignore[attr-defined]
                "logits: make it with num_classes=None, so that it returns features."
            )
        features = self.encoder(image, train=train)
        hidden = nn.relu(nn.Dense(self.width, dtype=self.dtype, name="projection1")(features))
        projection = nn.Dense(self.features, dtype=self.dtype, name="projection2")(hidden)
        return {"features": features, "projection": projection}
