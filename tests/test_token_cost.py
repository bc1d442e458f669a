"""The cost of a token is that of the program, and V4's shares of V3.2's are the published ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax.linen import meta
from test_cache_format import FLASH, PRO
from test_hf_parity import FLASH_LIKE

from dsv4_jax import ModelConfig, Runtime, Transformer
from dsv4_jax.cache import ENTRY_TILE, init_cache
from dsv4_jax.config import CSA, HCA, WINDOW
from dsv4_jax.flops import count_flops
from dsv4_jax.model import param_shapes
from dsv4_jax.token_cost import TokenCost, share_of_v32, token_cost, v32_token_cost

# One tile of entries in both kinds of layers, all of them visible, so that the program computes
# nothing in vain.
LENGTH = 4 * ENTRY_TILE
SMALL = dataclasses.replace(FLASH_LIKE, hca_ratio=4, max_position_embeddings=2 * LENGTH)


def program_products(config: ModelConfig) -> int:
    """Return the operations of the matrix products with which a token is decoded."""
    runtime = Runtime(moe="ragged")  # counts each expert's rows once
    cache = jax.eval_shape(lambda: init_cache(config, runtime, rows=1, max_length=LENGTH))
    tokens, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))

    def decode(params, tokens, count, cache):
        model = Transformer(config, runtime)
        features, cache = model.apply({"params": params}, tokens, count, cache, method="extend")
        return features.logits, cache

    params = meta.unbox(param_shapes(config))
    return count_flops(decode, params, tokens, count, cache).matmul


@pytest.mark.parametrize("kinds", [FLASH_LIKE.layer_types, *([k] * 5 for k in (WINDOW, HCA, CSA))])
def test_the_cost_is_the_programs_own(kinds):
    """To the last operation, with what `token_cost` says that it leaves out."""
    config = dataclasses.replace(SMALL, layer_types=tuple(kinds))
    n, d, layers = config.hc_mult, config.hidden_size, len(kinds)
    # Two sublayers read from, write to and mix n streams; the head reads once more.
    streams = layers * 2 * (n + n + n * n) * d + n * d
    # The ring still holds the token that has just left the window, which is masked.
    left_window = layers * config.num_attention_heads * 2 * config.head_dim
    more = 2 * (streams + left_window)
    assert program_products(config) == token_cost(config, LENGTH).total + more


def test_a_short_row_costs_what_it_has():
    config = dataclasses.replace(SMALL, layer_types=(WINDOW, HCA, CSA, HCA, CSA))
    per_slot = 2 * config.num_attention_heads * 2 * config.head_dim
    costs = [token_cost(config, length) for length in (1, 3, 4, 6, 8)]
    assert [cost.core // per_slot for cost in costs] == [5, 15, 24, 34, 38]
    per_entry = 2 * config.index_n_heads * config.index_head_dim
    assert [cost.index // per_entry for cost in costs] == [0, 0, 2, 2, 4]


def test_costs_at_a_million_tokens():
    """Source: fact sheet 8, GFLOP."""
    found = [
        [round(part / 1e9, 1) for part in cost]
        for cost in (v32_token_cost(2**20), token_cost(PRO, 2**20), token_cost(FLASH, 2**20))
    ]
    assert found == [[75.0, 0.0, 34.8, 1048.0], [93.8, 3.9, 76.7, 128.8], [24.7, 1.8, 23.6, 90.2]]
    assert round(v32_token_cost(2**20).weighted(index=1) / 1e9, 1) == 1192.5
    weighted = [round(token_cost(config, 2**20).weighted() / 1e9, 1) for config in (PRO, FLASH)]
    assert weighted == [319.4, 120.7]


@pytest.mark.parametrize("config, percent", [
    (PRO, {2**12: 82, 2**15: 72, 2**17: 53, 2**20: 26.8}),
    (FLASH, {2**12: 22, 2**15: 20, 2**17: 16, 2**20: 10.1}),
])
def test_shares_of_v32(config, percent):
    """Source: fact sheet 8; report 2.3.4 claims 27 and 10 % at a million tokens."""
    for length, expected in percent.items():
        digits = 1 if length == 2**20 else None
        assert round(100 * share_of_v32(config, length), digits) == expected


def test_weights_are_those_of_precisions():
    cost = TokenCost(quantised=1, plain=10, core=100, index=1000)
    assert cost.total == 1111
    assert cost.weighted() == 1 + 20 + 200 + 500
    assert cost.weighted(plain=1, index=1) == 1 + 10 + 200 + 1000
