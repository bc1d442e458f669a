"""Attention over a cache by the kernels of a device, in place of what `cached` does.

A few tokens read the cache as it is stored, for that is most of what they read. For many, what a
layer has stored is decoded once, which takes up to twice the memory of its entries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from dsv4_jax.attention.cached import Choice, read_seen, select_entries
from dsv4_jax.attention.core import Earlier
from dsv4_jax.cache import StackedCache, after_ring
from dsv4_jax.cache_format import decode_index_key, round_index
from dsv4_jax.config import SERVED, ModelConfig, Runtime
from dsv4_jax.shapes import Array, Float, Keys, Queries
from pallas_kernels import cached_attention, indexer, sparse_attention
from pallas_kernels.cached_attention import Cached
from pallas_kernels.implementation import XLA, choose
from pallas_kernels.sparse_attention import Seen
from pallas_kernels.target import TPU, target_platform

# Entries per chosen one up to which masking the others pays on TPU, where kernels do not gather. An
# estimate: XLA gathers a query's 512 rows in 1 to 2 us, which 64 heads multiply some 6,000 in.
MASKED_UP_TO = 16

# From a layer's stored entries, if it has any, their layout and, unless all that are seen are
# meant, the choice of the best, each None by default.
Attend = Callable[..., Queries]


def attend_by_kernel(
    q: Queries, kv: Keys, new: Array, sink: Float[Array, " h"], earlier: Earlier,
    cache: StackedCache, *, config: ModelConfig, runtime: Runtime,
) -> Attend | None:
    """Return what attends new tokens to a cache; None: no kernel does.

    Args:
      kv: keys of the tokens, as they come back from the cache.
      new: as stored.
      cache: before them.
    """
    common = dict(config=config, runtime=runtime)
    if q.shape[1] <= min(cached_attention.MOST_TOKENS, config.sliding_window):
        return _few(q, new, sink, earlier, cache, **common)
    return _many(q, kv, sink, earlier, worthwhile=_few_are_masked(cache, **common), **common)


def _few_are_masked(cache: StackedCache, *, config: ModelConfig, runtime: Runtime) -> bool:
    """Say whether a kernel would read few entries in vain for each that is chosen."""
    index = cache.stack.index
    if index is None or runtime.csa != "sparse" or target_platform() != TPU:
        return True
    slots = index.entries.shape[2]
    if runtime.batch_invariant:  # bits must not depend on the cache's size
        slots = config.max_position_embeddings // config.csa_ratio
    return slots <= MASKED_UP_TO * config.index_topk


def _few(
    q: Queries, new: Array, sink: Float[Array, " h"], earlier: Earlier, cache: StackedCache, *,
    config: ModelConfig, runtime: Runtime,
) -> Attend | None:
    implementation, rotated = runtime.implementation("cached_attention"), config.qk_rope_head_dim
    ring = cache.stack.window
    chosen = cached_attention.choose_for(
        q, ring.shape[2], rotated, runtime.entry_format == SERVED, implementation
    )
    if chosen == XLA:
        return None

    def attend(stored=None, layout=None, choice=None) -> Queries:
        # A row without tokens may start before them; its output means nothing.
        cached = Cached(ring, cache.layer, jnp.maximum(earlier.start, 0))
        if stored is not None:
            cached = cached._replace(entries=stored.entries, end=layout.end)
        if choice is not None:
            best = select_entries(*choice, layout.end, runtime.implementation("indexer"))
            cached = cached._replace(end=None, chosen=best)
        return cached_attention.cached_attention(
            q, new, sink, cached, rotated=rotated, invariant=runtime.batch_invariant,
            implementation=chosen,
        )

    return attend


def _many(
    q: Queries, kv: Keys, sink: Float[Array, " h"], earlier: Earlier, *, worthwhile: bool,
    config: ModelConfig, runtime: Runtime,
) -> Attend | None:
    chosen = sparse_attention.choose_for(
        q, runtime.implementation("sparse_attention"), worthwhile=worthwhile
    )
    if chosen == XLA:
        return None

    def attend(stored=None, layout=None, choice=None) -> Queries:
        keys = after_ring(earlier.keys, kv, earlier.start)
        first_key = jnp.maximum(earlier.keys.shape[1] - earlier.start, 0)  # of the row
        seen, entries = Seen(jnp.broadcast_to(first_key[:, None], q.shape[:2])), None
        if stored is not None:
            end = jnp.minimum(layout.end, stored.entries.shape[2])
            seen = seen._replace(first=layout.first, end=end)
            entries = stored.seen(end, q.dtype)
        if choice is not None:
            seen = _best_of_many(choice, seen, config, runtime.implementation("indexer"))
        return sparse_attention.sparse_attention(
            q, keys, entries, sink, seen, config.sliding_window, chosen
        )[0]

    return attend


def _best_of_many(
    choice: Choice, seen: Seen, config: ModelConfig, implementation: str
) -> Seen:
    """Add the best entries to what is seen."""
    stored, asked = choice
    kernel = choose("indexer", implementation)
    if kernel == XLA or asked.queries.shape[1] <= indexer.MOST_TOKENS:
        return seen._replace(chosen=select_entries(*choice, seen.end, implementation))
    dtype, form = asked.queries.dtype, stored.form
    decode = partial(decode_index_key, width=config.index_head_dim, form=form, dtype=dtype)
    return indexer.select(
        round_index(asked.queries, form), asked.head_weights,
        read_seen(stored.entries, stored.layer, seen.end, decode), seen, config.index_topk, kernel,
        rounded=form == SERVED,
    )
