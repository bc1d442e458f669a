"""Floating-point operations of one decoded token, by kind of work, and those of DeepSeek-V3.2.

Source: report 2.3.4; fact sheet 8, whose weights by precision fit the report's claims.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dsv4_jax.config import CSA, HCA, ModelConfig
from dsv4_jax.convert.table import EXPERT, LINEAR, tensors_of, weights_of
from dsv4_jax.params import IN


class TokenCost(NamedTuple):
    """Operations of one token; a multiply-add is two."""

    quantised: int  # of matrices that are stored in FP8 or FP4, multiplied in FP8
    plain: int  # of the other matrices, multiplied in BF16
    core: int  # of attention to tokens and entries, in BF16
    index: int  # of the lightning indexer's scores, in FP4 (V4) or FP8 (V3.2)

    @property
    def total(self) -> int:
        """All operations, whatever their precision."""
        return sum(self)

    def weighted(self, *, plain: float = 2.0, index: float = 0.5) -> float:
        """Return the cost in operations of FP8, of which an operation of BF16 is worth two.

        Args:
          plain: weight of products with plain matrices.
          index: weight of the indexer's scores; 1 in V3.2.
        """
        return self.quantised + plain * self.plain + 2.0 * self.core + index * self.index


def token_cost(config: ModelConfig, length: int) -> TokenCost:
    """Count the matrix products for one token, itself the last of `length`.

    Counted is what the method needs: its own experts, the best entries, the visible part of the
    window. Left out are the mixing of residual streams (a few thousandths) and multi-token
    prediction.
    """
    kinds = config.layer_types
    seen = {kind: min(length, config.sliding_window) for kind in set(kinds)}
    if CSA in seen:
        seen[CSA] += min(config.index_topk, length // config.csa_ratio)
    if HCA in seen:
        seen[HCA] += length // config.hca_ratio
    slots = sum(seen[kind] for kind in kinds)
    scored = kinds.count(CSA) * (length // config.csa_ratio)
    by_kind = _products_by_storage(config)
    quantised = by_kind.pop(LINEAR, 0) + by_kind.pop(EXPERT, 0)
    return TokenCost(
        quantised=2 * quantised,
        plain=2 * sum(by_kind.values()),
        core=2 * slots * config.num_attention_heads * 2 * config.head_dim,
        index=2 * scored * config.index_n_heads * config.index_head_dim,
    )


def _products_by_storage(config: ModelConfig) -> dict[str, int]:
    """Return the multiply-adds of a token with all its matrices, by how these are stored."""
    weights, found = weights_of(config), {}
    for tensor in tensors_of(config):
        is_matrix = all(IN in weights[part.path].kinds for part in tensor.parts)
        if is_matrix and tensor.group not in ("embedding", "mtp"):
            found[tensor.kind] = found.get(tensor.kind, 0) + math.prod(tensor.shape)
    if EXPERT in found:
        found[EXPERT] = found[EXPERT] * config.num_experts_per_tok // config.n_routed_experts
    return found


def v32_token_cost(length: int) -> TokenCost:
    """Count the same for DeepSeek-V3.2, whose matrices all count as quantised.

    Heads attend to latents of 512 channels and 64 rotated ones: keys of 576, values of 512.

    Source: its published config.json.
    """
    layers, dense, width, heads, latent, rotated = 61, 3, 7168, 128, 512, 64
    q_rank, head, index_heads, index_width, topk = 1536, 128, 64, 128, 2048
    attention = (
        width * q_rank + q_rank * heads * (head + rotated) + width * (latent + rotated)
        + latent * heads * 2 * head + heads * head * width
    )
    indexer = q_rank * index_heads * index_width + width * (index_width + index_heads)
    moe = 256 * width + (8 + 1) * 3 * width * 2048  # router, 8 of 256 experts and the shared one
    mlps = dense * 3 * width * 18_432 + (layers - dense) * moe
    matrices = layers * (attention + indexer) + mlps + width * 129_280
    return TokenCost(
        quantised=2 * matrices,
        plain=0,
        core=2 * layers * min(topk, length) * heads * (latent + rotated + latent),
        index=2 * layers * length * index_heads * index_width,
    )


def share_of_v32(config: ModelConfig, length: int) -> float:
    """Return the weighted cost of a token over that of V3.2's."""
    return token_cost(config, length).weighted() / v32_token_cost(length).weighted(index=1.0)
