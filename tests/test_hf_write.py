"""What is written as config.json is read as the same model, by us and by transformers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_config import RELEASED, edited, load
from transformers import DeepseekV4Config

from dsv4_jax.config import ATTENTION_KINDS, HASH, LEARNED, MOE_KINDS, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.hf_write import (
    UNKNOWN,
    Storage,
    deepseek_config,
    inference_config,
    storage_of,
    transformers_config,
)

INSTRUCT = Storage(experts="fp4", linears="fp8")
PLAIN = Storage()
BASE = Storage(experts="fp8", linears="fp8", scales="float32")


@st.composite
def models(draw) -> ModelConfig:
    """Draw an architecture; what only training from scratch reads keeps its default."""

    def size(low: int = 1, high: int = 10**4) -> int:
        return draw(st.integers(low, high))

    def number(low: float, high: float) -> int | float:
        return draw(st.floats(low, high) | st.integers(max(1, int(low)), int(high)))

    kinds = draw(st.lists(st.sampled_from(ATTENTION_KINDS), min_size=1, max_size=9))
    routers = [draw(st.sampled_from(MOE_KINDS)) for _ in kinds]
    groups, experts, rope = size(1, 16), size(1, 512), 2 * size(1, 64)
    slow = number(0.5, 4)
    return ModelConfig(
        vocab_size=size(), hidden_size=size(), layer_types=tuple(kinds), moe_types=tuple(routers),
        num_attention_heads=groups * size(1, 16), head_dim=rope + size(0, 600),
        qk_rope_head_dim=rope, q_lora_rank=size(), o_groups=groups, o_lora_rank=size(),
        sliding_window=size(), csa_ratio=size(2, 130), hca_ratio=size(2, 130),
        index_n_heads=size(), index_head_dim=rope + size(0, 100), index_topk=size(),
        rope_theta=number(10, 1e6), compress_rope_theta=number(10, 1e6),
        yarn_factor=number(1, 64), yarn_beta_fast=slow + number(1, 64), yarn_beta_slow=slow,
        yarn_original_positions=size(), max_position_embeddings=size(), n_routed_experts=experts,
        num_experts_per_tok=size(1, experts), moe_intermediate_size=size(),
        routed_scaling_factor=number(0.1, 9), swiglu_limit=number(0.1, 99), hc_mult=size(1, 9),
        hc_sinkhorn_iters=size(1, 99), hc_eps=number(1e-9, 1),
        num_nextn_predict_layers=size(0, 1), rms_norm_eps=number(1e-9, 1),
        initializer_range=number(1e-4, 1),
    )  # fmt: skip


def hash_first(config: ModelConfig) -> ModelConfig:
    """Put the hash layers in front, where the official formats count them."""
    routers = sorted(config.moe_types, key=(HASH, LEARNED).index)
    return dataclasses.replace(config, moe_types=tuple(routers))


@settings(deadline=None, max_examples=150)
@given(models())
def test_every_model_comes_back_from_transformers_format(config):
    assert ModelConfig.from_hf(transformers_config(config, PLAIN)) == config


@settings(deadline=None, max_examples=150)
@given(models())
def test_every_model_comes_back_from_deepseeks_format(config):
    config = hash_first(config)
    assert ModelConfig.from_hf(deepseek_config(config, INSTRUCT)) == config


@settings(deadline=None, max_examples=150)
@given(models())
def test_released_ratios_come_back_from_the_inference_format(config):
    config = dataclasses.replace(
        hash_first(config), csa_ratio=4, hca_ratio=128, max_position_embeddings=1_048_576,
        initializer_range=0.02,
    )  # fmt: skip
    assert ModelConfig.from_hf(inference_config(config, INSTRUCT)) == config


@settings(deadline=None, max_examples=60)
@given(models())
def test_transformers_understands_what_is_written(config):
    written = transformers_config(config, PLAIN)
    theirs = DeepseekV4Config(**copy.deepcopy(written))
    for key in ("layer_types", "mlp_layer_types", "compress_rates", "head_dim", "hidden_size",
                "n_routed_experts", "index_topk", "hc_mult", "hc_eps", "rms_norm_eps",
                "sliding_window", "routed_scaling_factor", "swiglu_limit"):  # fmt: skip
        assert getattr(theirs, key) == written[key], key
    for name, theta in (("main", config.rope_theta), ("compress", config.compress_rope_theta)):
        parameters = theirs.rope_parameters[name]
        assert parameters["rope_theta"] == theta
        assert int(config.head_dim * parameters["partial_rotary_factor"]) == config.qk_rope_head_dim
    assert ModelConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize("size", RELEASED)
def test_released_files_are_written_as_they_are(size):
    released = load(size)
    written = deepseek_config(RELEASED[size], INSTRUCT, released)
    # The first release of Flash did not say that its experts are FP4.
    assert written == {"expert_dtype": "fp4", **released}
    assert inference_config(RELEASED[size], INSTRUCT) == load(size + "_inference")


def test_number_types_survive():
    """PyTorch's powers of a base differ in the last bit between an int and a float."""
    for theta in (10_000, 10_000.0):
        config = dataclasses.replace(RELEASED["flash"], rope_theta=theta)
        for write in (transformers_config, deepseek_config):
            written = write(config, PLAIN)
            assert type(written["rope_theta"]) is type(theta)
            assert type(ModelConfig.from_hf(written).rope_theta) is type(theta)


def test_what_is_no_part_of_the_model_is_carried_along():
    carried = edited(bos_token_id=7, use_cache=False, dtype="float16", hidden_size=1)
    for write in (transformers_config, deepseek_config):
        written = write(RELEASED["flash"], PLAIN, carried)
        assert (written["bos_token_id"], written["use_cache"]) == (7, False)
        assert written["hidden_size"] == 4096
        assert "quantization_config" not in written and "expert_dtype" not in written
        assert storage_of(written) == PLAIN
    assert transformers_config(RELEASED["flash"], PLAIN)["bos_token_id"] == 0


@pytest.mark.parametrize(
    "storage", [PLAIN, INSTRUCT, BASE, Storage(dtype="float32"), Storage(dtype="float16")], ids=str
)
def test_storage_comes_back(storage):
    for write in (transformers_config, deepseek_config):
        assert storage_of(write(RELEASED["pro"], storage)) == storage
    if storage.dtype == "bfloat16":
        assert storage_of(inference_config(RELEASED["pro"], storage)) == storage


def test_storage_of_released_files():
    assert storage_of(load("pro")) == storage_of(load("pro_inference")) == INSTRUCT
    assert storage_of(load("flash")) == dataclasses.replace(INSTRUCT, experts=UNKNOWN)
    assert storage_of({"hidden_size": 1}) is None


def quantization(**changes) -> dict:
    return edited(quantization_config=load("flash")["quantization_config"] | changes)


BAD_STORAGE = {
    "method": (quantization(quant_method="awq"), "quantization_config.quant_method"),
    "format": (quantization(fmt="e5m2"), "quantization_config.fmt"),
    "blocks": (quantization(weight_block_size=[64, 64]), "quantization_config.weight_block_size"),
    "scheme": (quantization(activation_scheme="static"), "quantization_config.activation_scheme"),
    "scales": (quantization(scale_fmt="e4m3"), "quantization_config.scale_fmt"),
    "key": (quantization(bits=4), "unknown key 'bits'"),
    "no object": (edited(quantization_config="fp8"), "quantization_config: expected an object"),
    "experts": (edited(expert_dtype="int4"), "expert_dtype"),
    "experts twice": (
        edited(
            expert_dtype="fp4",
            quantization_config=load("flash")["quantization_config"] | {"expert_dtype": "fp8"},
        ),
        "expert_dtype",
    ),
    "dtype": (edited(torch_dtype="float64"), "torch_dtype"),
    "dtype twice": (edited(dtype="float32"), "torch_dtype: expected dtype's 'float32'"),
    "inference": (edited("flash_inference", dtype="int8"), "dtype: expected"),
    "inference experts": (
        edited("flash_inference", dtype="bf16", expert_dtype="fp8"), "expert_dtype"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STORAGE)
def test_storage_that_is_not_understood_is_refused(case):
    document, expected = BAD_STORAGE[case]
    with pytest.raises(InputError) as caught:
        storage_of(document)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


FLASH = RELEASED["flash"]
UNSAID = {
    "hash layer behind": (
        deepseek_config, dataclasses.replace(FLASH, moe_types=(LEARNED,) * 42 + (HASH,)), PLAIN,
        "ModelConfig.moe_types: expected hash layers only in front",
    ),
    "ratios for inference": (
        inference_config, dataclasses.replace(FLASH, hca_ratio=64), INSTRUCT, "csa_ratio, hca_ratio"
    ),
    "float32 for inference": (
        inference_config, FLASH, Storage(dtype="float32"), "Storage.dtype: expected the bfloat16"
    ),
    "experts unknown": (
        transformers_config, FLASH, dataclasses.replace(INSTRUCT, experts=UNKNOWN),
        "Storage.experts: expected fp4, fp8 or None",
    ),
    "experts alone": (
        deepseek_config, FLASH, Storage(experts="fp4"), "store both quantised or neither"
    ),
    "too large": (
        transformers_config, dataclasses.replace(FLASH, vocab_size=2**31), PLAIN,
        "ModelConfig.vocab_size: expected at most 2147483647",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAID)
def test_what_a_format_cannot_say_is_refused(case):
    write, config, storage, expected = UNSAID[case]
    with pytest.raises(InputError) as caught:
        write(config, storage)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_storage_refuses_unknown_words():
    for field in ("dtype", "experts", "linears", "scales"):
        with pytest.raises(InputError, match=f"Storage.{field}: expected one of"):
            Storage(**{field: "int8"})
