"""Attention of a few new tokens of each row, over a cache as it is stored.

A query sees the window of keys before it, which a ring holds, the call's own tokens up to it, and
in CSA and HCA layers stored entries: all before an end, or those that an indexer chose. Kernels
decode rows on the chip, and read them where they lie if they can. There is no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cached_attention import gpu, reference, tpu
from pallas_kernels.cached_attention.formats import Form, decode
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.target import GPU, TPU, target_platform

__all__ = ["MOST_SLOTS", "MOST_TOKENS", "Cached", "cached_attention", "choose_for"]

KERNELS = {GPU: gpu, TPU: tpu}
WORTHWHILE = 64  # channels: fewer leave most of a kernel's tiles empty
MOST_TOKENS = 8  # of a row in one call
MOST_HEADS = 128
MOST_SLOTS = 1024  # of a ring, which a TPU decodes at once


class Cached(NamedTuple):
    """Stored rows of z layers, and which of them queries see.

    Of entries a query sees those before `end`, or the chosen ones; where there are entries, one of
    both is given. An end beyond the entries counts as theirs.
    """

    ring: Array  # [z, b, slots, width], before the call's tokens: at positions modulo the slots
    layer: Int[Array, ""]
    start: Int[Array, " b"]  # position of each row's first query
    entries: Array | None = None  # [z, b, c, width]
    end: Int[Array, "b t"] | None = None
    chosen: Int[Array, "b t l"] | None = None  # numbers of entries, each once; negative: none


def cached_attention(
    q: Float[Array, "b t h k"], new: Array, sink: Float[Array, " h"], cached: Cached, *,
    rotated: int, invariant: bool = False, implementation: str = AUTO,
) -> Float[Array, "b t h k"]:
    """Attend each query to what it sees of the cache and of the call's tokens.

    z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv

    Sums are float32; weights meet the values in the dtype of q.

    Args:
      new: keys of the call's tokens, [b, t, width], stored as those of the cache: bytes as served
        or plain numbers.
      rotated: channels that a served row stores as bfloat16.
      invariant: a row's bits depend on nothing but the row; else on the shapes of the arrays, too.
    Raises:
      ValueError: there is no such implementation, or what is given does not fit together.
    Source: report 2.3; fact sheet 2.3, 2.5 and 2.8.
    """
    form = _check(q, new, sink, cached, rotated)
    chosen = choose_for(q, cached.ring.shape[2], form.rotated, form.served, implementation)
    if cached.entries is not None and not cached.entries.shape[2]:
        cached = cached._replace(entries=None, end=None, chosen=None)
    if cached.end is not None:
        cached = cached._replace(end=jnp.clip(cached.end, 0, cached.entries.shape[2]))
    if chosen == XLA:
        return _plain(q, new, sink, cached, form)
    return KERNELS[chosen].forward(q, new, sink, cached, form, invariant)


def choose_for(
    q: Float[Array, "b t h k"], slots: int, rotated: int, served: bool, implementation: str
) -> str:
    """Return "xla", "gpu" or "tpu".

    Args:
      slots: of the ring.
    Raises:
      ValueError: there is no such implementation, or its kernels do not take these queries.
    """
    t, h, k = q.shape[1:]
    even = not served or (k - rotated) % 2 == 0
    fits = t <= MOST_TOKENS and h <= MOST_HEADS and even
    small = slots <= MOST_SLOTS or target_platform() != TPU
    worthwhile = k >= WORTHWHILE and q.dtype == jnp.bfloat16 and fits and small
    chosen = choose("cached_attention", implementation, worthwhile=worthwhile)
    if chosen != XLA and not fits:
        raise ValueError(
            f"cached_attention: expected at most {MOST_TOKENS} tokens of a row, at most "
            f"{MOST_HEADS} heads and an even number of FP8 channels for a kernel, got {t}, {h} "
            f"and {k - rotated}"
        )
    if chosen == TPU and slots > MOST_SLOTS:
        raise ValueError(
            f"cached_attention: expected a ring of at most {MOST_SLOTS} slots for the kernel of a "
            f"TPU, which holds it whole, got {slots}"
        )
    return chosen


def _check(q, new, sink, cached: Cached, rotated: int) -> Form:
    """Return how rows are stored."""
    (b, t, h, k), z = q.shape, cached.ring.shape[0]
    form = Form(k, rotated, cached.ring.dtype == jnp.uint8)
    wanted = [(b, t, form.width), (h,), (z, b, *cached.ring.shape[2:3], form.width), (), (b,)]
    found = [x.shape for x in (new, sink, cached.ring, cached.layer, cached.start)]
    dtypes = [new.dtype]
    if cached.entries is not None:
        seen = cached.end if cached.chosen is None else cached.chosen
        wanted += [(z, b, *cached.entries.shape[2:3], form.width), (b, t)]
        found += [cached.entries.shape, None if seen is None else seen.shape[:2]]
        dtypes.append(cached.entries.dtype)
    if wanted != found or any(dtype != cached.ring.dtype for dtype in dtypes):
        raise ValueError(
            "cached_attention: expected q [b, t, h, k], new [b, t, width], sink [h], ring [z, b, "
            "s, width], layer [], start [b] and, with entries [z, b, c, width], end [b, t] or "
            f"chosen [b, t, l], all rows of one dtype: for q {q.shape} {wanted} and "
            f"{cached.ring.dtype}, got {found} and {', '.join(map(str, dtypes))}"
        )
    if t > cached.ring.shape[2]:
        raise ValueError(
            f"cached_attention: expected at most {cached.ring.shape[2]} tokens, the ring's, got {t}"
        )
    return form


def _plain(q, new, sink, cached: Cached, form: Form):
    b, t = q.shape[:2]
    slots = cached.ring.shape[2]
    parts = [decode(cached.ring[cached.layer], form), decode(new, form)]
    masks = [reference.ring_mask(slots, cached.start, t), reference.new_mask(b, t)]
    kv = [jnp.broadcast_to(x[:, None], (b, t, *x.shape[1:])) for x in parts]
    if cached.chosen is not None:
        rows = jnp.arange(b)[:, None, None]
        found = cached.entries[cached.layer, rows, jnp.maximum(cached.chosen, 0)]
        kv.append(decode(found, form))
        masks.append(cached.chosen >= 0)
    elif cached.entries is not None:
        found = decode(cached.entries[cached.layer], form)
        kv.append(jnp.broadcast_to(found[:, None], (b, t, *found.shape[1:])))
        masks.append(jnp.arange(found.shape[1]) < cached.end[..., None])
    return reference.cached_attention(
        q, jnp.concatenate(kv, axis=2), jnp.concatenate(masks, axis=2), sink
    )
