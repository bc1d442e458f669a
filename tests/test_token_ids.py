"""Ids outside a vocabulary are refused wherever their values are known."""

from __future__ import annotations

import jax
import jaxtyping
import numpy as np
import pytest

from dsv4_jax import InputError, ModelConfig, Transformer, check_token_ids, init_params
from dsv4_jax.config import HASH, WINDOW


@pytest.mark.parametrize("ids", [[], [0], [9], [0, 9], np.array([[1, 2], [3, 9]], np.uint16)])
def test_ids_in_range_pass(ids):
    check_token_ids(ids, 10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], r"0 to 9 \(vocab_size 10\), got -1 at index \(1,\)"),
        ([[1, 2], [10, 3]], r"0 to 9 \(vocab_size 10\), got 10 at index \(1, 0\)"),
        ([2**31], "got 2147483648"),
        ([2**70], "expected integers, got object"),
        ([1.0], "expected integers, got float64"),
        ([True], "expected integers, got bool"),
    ],
)
def test_ids_out_of_range_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        check_token_ids(ids, 10)


@pytest.fixture(scope="module")
def model_and_params():
    config = ModelConfig(
        vocab_size=8, hidden_size=8, layer_types=(WINDOW,), moe_types=(HASH,),
        num_attention_heads=8, head_dim=8, qk_rope_head_dim=4, q_lora_rank=4, o_lora_rank=4,
        n_routed_experts=8, moe_intermediate_size=4, num_nextn_predict_layers=0,
    )  # fmt: skip
    return Transformer(config), init_params(config, jax.random.key(0))


@pytest.mark.parametrize("token", [-1, 8])
def test_the_model_refuses_ids_that_it_has_no_row_for(token, model_and_params):
    model, params = model_and_params
    tokens = np.array([[0, 7, token]], np.int32)
    with pytest.raises(InputError, match=rf"expected 0 to 7 .*, got {token} at index \(0, 2\)"):
        model.apply({"params": params}, tokens)


@pytest.mark.parametrize("name", ["segment_ids", "positions"])
def test_the_model_refuses_what_is_not_one_integer_per_token(name, model_and_params, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    model, params = model_and_params
    tokens, other = np.zeros((2, 3), np.int32), np.ones((3,), np.int32)
    with pytest.raises(InputError, match=rf"{name}: expected .* \(2, 3\), got \(3,\); give one"):
        model.apply({"params": params}, tokens, **{name: other})
