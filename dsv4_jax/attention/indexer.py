"""The lightning indexer: score compressed entries cheaply and keep the best k, exactly."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention.compressor import Compressor, EarlierTokens
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.cache import Pending
from dsv4_jax.cache_format import round_index
from dsv4_jax.config import SERVED, ModelConfig, Runtime
from dsv4_jax.layers import linear, project
from dsv4_jax.params import param
from dsv4_jax.rope import Rotation, rotate
from dsv4_jax.shapes import Array, Bool, Float, Hidden, Int


class IndexQueries(NamedTuple):
    """What the indexer asks of the entries."""

    queries: Float[Array, "b t i j"]
    head_weights: Float[Array, "b t i"]
    keys: Float[Array, "b c j"]


def index_scores(
    queries: Float[Array, "b z q i j"],
    head_weights: Float[Array, "b z q i"],
    keys: Float[Array, "b c j"] | Float[Array, "b z q c j"],
) -> Float[Array, "b z q c"]:
    """Score entries: I_{q,c} = sum_i w_{q,i} relu(q_{q,i} . k_c), float32.

    Args:
      keys: of entries that all queries share, or each query's own.

    Source: report 2.3.1; fact sheet 2.6.
    """
    axes = "bcj" if keys.ndim == 3 else "bzqcj"
    hits = jnp.einsum(f"bzqij,{axes}->bzqic", queries, keys, preferred_element_type=jnp.float32)
    return jnp.sum(jax.nn.relu(hits) * head_weights[..., None], axis=-2)  # XLA fuses it


def top_entries(
    scores: Float[Array, "*rows c"], visible: Bool[Array, "*rows c"], k: int
) -> tuple[Int[Array, "*rows l"], Bool[Array, "*rows l"]]:
    """Return the indices of the k best visible entries and which of them exist.

    Ties go to the lowest index. Rows with fewer than k visible entries get all of them.
    """
    _, index = jax.lax.top_k(jnp.where(visible, one_zero(scores), -jnp.inf), k)
    return index, jnp.take_along_axis(visible, index, axis=-1)


def top_mask(
    scores: Float[Array, "*rows c"], visible: Bool[Array, "*rows c"], k: int
) -> Bool[Array, "*rows c"]:
    """Mark the k best visible entries: the set that `top_entries` returns, without sorting.

    Finds the k-th largest score bit by bit, by counting the entries at or above a candidate,
    then, among entries equal to it, the index up to which they are needed, in the same way.
    """
    order = jnp.where(visible, _ordered_bits(scores), 0)

    def count(mask):
        return jnp.sum(mask, axis=-1, keepdims=True)

    def raise_threshold(bit, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        return jnp.where(count(order >= candidate) >= k, candidate, threshold)

    start = jnp.zeros_like(order[..., :1])
    threshold = jax.lax.fori_loop(0, 32, raise_threshold, start)
    above, ties = order > threshold, order == threshold
    needed = k - count(above)
    index = jnp.arange(scores.shape[-1])
    bits = scores.shape[-1].bit_length()

    # The largest bound below which fewer than `needed` ties lie: ties up to it are all needed.
    def raise_bound(bit, bound):
        candidate = bound | (1 << (bits - 1 - bit))
        return jnp.where(count(ties & (index < candidate)) <= needed, candidate, bound)

    bound = jax.lax.fori_loop(0, bits, raise_bound, jnp.zeros(start.shape, jnp.int32))
    return (above | (ties & (index < bound))) & visible


def _ordered_bits(x: Float[Array, "..."]) -> Array:
    """Map float32 to uint32 so that order is kept and every number maps above 0."""
    bits = jax.lax.bitcast_convert_type(one_zero(x), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def one_zero(x: Float[Array, "..."]) -> Array:
    """Replace -0 by 0: equal scores must tie, but an order of bits tells them apart."""
    return jnp.where(x == 0, 0.0, x)


def round_asked(asked: IndexQueries) -> IndexQueries:
    """Round queries and keys to FP4, as a served cache has them."""
    queries, keys = (round_index(x, SERVED) for x in (asked.queries, asked.keys))
    return asked._replace(queries=queries, keys=keys)


class Indexer(nn.Module):
    """Queries from the shared low-rank projection, keys from a compressor of its own."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Hidden, q_rank: Float[Array, "b t r"], layout: EntryLayout,
        at_query: Rotation, at_entry: Rotation, earlier: EarlierTokens | None = None,
    ) -> tuple[IndexQueries, Pending | None]:
        """Return what is asked, with the keys of the blocks in x, and what is pending."""
        c = self.config
        heads, width = c.index_n_heads, c.index_head_dim
        w_q = param(self, "w_q", "rank -> index_heads index_width", (c.q_lora_rank, heads, width))
        w_heads = param(self, "w_heads", "width -> index_heads", (c.hidden_size, heads))
        compressor = Compressor(
            c, self.runtime, c.csa_ratio, width, overlapping=True, name="compressor"
        )
        queries = linear("btr,rij->btij", q_rank, w_q, self.runtime)
        head_weights = project(
            "btd,di->bti", x, w_heads, self.runtime, preferred_element_type=jnp.float32
        )
        head_weights = head_weights * (width**-0.5 * heads**-0.5)
        keys, pending = compressor(x, layout, at_entry, earlier)
        return IndexQueries(rotate(queries, at_query), head_weights, keys), pending
