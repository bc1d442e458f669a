"""Logits and gradients equal those of transformers' DeepSeek-V4, an independent implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax.traverse_util import flatten_dict
from hf_oracle import Oracle, import_tensors

from dsv4_jax import ModelConfig, Transformer
from dsv4_jax.config import CSA, HASH, HCA, LEARNED, WINDOW
from dsv4_jax.params import merge, split_trainable

BATCH = 2
LOGIT_TOLERANCE = 2e-5  # of the largest logit: float32 rounding through a handful of layers
GRADIENT_TOLERANCE = 1e-4  # norm of the difference over norm: the same, backwards

# At least 16 index heads: with few, all of a query's scores may be exactly 0, and ties differ.
FLASH_LIKE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    layer_types=(WINDOW, HCA, CSA, HCA, CSA),
    moe_types=(HASH,) + (LEARNED,) * 4,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=12,
    o_groups=2,
    o_lora_rank=6,
    sliding_window=6,
    csa_ratio=4,
    hca_ratio=8,
    index_n_heads=16,
    index_head_dim=12,
    index_topk=3,
    yarn_factor=4.0,
    yarn_original_positions=64,
    max_position_embeddings=256,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    swiglu_limit=1.0,
    num_nextn_predict_layers=0,
)
PRO_LIKE = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    layer_types=(HCA, CSA, HCA, CSA, HCA),
    moe_types=(HASH,) + (LEARNED,) * 4,
    num_attention_heads=6,
    head_dim=12,
    qk_rope_head_dim=12,
    q_lora_rank=16,
    o_groups=3,
    o_lora_rank=8,
    sliding_window=9,
    csa_ratio=2,
    hca_ratio=16,
    index_n_heads=24,
    index_head_dim=16,
    index_topk=5,
    rope_theta=500.0,
    compress_rope_theta=2000.0,
    yarn_factor=1.0,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    routed_scaling_factor=2.5,
    hc_mult=2,
    hc_sinkhorn_iters=3,
    hc_eps=0.03,
    rms_norm_eps=0.1,
    num_nextn_predict_layers=0,
)
UNROLLED = ModelConfig(
    vocab_size=80,
    hidden_size=40,
    layer_types=(CSA, HCA, WINDOW),
    moe_types=(LEARNED, HASH, LEARNED),
    num_attention_heads=2,
    head_dim=20,
    qk_rope_head_dim=6,
    q_lora_rank=8,
    o_groups=1,
    o_lora_rank=10,
    sliding_window=24,
    csa_ratio=4,
    hca_ratio=128,
    index_n_heads=16,
    index_head_dim=8,
    index_topk=20,
    yarn_factor=16.0,
    yarn_original_positions=512,
    yarn_beta_fast=8.0,
    max_position_embeddings=8192,
    n_routed_experts=10,
    num_experts_per_tok=4,
    moe_intermediate_size=12,
    swiglu_limit=2.0,
    hc_mult=3,
    hc_eps=0.01,
    rms_norm_eps=0.05,
    num_nextn_predict_layers=0,
)
# Lengths below, at and beyond the window, blocks and the top-k; the last has gradients too.
CASES = {
    "flash-like": (FLASH_LIKE, (1, 6, 8, 37)),
    "pro-like": (PRO_LIKE, (2, 9, 16, 45)),
    "unrolled": (UNROLLED, (20, 127, 128, 150)),
}
# For what compiles many programs: two cases, and the third with the heavy tests.
HEAVY_CASES = [
    pytest.param(name, marks=pytest.mark.heavy) if name == "pro-like" else name for name in CASES
]
# Leaves that some case leaves without a gradient: the indexer's, as the selection of entries has
# none, and a mix of the first layer's streams, which are copies of one and change with their mix
# only by way of the epsilons. Zero on both sides is equal.
INERT = ("layers_0/attention_mix/", "/indexer/")
ZERO = 1e-7  # of the largest gradient norm: below it, float32 holds nothing but noise


@functools.cache
def oracle_of(name: str) -> tuple[Oracle, dict, np.ndarray]:
    """Return the random reference of a case, its weights as our parameters and token ids."""
    config, lengths = CASES[name]
    oracle = Oracle(config, seed=len(name))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, lengths[-1]))
    return oracle, import_tensors(oracle.tensors(), config), tokens.astype(np.int32)


def assert_logits_equal(logits: jax.Array, expected: np.ndarray) -> None:
    assert logits.shape == expected.shape and logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() <= LOGIT_TOLERANCE * np.abs(expected).max()


CHANGES = {
    "sliding_window": 1,
    "index_topk": 1,
    "swiglu_limit": 1.0,
    "rope_theta": 50.0,
    "compress_rope_theta": 50.0,
    "routed_scaling_factor": 0.1,
    "hc_sinkhorn_iters": -2,
    "hc_eps": 0.01,
    "rms_norm_eps": 0.01,
}


@pytest.mark.parametrize("field", CHANGES)
def test_cases_depend_on_every_setting(field):
    """A setting that no case depends on would be equal for the wrong reason."""
    largest = 0.0
    for name, (config, _) in CASES.items():
        oracle, _, tokens = oracle_of(name)
        changed = dataclasses.replace(config, **{field: getattr(config, field) + CHANGES[field]})
        expected = oracle.logits(tokens)
        difference = np.abs(Oracle(changed, seed=len(name)).logits(tokens) - expected).max()
        largest = max(largest, difference / np.abs(expected).max())
    assert largest > 10 * LOGIT_TOLERANCE


@pytest.mark.parametrize(
    "name, length", [(name, t) for name, (_, lengths) in CASES.items() for t in lengths[:-1]]
)
def test_logits(name, length):
    oracle, params, tokens = oracle_of(name)
    tokens = tokens[:, :length]
    apply = quick_jit(Transformer(CASES[name][0]).apply)
    assert_logits_equal(apply({"params": params}, tokens), oracle.logits(tokens))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name):
    config, _ = CASES[name]
    oracle, params, tokens = oracle_of(name)
    trainable, frozen = split_trainable(params)

    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_logits(trainable):
        logits = Transformer(config).apply({"params": merge(trainable, frozen)}, tokens)
        log_probability = jax.nn.log_softmax(logits[:, :-1])
        of_next = jnp.take_along_axis(log_probability, tokens[:, 1:, None], axis=-1)
        return -of_next.mean(), logits

    gradients, logits = quick_jit(gradients_and_logits)(trainable)
    assert_logits_equal(logits, oracle.logits(tokens))
    gradients = flatten_dict(gradients, sep="/")
    expected = flatten_dict(import_tensors(oracle.gradients(tokens), config), sep="/")
    assert gradients.keys() == expected.keys()
    largest = max(np.linalg.norm(gradient) for gradient in expected.values())
    mismatches = {}
    for path, wanted in expected.items():
        norm, error = np.linalg.norm(wanted), np.linalg.norm(gradients[path] - wanted)
        zero = norm <= ZERO * largest
        inert = any(name in path for name in INERT)
        assert inert or not zero, f"{path}: the case does not exercise it"
        if error > (ZERO * largest if zero else GRADIENT_TOLERANCE * norm):
            mismatches[path] = f"{error:.1e} of {norm:.1e}, largest {largest:.1e}"
    assert not mismatches


def test_reference_gradients_have_no_float32_rounding():
    """In the flash-like case, whose epsilon is 1e-6, a first mix's true gradient is near 1e-14."""
    oracle, _, tokens = oracle_of("flash-like")
    gradients = oracle.gradients(tokens)
    first = gradients["model.layers.0.attn_hc.base"][: FLASH_LIKE.hc_mult]
    assert 0 < np.linalg.norm(first) < 1e-12
