"""What a forward pass tells of each of its layers."""

from __future__ import annotations

from typing import NamedTuple

from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.shapes import Array, Float, Int


class LayerStats(NamedTuple):
    """What losses, balancing and inspection need to know of one layer, or of stacked ones."""

    experts: Int[Array, "*z b t a"]  # of each token
    load: Float[Array, "*z e"]  # token slots given to each expert; padding is not counted
    balance_loss: Float[Array, "*z"]  # sequence-wise, without its factor; 0 for hash layers
    sinkhorn_error: Float[Array, "*z"]  # the larger of its two sublayers'; see mhc.py
    lesson: Lesson | None  # of a learning indexer, summed over the batch
