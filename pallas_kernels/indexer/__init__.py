"""The lightning indexer's choice: the best of the compressed entries that a query sees.

The choice is exact for the scores that are computed, whose products have a device's precision.

Entries are scored and chosen in one pass. No array of [tokens, entries] scores exists: a GPU's
programs use a row of scores each, again and again, a TPU holds those of a few queries in VMEM.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.implementation import AUTO, TPU, XLA, choose
from pallas_kernels.indexer import gpu, reference, tpu
from pallas_kernels.indexer.stored import MOST_TOKENS, select_stored
from pallas_kernels.sparse_attention.seen import Seen

__all__ = ["MOST_TOKENS", "select", "select_stored"]

MOST_QUERIES = 2**19  # a TPU holds two numbers of each block of 8 beside its program


def select(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"], seen: Seen, topk: int, implementation: str = AUTO, *,
    rounded: bool = False,
) -> Seen:
    """Choose the `topk` entries with the best index scores among those that queries see.

    I_{t,c} = sum_i w_{t,i} relu(q_{t,i} . k_c), summed in float32. Of equal scores the lowest
    number is better. The choice has no gradient.

    Args:
      seen: its `first` and `end` say which entries queries see.
      rounded: compare scores rounded to bfloat16, as served models do.
    Returns:
      `seen` with the choice: numbers in ascending order, or on TPU words of bits.
    Raises:
      ValueError: there is no such implementation, or the arrays do not fit together.
    Source: report 2.3.1; fact sheet 2.6.
    """
    _check(queries, head_weights, keys, seen, topk)
    fits = queries.shape[0] * queries.shape[1] <= MOST_QUERIES
    chosen = choose("indexer", implementation, worthwhile=fits)
    if chosen == TPU and not fits:
        raise ValueError(
            f"indexer: expected at most {MOST_QUERIES} queries in all for the kernel of a TPU, got "
            f"{queries.shape[0]} x {queries.shape[1]}"
        )
    module = {XLA: reference, TPU: tpu}.get(chosen, gpu)
    choice = module.select(
        queries, head_weights, keys, seen.first, seen.end, topk, rounded=rounded
    )
    return seen._replace(words=choice) if chosen == TPU else seen._replace(chosen=choice)


def _check(queries, head_weights, keys, seen: Seen, topk: int) -> None:
    b, t, _, width = queries.shape
    wanted = queries.shape[:3], (b, width), (b, t), (b, t)
    found = head_weights.shape, (keys.shape[0], keys.shape[2]), seen.first.shape, seen.end.shape
    if wanted != found or topk < 1 or not keys.shape[1]:
        raise ValueError(
            "indexer: expected queries [b, t, i, j], head_weights [b, t, i], keys [b, c, j] with "
            "c from 1 on, first and end [b, t] and topk of 1 or more, got "
            f"{queries.shape}, {head_weights.shape}, {keys.shape}, {seen.first.shape}, "
            f"{seen.end.shape} and {topk}"
        )
