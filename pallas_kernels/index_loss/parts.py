"""What the kernels of the indexer's loss take, and what they leave to plain JAX."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """The attention that is learned from, and the indexer that learns."""

    q: Float[Array, "b t h k"]
    entries: Float[Array, "b c k"]
    log_total: Float[Array, "b t h"]
    queries: Float[Array, "b t i j"]
    head_weights: Float[Array, "b t i"]
    keys: Float[Array, "b c j"]


class Sums(NamedTuple):
    """Sums over the entries that a query attends to, of mass m and score s."""

    log_norm: Float[Array, "b t"]  # log sum exp s; 0 for a query that attends to none
    total: Float[Array, "b t"]  # sum m
    gap: Float[Array, "b t"]  # sum m (log m - s)
    kept: Float[Array, "b t"]  # sum m of the best


class Slopes(NamedTuple):
    """What makes the gradient of a score: share exp(s - log_norm) - rate m."""

    log_norm: Float[Array, "b t"]
    share: Float[Array, "b t"]
    rate: Float[Array, "b t"]
