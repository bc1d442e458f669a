"""The lightning indexer's choice among the keys that a cache holds, for a few queries a row."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.indexer import gpu_stored, reference, tpu_stored
from pallas_kernels.indexer.keys import is_packed, stored_width
from pallas_kernels.target import GPU, TPU, target_platform

KERNELS = {GPU: gpu_stored, TPU: tpu_stored}
MOST_TOKENS = 16  # of a row: more are better served by `select`, on keys that are decoded once


def select_stored(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    stored: Array, layer: Int[Array, ""], end: Int[Array, "b t"], topk: int,
    implementation: str = AUTO,
) -> Int[Array, "b t l"]:
    """Choose the `topk` entries with the best index scores before `end`, as `select` does.

    Args:
      stored: a cache [z, b, c, stored width]: keys as plain numbers or, of uint8, packed in FP4.
        The latter's scores are compared rounded to bfloat16. What lies at or beyond a row's `end`
        is of no account.
      layer: of the z.
    Returns:
      Numbers in ascending order; where there are fewer than `topk`, the rest are -1.
    Raises:
      ValueError: there is no such implementation, the arrays do not fit together, or the kernel
        does not take so many tokens, such keys or a cache of this size.
    """
    _check(queries, head_weights, stored, end, topk)
    chosen = choose_for(queries, stored, implementation)
    if chosen == XLA:
        module = reference
    else:
        module = KERNELS[chosen]
        _check_fits(queries, stored, chosen)
    layer, end = (jnp.asarray(x, jnp.int32) for x in (layer, end))
    end = jnp.clip(end, 0, stored.shape[2])
    return module.select_stored(queries, head_weights, stored, layer, end, topk)


def choose_for(
    queries: Float[Array, "b t i j"], stored: Array, implementation: str = AUTO
) -> str:
    """Return "xla", "gpu" or "tpu"; "auto" takes that of a GPU where it takes the arrays.

    XLA keeps a cache's entries on a TPU's lanes, so that its kernel begins with a copy of the layer
    in another order, several times the bytes that the choice reads.
    """
    worthwhile = target_platform() == GPU and _fits(queries, stored, GPU)
    return choose("indexer", implementation, worthwhile=worthwhile)


def _fits(queries: Float[Array, "b t i j"], stored: Array, kernel: str) -> bool:
    return queries.shape[1] <= MOST_TOKENS and KERNELS[kernel].fits(queries.shape[3], stored)


def _check_fits(queries, stored, kernel: str) -> None:
    if not _fits(queries, stored, kernel):
        raise ValueError(
            f"indexer: expected at most {MOST_TOKENS} tokens, {KERNELS[kernel].LIMITS}, got "
            f"{queries.shape[1]} tokens, {queries.shape[3]} channels and a cache "
            f"{stored.shape} of {stored.dtype}"
        )


def _check(queries, head_weights, stored, end, topk: int) -> None:
    b, t, _, channels = queries.shape
    width = stored_width(channels, packed=is_packed(stored))
    wanted = queries.shape[:3], b, width, (b, t)
    found = head_weights.shape, stored.shape[1], stored.shape[3], end.shape
    if wanted != found or topk < 1 or not stored.shape[2]:
        raise ValueError(
            "indexer: expected queries [b, t, i, j], head_weights [b, t, i], stored "
            f"[z, b, c, {width}] with c from 1 on, end [b, t] and topk of 1 or more, got "
            f"{queries.shape}, {head_weights.shape}, {stored.shape}, {end.shape} and {topk}"
        )
