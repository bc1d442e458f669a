"""One transformer layer: attention and MoE, each between reads and writes of the streams."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention import Attention, Places
from dsv4_jax.cache import LayerCache, StackedCache
from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.layer_stats import LayerStats
from dsv4_jax.layers import rms_norm
from dsv4_jax.mhc import Residual, StreamMix, Write, leave, sinkhorn_error
from dsv4_jax.moe import MoE
from dsv4_jax.params import param
from dsv4_jax.shapes import Array, Bool, Int, Tokens


class Batch(NamedTuple):
    """What every layer knows of its batch beside the streams."""

    tokens: Tokens
    valid: Bool[Array, "b t"]  # not padding
    places: dict[str, Places]  # by attention kind
    experts: Int[Array, "b t a"] | None = None  # to take, in this layer; None: the router's choice


class Block(nn.Module):
    """A layer: two sublayers wrapped by manifold-constrained hyper-connections.

    Source: report 2.1 to 2.3; fact sheet 2.1.
    """

    config: ModelConfig
    runtime: Runtime
    attention_kind: str
    moe_kind: str
    layer: int

    @nn.compact
    def __call__(
        self, residual: Residual, batch: Batch, cache: StackedCache | None = None
    ) -> tuple[Residual, LayerStats, LayerCache | None]:
        """Return the streams, perhaps with a write pending, statistics and any cache's stack."""
        c, eps = self.config, self.config.rms_norm_eps
        width, ones = (c.hidden_size,), nn.initializers.ones

        mix = StreamMix(c, self.runtime, 2 * self.layer, name="attention_mix")
        streams, x, post, comb = mix(residual)
        norm = param(self, "attention_norm", "width", width, ones)
        attention = Attention(c, self.runtime, self.attention_kind, name="attention")
        x = rms_norm(x, norm, eps=eps)
        y, lesson, kept = attention(x, batch.places[self.attention_kind], cache)
        residual = leave(streams, Write(y, post, comb), c, self.runtime)
        error = sinkhorn_error(comb)

        mix = StreamMix(c, self.runtime, 2 * self.layer + 1, name="moe_mix")
        streams, x, post, comb = mix(residual)
        norm = param(self, "moe_norm", "width", width, ones)
        moe = MoE(c, self.runtime, self.moe_kind, self.layer, name="moe")
        x = rms_norm(x, norm, eps=eps)
        y, experts, load, balance_loss = moe(x, batch.tokens, batch.valid, batch.experts)
        error = jnp.maximum(error, sinkhorn_error(comb))
        residual = leave(streams, Write(y, post, comb), c, self.runtime)
        return residual, LayerStats(experts, load, balance_loss, error, lesson), kept


def block_class(runtime: Runtime) -> type[Block]:
    """Return the layer's class, one that recomputes itself in the backward pass if so wanted.

    XLA must be kept from merging the recomputation with the forward pass and, of layers that are
    scanned together, from recomputing all at once: that would take the memory of all.
    """
    return nn.remat(Block) if runtime.remat else Block
