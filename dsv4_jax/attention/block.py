"""One attention sublayer: projections, rotation, the core of its kind, grouped output."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention.compressor import Compressor
from dsv4_jax.attention.core import all_visible, attend_hybrid, attend_window
from dsv4_jax.attention.csa import attend_selected
from dsv4_jax.attention.indexer import Indexer
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.config import CSA, WINDOW, ModelConfig, Runtime
from dsv4_jax.layers import rms_norm
from dsv4_jax.params import param
from dsv4_jax.rope import Rotation, rotate
from dsv4_jax.shapes import Array, Entries, Float, Hidden, Queries, Tokens
from dsv4_jax.sharding import constrain


class Places(NamedTuple):
    """Where the tokens of a batch stand, for layers of one attention kind."""

    at_query: Rotation
    at_entry: Rotation | None  # at the first token of each compressed block
    layout: EntryLayout | None
    segment_ids: Tokens | None


class Attention(nn.Module):
    """Shared-KV multi-query attention: one key-value vector per token serves all heads.

    Source: report 2.3; fact sheet 2.3.
    """

    config: ModelConfig
    runtime: Runtime
    kind: str

    @nn.compact
    def __call__(self, x: Hidden, places: Places) -> Hidden:
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

        q_rank = rms_norm(_project("btd,dr->btr", x, w_q_a), q_norm, eps=c.rms_norm_eps)
        q = rms_norm(_project("btr,rhk->bthk", q_rank, w_q_b), eps=c.rms_norm_eps)
        q = constrain(rotate(q, places.at_query), "batch token heads head_width", self.runtime.mesh)
        kv = rms_norm(_project("btd,dk->btk", x, w_kv), kv_norm, eps=c.rms_norm_eps)
        kv = rotate(kv, places.at_query)
        out = self._attend(x, q_rank, q, kv, sink, places)
        out = rotate(out, places.at_query, inverse=True)
        out = out.reshape(*out.shape[:2], groups, per_group, width)
        out = _project("btghk,ghko->btgo", out, w_o_a)
        return _project("btgo,god->btd", out, w_o_b).astype(dtype)

    def _attend(self, x, q_rank, q, kv, sink, places: Places) -> Queries:
        """Run the core of this layer's kind."""
        c = self.config
        if self.kind == WINDOW:
            return attend_window(
                q, kv, sink, window=c.sliding_window, segment_ids=places.segment_ids
            )
        entries = self._compress(x, places)
        common = dict(
            window=c.sliding_window, ratio=c.ratio(self.kind), layout=places.layout,
            segment_ids=places.segment_ids,
        )
        if self.kind == CSA:
            index = Indexer(c, name="indexer")(
                x, q_rank, places.layout, places.at_query, places.at_entry
            )
            if self.runtime.csa == "sparse":
                return attend_selected(
                    q, kv, entries, index, sink, topk=c.index_topk, **common
                )
        return attend_hybrid(q, kv, entries, sink, choose=all_visible, **common)

    def _compress(self, x: Hidden, places: Places) -> Entries:
        c = self.config
        compressor = Compressor(
            c, c.ratio(self.kind), c.head_dim, overlapping=self.kind == CSA, name="compressor"
        )
        return compressor(x, places.layout, places.at_entry)


def _project(form: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Array:
    return jnp.einsum(form, x, w.astype(x.dtype))
