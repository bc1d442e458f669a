"""One attention sublayer: projections, rotation, the core of its kind, grouped output."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention import by_kernel
from dsv4_jax.attention.cached import (
    Choice,
    StoredEntries,
    attend_all,
    attend_best,
    read_and_write_window,
    sees_all_entries,
    store_entries,
)
from dsv4_jax.attention.cached_by_kernel import attend_by_kernel
from dsv4_jax.attention.compressor import Compressor, EarlierTokens
from dsv4_jax.attention.core import all_visible, attend_hybrid, attend_window
from dsv4_jax.attention.csa import attend_csa
from dsv4_jax.attention.indexer import Indexer, round_asked
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.cache import LayerCache, Span, StackedCache
from dsv4_jax.cache_format import encode_entry, encode_index_key, round_entry
from dsv4_jax.collectives import sum_over
from dsv4_jax.config import CSA, FP4, FP8, WINDOW, ModelConfig, Runtime
from dsv4_jax.layers import linear, project, rms_norm
from dsv4_jax.params import param
from dsv4_jax.rope import Rotation, rotate
from dsv4_jax.shapes import Array, Float, Hidden, Queries, Tokens


class Places(NamedTuple):
    """Where the tokens of a batch stand, for layers of one attention kind."""

    at_query: Rotation
    at_entry: Rotation | None  # at the first token of each compressed block
    layout: EntryLayout | None
    segment_ids: Tokens | None
    span: Span | None = None  # with a cache: where the tokens stand in their rows


class Attention(nn.Module):
    """Shared-KV multi-query attention: one key-value vector per token serves all heads.

    Source: report 2.3; fact sheet 2.3.
    """

    config: ModelConfig
    runtime: Runtime
    kind: str

    @nn.compact
    def __call__(
        self, x: Hidden, places: Places, cache: StackedCache | None = None
    ) -> tuple[Hidden, Lesson | None, LayerCache | None]:
        """Return the output, a learning indexer's lesson and, if any, the cache with x too.

        The lesson is summed over the batch.
        """
        c, dtype, d = self.config, x.dtype, x.shape[-1]
        heads, width, rank, groups = (
            c.num_attention_heads, c.head_dim, c.q_lora_rank, c.o_groups,
        )
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        per_group = heads // groups
        w_q_a = param(self, "w_q_a", "width -> rank", (d, rank))
        q_norm = param(self, "q_norm", "rank", (rank,), ones)
        w_q_b = param(self, "w_q_b", "rank -> heads head_width", (rank, heads, width))
        w_kv = param(self, "w_kv", "width -> entry", (d, width))
        kv_norm = param(self, "kv_norm", "entry", (width,), ones)
        sink = param(self, "sink", "heads", (heads,), zeros)
        w_o_a = param(
            self, "w_o_a", "groups | group_heads head_width -> out_rank",
            (groups, per_group, width, c.o_lora_rank),
        )
        w_o_b = param(self, "w_o_b", "groups out_rank -> width", (groups, c.o_lora_rank, d))

        q_rank = linear("btd,dr->btr", x, w_q_a, self.runtime)
        q_rank = rms_norm(q_rank, q_norm, eps=c.rms_norm_eps)
        q = rms_norm(linear("btr,rhk->bthk", q_rank, w_q_b, self.runtime), eps=c.rms_norm_eps)
        q = rotate(q, places.at_query)
        kv = rms_norm(linear("btd,dk->btk", x, w_kv, self.runtime), kv_norm, eps=c.rms_norm_eps)
        kv = rotate(kv, places.at_query)
        lesson = kept = None
        if cache is None:
            out, lesson = self._attend(x, q_rank, q, kv, sink, places)
            lesson = jax.tree.map(jnp.sum, lesson)
        else:
            out, kept = self._attend_cached(x, q_rank, q, kv, sink, places, cache)
        out = rotate(out, places.at_query, inverse=True)
        out = out.reshape(*out.shape[:2], -1, per_group, width)
        out = self._project_groups(out, w_o_a)
        y = linear("btgo,god->btd", out, w_o_b, self.runtime, preferred_element_type=jnp.float32)
        # Each device of "tensor" has the part of its heads.
        return sum_over(y, ("tensor",), self.runtime.mesh).astype(dtype), lesson, kept

    def _project_groups(self, x: Float[Array, "b t g h k"], w: Float[Array, "g h k o"]) -> Array:
        """Project each group of heads by a matrix of its own.

        As in the reference tokens are not rounded here, though the matrix is stored in FP8.
        """
        if not self.runtime.batch_invariant:
            return project("btghk,ghko->btgo", x, w, self.runtime)
        # XLA on CPU groups the sums of a batch of products by the number of rows.
        groups = [
            project("bthk,hko->bto", x[:, :, g], w[g], self.runtime) for g in range(w.shape[0])
        ]
        return jnp.stack(groups, axis=2)

    def _attend(
        self, x, q_rank, q, kv, sink, places: Places
    ) -> tuple[Queries, Lesson | None]:
        """Run the core of this layer's kind."""
        c, fp8, fp4 = self.config, self.runtime.keys == FP8, self.runtime.indexer == FP4
        kv = round_entry(kv, c) if fp8 else kv
        entries = index = None
        if self.kind != WINDOW:
            entries, _ = self._compressor(rounded=fp8)(x, places.layout, places.at_entry)
        if self.kind == CSA:
            detached = jax.lax.stop_gradient((x, q_rank))  # it learns from its own loss alone
            index, _ = self._indexer()(
                *detached, places.layout, places.at_query, places.at_entry
            )
            index = round_asked(index) if fp4 else index
        sparse = self.runtime.csa == "sparse"
        common = dict(layout=places.layout, segment_ids=places.segment_ids)
        if by_kernel.takes_over(q, self.runtime, self.kind):
            return by_kernel.attend(
                q, kv, entries, sink, index, config=c, runtime=self.runtime, **common
            )
        common["window"] = c.sliding_window
        if self.kind == WINDOW:
            return attend_window(
                q, kv, sink, window=c.sliding_window, segment_ids=places.segment_ids
            ), None
        common["ratio"] = c.ratio(self.kind)
        if self.kind == CSA:
            return attend_csa(
                q, kv, entries, index, sink, topk=c.index_topk, sparse=sparse,
                learn=self.runtime.index_learns, rounded=fp4, mesh=self.runtime.mesh, **common,
            )
        return attend_hybrid(q, kv, entries, sink, choose=all_visible, **common)

    def _attend_cached(self, x, q_rank, q, kv, sink, places: Places, cache: StackedCache):
        """Run the core over what earlier calls have read and x; return its output and the cache."""
        c, form, index_form = self.config, self.runtime.entry_format, self.runtime.index_format
        (window, main, index), layer, span = cache.stack, cache.layer, places.span
        earlier, kv, new, window = read_and_write_window(window, layer, kv, span, c, form)
        attend = attend_by_kernel(
            q, kv, new, sink, earlier, cache, config=c, runtime=self.runtime
        )
        common = dict(window=c.sliding_window, earlier=earlier)
        if self.kind == WINDOW:
            out = attend() if attend else attend_window(q, kv, sink, **common)
            return out, LayerCache(window, None, None)
        layout, ratio = places.layout, c.ratio(self.kind)
        entries, pending = self._compressor()(
            x, layout, places.at_entry, EarlierTokens(main.pending, layer, span)
        )
        main = store_entries(main, layer, encode_entry(entries, c, form), pending, span, ratio)
        stored, choice = StoredEntries(main.entries, layer, c, form), None
        if self.kind == CSA:
            asked, pending = self._indexer()(
                x, q_rank, layout, places.at_query, places.at_entry,
                EarlierTokens(index.pending, layer, span),
            )
            keys = encode_index_key(asked.keys, index_form)
            index = store_entries(index, layer, keys, pending, span, ratio)
            if self.runtime.csa == "sparse" and not sees_all_entries(c):
                choice = Choice(StoredEntries(index.entries, layer, c, index_form), asked)
        if attend:
            out = attend(stored, layout, choice)
        elif choice:
            out = attend_best(
                q, kv, sink, stored, choice, layout=layout, **common,
                implementation=self.runtime.implementation("indexer"),
            )
        else:
            out = attend_all(q, kv, sink, stored, layout=layout, **common)
        return out, LayerCache(window, main, index)

    def _compressor(self, rounded: bool = False) -> Compressor:
        c = self.config
        return Compressor(
            c, self.runtime, c.ratio(self.kind), c.head_dim, overlapping=self.kind == CSA,
            rounded=rounded, name="compressor",
        )

    def _indexer(self) -> Indexer:
        return Indexer(self.config, self.runtime, name="indexer")
