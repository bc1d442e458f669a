"""What is written as config.json is read as the same model, by us and by transformers."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_config import NONSENSE, RELEASED, edited, load
from transformers import AutoConfig, DeepseekV4Config
from transformers.utils.quantization_config import FineGrainedFP8Config

from dsv4_jax.config import ATTENTION_KINDS, CSA, HASH, HCA, LEARNED, MOE_KINDS, WINDOW, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.hf_keys import INFERENCE_STORAGE, QUANTIZATION, ROOT
from dsv4_jax.hf_storage import UNKNOWN, StorageKeys, storage_of
from dsv4_jax.hf_write import deepseek_config, inference_config, transformers_config

INSTRUCT = StorageKeys(experts="fp4", linears="fp8")
PLAIN = StorageKeys()
FLASH = RELEASED["flash"]
BASE = StorageKeys(experts="fp8", linears="fp8", scales="float32")


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


THEIR_DEFAULTS = DeepseekV4Config().to_dict()
THEIR_VERSION = {"transformers_version"}


@settings(deadline=None, max_examples=60)
@given(models())
def test_transformers_loses_and_adds_nothing(config):
    written = transformers_config(config, PLAIN)
    theirs = DeepseekV4Config(**copy.deepcopy(written))
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    for group in theirs.rope_parameters.values():
        assert int(config.head_dim * group["partial_rotary_factor"]) == config.qk_rope_head_dim
    said = theirs.to_dict()
    assert {key: said.get(key) for key in written} == written
    added = said.keys() - written.keys() - THEIR_VERSION
    assert not added & (ROOT.schedule | set(ROOT.fields.values()))
    assert {key: said[key] for key in added} == {key: THEIR_DEFAULTS[key] for key in added}
    assert ModelConfig.from_hf(said) == config


@settings(deadline=None, max_examples=60)
@given(models(), st.booleans())
def test_transformers_understands_deepseeks_format(config, released_ratios):
    config = hash_first(config)
    if released_ratios:
        config = dataclasses.replace(config, csa_ratio=4, hca_ratio=128)
    theirs = DeepseekV4Config(**deepseek_config(config, PLAIN))
    assert ModelConfig.from_hf(theirs.to_dict()) == config


ODD = ModelConfig(
    vocab_size=96, hidden_size=32, layer_types=(CSA, WINDOW, HCA, HCA, CSA, WINDOW),
    moe_types=(LEARNED, HASH, LEARNED, HASH, LEARNED, HASH), num_attention_heads=6, head_dim=49,
    qk_rope_head_dim=12, o_groups=3, csa_ratio=8, hca_ratio=8, num_nextn_predict_layers=0,
    yarn_factor=1, routed_scaling_factor=2, rope_theta=12_345.678,
)  # fmt: skip


@pytest.mark.parametrize("storage", [PLAIN, INSTRUCT, BASE], ids=str)
@pytest.mark.parametrize("config", [ODD, *RELEASED.values()], ids=["odd", *RELEASED])
def test_what_transformers_saves_is_the_same_model(config, storage, tmp_path):
    DeepseekV4Config(**transformers_config(config, storage)).save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == config
    assert storage_of(json.loads((tmp_path / "config.json").read_text())) == storage
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == config


def test_rotated_width_survives_its_fraction():
    """Transformers takes int(head_dim * fraction), and a fraction may be rounded down."""
    rounded_down = 0
    for head_dim in range(2, 260):
        for width in range(2, head_dim + 1, 2):
            config = dataclasses.replace(
                ODD, head_dim=head_dim, qk_rope_head_dim=width, index_head_dim=width
            )
            fraction = transformers_config(config, PLAIN)["partial_rotary_factor"]
            assert int(head_dim * fraction) == width and fraction <= 1
            rounded_down += int(head_dim * (width / head_dim)) != width
    assert rounded_down > 0


def test_rotated_width_survives_transformers_own_fraction():
    config = hash_first(dataclasses.replace(ODD, head_dim=319, qk_rope_head_dim=40))
    assert int(319 * (40 / 319)) == 39
    theirs = DeepseekV4Config(**deepseek_config(config, PLAIN))
    assert theirs.qk_rope_head_dim == 40
    assert "partial_rotary_factor" not in deepseek_config(FLASH, PLAIN)


def test_extension_of_context():
    """YaRN that is off is not mentioned unless its numbers would be lost."""
    assert transformers_config(ODD, PLAIN)["rope_parameters"]["compress"]["rope_type"] == "default"
    flash = dataclasses.replace(RELEASED["flash"], yarn_factor=1)
    assert deepseek_config(flash, PLAIN)["rope_scaling"] is None
    slower = dataclasses.replace(flash, yarn_beta_slow=2)
    assert transformers_config(slower, PLAIN)["rope_parameters"]["compress"] == {
        "rope_type": "yarn", "rope_theta": 160_000, "partial_rotary_factor": 0.125, "factor": 1,
        "original_max_position_embeddings": 65_536, "beta_fast": 32, "beta_slow": 2,
        "attention_factor": 1.0,
    }  # fmt: skip
    assert deepseek_config(slower, PLAIN)["rope_scaling"]["factor"] == 1


@pytest.mark.parametrize("size", RELEASED)
def test_released_files_are_written_as_they_are(size):
    released = load(size)
    written = deepseek_config(RELEASED[size], INSTRUCT, released)
    # The first release of Flash did not say that its experts are FP4.
    assert written == {"expert_dtype": "fp4", **released}
    assert inference_config(RELEASED[size], INSTRUCT) == load(size + "_inference")


@pytest.mark.parametrize("size", RELEASED)
def test_released_files_come_back_to_the_letter(size):
    """Also in the types of numbers; only the order of the keys is our own."""

    def text(document: dict) -> str:
        return json.dumps(document, sort_keys=True)

    released, inference = load(size), load(size + "_inference")
    config = ModelConfig.from_hf(released)
    assert text(deepseek_config(config, storage_of(released), released)) == text(released)
    config = ModelConfig.from_hf(inference)
    assert text(inference_config(config, storage_of(inference))) == text(inference)


def test_what_is_not_as_released_is_in_the_inference_format():
    changed = dataclasses.replace(
        RELEASED["flash"], rms_norm_eps=1e-5, hc_eps=1e-7, num_nextn_predict_layers=0
    )
    written = inference_config(changed, INSTRUCT)
    assert (written["norm_eps"], written["hc_eps"], written["n_mtp_layers"]) == (1e-5, 1e-7, 0)
    assert len(written["compress_ratios"]) == 43


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
        assert (write(FLASH, PLAIN)["bos_token_id"], write(FLASH, PLAIN)["eos_token_id"]) == (0, 1)


def test_nothing_is_shared_between_documents():
    """Transformers changes dictionaries that it is given."""
    carried = edited(eos_token_id=[1, 2])
    before = copy.deepcopy(carried)
    for write in (transformers_config, deepseek_config):
        written = write(FLASH, INSTRUCT, carried)
        for value in written.values():
            if isinstance(value, (list, dict)):
                value.clear()
        assert carried == before
        assert ModelConfig.from_hf(write(FLASH, INSTRUCT, carried)) == FLASH


@pytest.mark.parametrize(
    "storage",
    [PLAIN, INSTRUCT, BASE, StorageKeys(dtype="float32"), StorageKeys(dtype="float16")], ids=str,
)
def test_storage_comes_back(storage):
    for write in (transformers_config, deepseek_config):
        assert storage_of(write(RELEASED["pro"], storage)) == storage
    if storage.dtype == "bfloat16":
        assert storage_of(inference_config(RELEASED["pro"], storage)) == storage


def test_experts_alone_in_the_inference_format():
    experts = StorageKeys(experts="fp4")
    written = inference_config(FLASH, experts)
    assert (written["dtype"], written["expert_dtype"]) == ("bf16", "fp4")
    assert storage_of(written) == experts


@pytest.mark.parametrize(
    "storage", [INSTRUCT, BASE, StorageKeys(experts="fp8", linears="fp8")], ids=str
)
def test_transformers_understands_the_storage(storage):
    theirs = FineGrainedFP8Config(**transformers_config(FLASH, storage)["quantization_config"])
    assert theirs.expert_dtype == storage.experts
    assert theirs.scale_fmt == {"ue8m0": "ue8m0", "float32": "float"}[storage.scales]
    assert (theirs.weight_block_size, theirs.activation_scheme) == ([128, 128], "dynamic")
    saved = edited(quantization_config=theirs.to_dict())
    assert storage_of(saved) == storage


def test_storage_of_released_files():
    assert storage_of(load("pro")) == storage_of(load("pro_inference")) == INSTRUCT
    assert storage_of(load("flash")) == dataclasses.replace(INSTRUCT, experts=UNKNOWN)
    for nothing in ({}, {"hidden_size": 1}, {"dim": 1, "n_heads": 2}, {"dtype": None}):
        assert storage_of(nothing) is None


def quantization(**changes) -> dict:
    return edited(quantization_config=load("flash")["quantization_config"] | changes)


BAD_STORAGE = {
    "no method": (edited(quantization_config={}), "quantization_config.quant_method"),
    "experts alone": (edited(without=("quantization_config",), expert_dtype="fp4"), "quant_method"),
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


def storage_refusal(document: dict) -> str:
    with pytest.raises(InputError) as caught:
        storage_of(document)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_STORAGE)
def test_storage_that_is_not_understood_is_refused(case):
    document, expected = BAD_STORAGE[case]
    assert expected in storage_refusal(document)


def test_nonsense_in_storage_is_refused():
    documents = [(f"quantization_config.{key}", quantization, key) for key in QUANTIZATION]
    documents += [(key, edited, key) for key in ("dtype", "torch_dtype", "expert_dtype")]
    documents += [
        (key, lambda **values: edited("flash_inference", **values), key)
        for key in INFERENCE_STORAGE
    ]
    for name, change, key in documents:
        admitted = (*QUANTIZATION.get(key, ()), *INFERENCE_STORAGE.get(key, ()))
        for value in NONSENSE:
            if value is not None and value not in admitted:
                assert f"{name}: expected" in storage_refusal(change(**{key: value}))


UNSAID = {
    "hash layer behind": (
        deepseek_config, dataclasses.replace(FLASH, moe_types=(LEARNED,) * 42 + (HASH,)), PLAIN,
        "ModelConfig.moe_types: expected hash layers only in front",
    ),
    "hash layer behind, inference": (
        inference_config, dataclasses.replace(FLASH, moe_types=(LEARNED,) * 42 + (HASH,)), INSTRUCT,
        "got 'hash' in layer 42; write transformers' config.json",
    ),
    "equal ratios for inference": (
        inference_config, dataclasses.replace(FLASH, hca_ratio=4), INSTRUCT,
        "expected the (4, 128) of inference/config.json, got (4, 4)",
    ),
    "experts unknown, inference": (
        inference_config, FLASH, dataclasses.replace(INSTRUCT, experts=UNKNOWN),
        "StorageKeys.experts: expected fp4 or what linears are (fp8)",
    ),
    "linears alone": (
        transformers_config, FLASH, StorageKeys(linears="fp8"), "store both quantised or neither"
    ),
    "ratios for inference": (
        inference_config, dataclasses.replace(FLASH, hca_ratio=64), INSTRUCT, "csa_ratio, hca_ratio"
    ),
    "float32 for inference": (
        inference_config, FLASH, StorageKeys(dtype="float32"),
        "StorageKeys.dtype: expected the bfloat16",
    ),
    "experts unknown": (
        transformers_config, FLASH, dataclasses.replace(INSTRUCT, experts=UNKNOWN),
        "StorageKeys.experts: expected fp4, fp8 or None",
    ),
    "experts alone": (
        deepseek_config, FLASH, StorageKeys(experts="fp4"), "store both quantised or neither"
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
        with pytest.raises(InputError, match=f"StorageKeys.{field}: expected one of"):
            StorageKeys(**{field: "int8"})
