"""Sampling draws from the stated set, and padding never shows in what is generated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import InputError, ModelConfig, Runtime, Transformer, init_params
from dsv4_jax.infer import generate, sample_token

DRAWS = 4000
SIGMAS = 5  # of a frequency over so many draws: fails by chance once in a million
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
NEW = 6


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=32, hidden_size=16, layer_types=("csa",), moe_types=("learned",),
        num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
        o_lora_rank=4, sliding_window=4, csa_ratio=2, index_n_heads=2, index_head_dim=8,
        index_topk=2, max_position_embeddings=64, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, hc_mult=2, hc_sinkhorn_iters=3, num_nextn_predict_layers=0,
        initializer_range=0.5,
    )
    return Transformer(config, Runtime()), init_params(config, jax.random.key(0))


def new_tokens(model, **changes) -> list[int]:
    options = {"max_new_tokens": NEW, "temperature": 0.0, "top_p": 1.0, "seed": 0} | changes
    return generate(*model, PROMPT, **options).tolist()


def frequencies(probabilities, temperature: float, top_p: float) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.log(jnp.array(probabilities))
    tokens = jax.vmap(lambda key: sample_token(key, logits, temperature, top_p))(keys)
    return np.bincount(tokens, minlength=len(probabilities)) / DRAWS


@pytest.mark.parametrize(("temperature", "top_p", "expected"), [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.7, [0, 5 / 8, 0, 3 / 8]),  # the two that reach 0.7 together
    (1.0, 0.45, [0, 1, 0, 0]),  # the likeliest alone has it
    (1.0, 0.9, [3 / 19, 10 / 19, 0, 6 / 19]),
    (0.5, 1.0, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),  # squared and normalised
    (0, 1.0, [0, 1, 0, 0]),
])
def test_tokens_are_drawn_from_the_stated_distribution(temperature, top_p, expected):
    expected = np.array(expected)
    error = np.abs(frequencies([0.15, 0.5, 0.05, 0.3], temperature, top_p) - expected)
    assert np.all(error <= SIGMAS * np.sqrt(expected * (1 - expected) / DRAWS))


def test_at_temperature_0_each_token_is_the_likeliest_of_an_unpadded_forward(model):
    transformer, params = model
    new = new_tokens(model)
    row = np.array([[*PROMPT, *new[:-1]]], np.int32)
    logits = jax.jit(transformer.apply)({"params": params}, row)
    assert jnp.argmax(logits[0, len(PROMPT) - 1 :], axis=-1).tolist() == new
    assert len(new) == NEW


def test_the_stop_token_ends_the_text_and_is_not_part_of_it(model):
    new = new_tokens(model)
    stop = new[-1]
    assert new_tokens(model, stop_id=stop) == new[: new.index(stop)]


def test_the_seed_decides(model):
    texts = [new_tokens(model, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "prompt: expected at least one token"),
    ([1, 32], r"expected 0 to 31 .* got 32 at index \(1,\)"),
    ([-1], "got -1"),
])
def test_a_bad_prompt_is_refused(model, prompt, message):
    with pytest.raises(InputError, match=message):
        generate(*model, np.array(prompt), max_new_tokens=1, temperature=0, top_p=1, seed=0)
