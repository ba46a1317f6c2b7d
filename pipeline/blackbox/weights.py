"""Check a model's weights before anything is computed with them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pipeline.cards import ModelCard
from pipeline.errors import DataError
from pipeline.finite import first_non_finite


def check_weights(card: ModelCard, net: torch.nn.Module) -> None:
    """Check that all weights are finite, and the factor of the scores.

    Raises:
        DataError: names the first weight that is NaN or infinite, or a logit scale that overflows.
    """
    for name, weights in net.state_dict().items():
        if not name.endswith("attn_mask") and (bad := first_non_finite(weights.float())) is not None:
            raise DataError(
                f"model {card.name!r}: weight {name}{list(bad)} of {card.weights!r} is {float(weights[bad])}, wanted a "
                "finite number: restore the checkpoint file"
            )
    scale = cast(Tensor, net.logit_scale).detach().float()
    if not torch.isfinite(scale.exp()).all():
        raise DataError(f"model {card.name!r}: logit_scale of {card.weights!r} is {float(scale)}: its exp overflows")
