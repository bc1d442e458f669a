"""The loss from which the lightning indexer learns: to score entries as the attention weighs them.

The attention that all heads together give to the entries a query attends to is the teacher, the
softmax of index scores over the same entries the learner. Kernels make both from what they come
from, tile by tile: no array of [tokens, entries] exists. Gradients reach the indexer alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.index_loss import gpu, reference, tpu
from pallas_kernels.index_loss.parts import Inputs, Slopes, Sums
from pallas_kernels.index_loss.reference import TINY
from pallas_kernels.sparse_attention.seen import Seen, entry_mask
from pallas_kernels.target import GPU, TPU

KERNELS = {GPU: gpu, TPU: tpu}
WORTHWHILE = 64  # channels: fewer leave most of a kernel's tiles empty
MOST_HEADS, MOST_QUERIES = 128, 2**19


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def index_loss(
    q: Float[Array, "b t h k"], entries: Float[Array, "b c k"], log_total: Float[Array, "b t h"],
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"], seen: Seen, best: Seen | None = None, implementation: str = AUTO,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Compare index scores with the attention of the entries that queries attend to.

    m_{t,c} = sum_h exp(q_{t,h} entry_c / sqrt(k) - log_total_{t,h}), teacher = m / sum_c m
    s_{t,c} = sum_i w_{t,i} relu(q_{t,i} . k_c), divergence = KL(teacher || softmax s)

    Sums are float32. `queries`, `head_weights` and `keys` get gradients, of the divergence alone.

    Args:
      log_total: of the softmax, as `sparse_attention` returns it.
      seen: entries that are attended to: a range, or the chosen ones of it. Their numbers ascend
        and -1 comes last, as `indexer.select` returns them; neither `first` nor `end` falls along
        a row.
      best: with a range, the choice of some of it.
    Returns:
      KL in nats, 0 where nothing is attended to, and the teacher's share of the best, or 0.
    Raises:
      ValueError: there is no such implementation, or the arrays do not fit together.
    Source: DeepSeek-V3.2's loss of its indexer; fact sheet 5.
    """
    return _forward(
        q, entries, log_total, queries, head_weights, keys, seen, best, implementation
    )[0]


def choose_for(q: Float[Array, "b t h k"], implementation: str) -> str:
    """Return "xla", "gpu" or "tpu".

    Raises:
      ValueError: there is no such implementation, or its kernels do not take these queries.
    """
    b, t, h, k = q.shape
    # All heads of a query are in one program; a TPU holds two numbers of each block of 8 queries.
    fits = h <= MOST_HEADS and b * t <= MOST_QUERIES
    worthwhile = k >= WORTHWHILE and q.dtype == jnp.bfloat16 and fits
    chosen = choose("index_loss", implementation, worthwhile=worthwhile)
    if chosen != XLA and not fits:
        raise ValueError(
            f"index_loss: expected at most {MOST_HEADS} heads and {MOST_QUERIES} queries in all "
            f"for a kernel, got {h} and {b} x {t}"
        )
    return chosen


def _check(x: Inputs, seen: Seen, best: Seen | None, chosen: str) -> None:
    b, t, h, k = x.q.shape
    c, (i, j) = x.entries.shape[1], x.queries.shape[2:]
    wanted = Inputs(x.q.shape, (b, c, k), (b, t, h), (b, t, i, j), (b, t, i), (b, c, j))
    found = Inputs(*(y.shape for y in x))
    ranges = [None if y is None else y.shape for y in (seen.first, seen.end)]
    if wanted != found or ranges != [(b, t)] * 2 or not c:
        raise ValueError(
            "index_loss: expected q [b, t, h, k], entries [b, c, k] with c from 1 on, log_total "
            "[b, t, h], queries [b, t, i, j], head_weights [b, t, i], keys [b, c, j], first and "
            f"end [b, t], got {tuple(found)} and {tuple(ranges)}"
        )
    if best is not None and (_is_choice(seen) or not _is_choice(best)):
        raise ValueError("index_loss: expected the best to be a choice from a range, got others")
    choices = [y for y in (seen, best) if y is not None and _is_choice(y)]
    if chosen == GPU and any(y.chosen is None for y in choices):
        raise ValueError(
            "index_loss: expected the numbers of chosen entries for the kernel of a GPU, got their "
            "bits"
        )


def _is_choice(seen: Seen) -> bool:
    return seen.chosen is not None or seen.words is not None


def _plain(x: Inputs, seen: Seen, best: Seen | None):
    count = x.entries.shape[1]
    of_best = None if best is None else entry_mask(best, count)
    return reference.index_loss(x, entry_mask(seen, count), of_best)


def _forward(q, entries, log_total, queries, head_weights, keys, seen, best, implementation):
    x = Inputs(q, entries, log_total, queries, head_weights, keys)
    chosen = choose_for(q, implementation)
    _check(x, seen, best, chosen)
    if chosen == XLA:
        return _plain(x, seen, best), (x, seen, best, None, None)
    sums, mass = KERNELS[chosen].forward(x, seen, best)
    return _result(sums), (x, seen, best, sums, mass)


def _result(sums: Sums) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Return divergence and share: sum m / M (log m - log M - s + log_norm) is put together."""
    divisor = jnp.maximum(sums.total, TINY)
    offset = sums.total * (jnp.log(divisor) - sums.log_norm)
    return (sums.gap - offset) / divisor, sums.kept / divisor


def _backward(implementation, kept, grads):
    x, seen, best, sums, mass = kept
    if sums is None:
        _, pull_back = jax.vjp(
            lambda *learner: _plain(Inputs(*x[:3], *learner), seen, best), *x[3:]
        )
        return None, None, None, *pull_back((grads[0], jnp.zeros_like(grads[1]))), None, None
    rate = grads[0] / jnp.maximum(sums.total, TINY)
    slopes = Slopes(sums.log_norm, rate * sums.total, rate)
    found = KERNELS[choose_for(x.q, implementation)].gradients(x, seen, slopes, mass)
    return None, None, None, *found, None, None


index_loss.defvjp(_forward, _backward)
