"""Write a ModelConfig as the configuration files of transformers and of DeepSeek."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from dsv4_jax.config import HASH, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.hf_config import LARGEST
from dsv4_jax.hf_keys import (
    ATTENTION_NAMES,
    INFERENCE,
    MOE_NAMES,
    OPTIONAL_FIELDS,
    RATE_KEYS,
    RELEASED_RATES,
    ROOT,
    TRANSFORMERS_FIXED,
    YARN_KEYS,
    Naming,
)
from dsv4_jax.hf_storage import UNKNOWN, StorageKeys

RELEASED_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
NOTHING: Mapping = MappingProxyType({})

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_FLOATS = {field.name for field in dataclasses.fields(ModelConfig) if field.type == "float"}
_RELEASED = {RATE_KEYS[kind]: rate for kind, rate in RELEASED_RATES.items()}
# Released without a decimal point, written with one by transformers. Both are kept as they came:
# the type of a base changes the last bit of PyTorch's powers of it.
_EITHER = {"rope_theta", "compress_rope_theta", *YARN_KEYS}


def transformers_config(
    config: ModelConfig, storage: StorageKeys, carried: Mapping = NOTHING
) -> dict[str, object]:
    """Return the config.json of transformers' `DeepseekV4Config`.

    It says all of a ModelConfig but `hc_gate_init` and `hash_seed`, which only training from
    scratch reads.

    Args:
      carried: a config.json whose keys that are no part of the model go along, as those of tokens.
    Raises:
      InputError: transformers has no words for this storage, or a number is too large.
    Source: transformers 5.24 `DeepseekV4Config`, `FineGrainedFP8Config`.
    """
    if storage.experts == UNKNOWN:
        raise _unsaid("StorageKeys.experts", UNKNOWN, "fp4, fp8 or None", "look at the tensors")
    moe_names = {kind: name for name, kind in MOE_NAMES.items()}
    thetas = {key: _value(config, key) for key in ("rope_theta", "compress_rope_theta")}
    fraction = {"partial_rotary_factor": _fraction(config.qk_rope_head_dim, config.head_dim)}
    main = {"rope_type": "default", "rope_theta": thetas["rope_theta"], **fraction}
    compress = main | {"rope_theta": thetas["compress_rope_theta"]}
    if yarn := _yarn(config):
        # Without an attention factor transformers scales attention by 0.1 ln(factor) + 1.
        compress |= {"rope_type": "yarn", **yarn, "attention_factor": 1.0}
    written = _root(config, carried) | {
        **thetas,
        **fraction,
        **_named_schedule(config),
        "mlp_layer_types": [moe_names[kind] for kind in config.moe_types],
        "rope_parameters": {"main": main, "compress": compress},
        "dtype": storage.dtype,
    }
    if quantization := _quantization(storage):
        # Transformers reads the experts' dtype inside quantization_config, others beside it.
        experts = {"expert_dtype": storage.experts}
        written |= experts | {"quantization_config": quantization | experts}
    return written


def deepseek_config(
    config: ModelConfig, storage: StorageKeys, carried: Mapping = NOTHING
) -> dict[str, object]:
    """Return the config.json of DeepSeek's releases.

    Where ratios are not the released ones, which `compress_ratios` stands for to its readers, the
    schedule is said by transformers' `layer_types` and `compress_rates`. Unknown experts are left
    unsaid. There is no place for `hc_gate_init` and `hash_seed`, either.

    Args:
      carried: a config.json whose keys that are no part of the model go along, as those of tokens.
    Raises:
      InputError: the format cannot say this schedule or storage, or a number is too large.
    Source: the released configurations.
    """
    yarn = _yarn(config)
    written = _root(config, carried) | {
        "num_hash_layers": _num_hash_layers(config, "num_hash_layers"),
        **_attention_schedule(config),
        "rope_theta": _value(config, "rope_theta"),
        "rope_scaling": {"type": "yarn", **yarn} if yarn else None,
        "compress_rope_theta": _value(config, "compress_rope_theta"),
        "torch_dtype": storage.dtype,
    }
    fraction = _fraction(config.qk_rope_head_dim, config.head_dim)
    if fraction != config.qk_rope_head_dim / config.head_dim:
        # With the quotient, which transformers would form itself, it loses a channel.
        written["partial_rotary_factor"] = fraction
    if quantization := _quantization(storage):
        written["quantization_config"] = quantization
        if storage.experts != UNKNOWN:
            written["expert_dtype"] = storage.experts
    return written


def inference_config(config: ModelConfig, storage: StorageKeys) -> dict[str, object]:
    """Return the inference/config.json of DeepSeek's releases.

    It has no place for `max_position_embeddings` and for what only training from scratch reads.
    Epsilons and the number of prediction blocks are in it where they are not the released ones.

    Raises:
      InputError: the format cannot say this schedule or storage, or a number is too large.
    Source: the released configurations; fact sheet 1.3.
    """
    if _rates(config) != _RELEASED:
        raise _unsaid(
            "ModelConfig.csa_ratio, hca_ratio", (config.csa_ratio, config.hca_ratio),
            f"the {tuple(_RELEASED.values())} of inference/config.json",
        )  # fmt: skip
    if storage.dtype != "bfloat16":
        raise _unsaid(
            "StorageKeys.dtype", storage.dtype, "the bfloat16 of inference/config.json",
            "store it so",
        )
    if storage.experts not in ("fp4", storage.linears):
        raise _unsaid(
            "StorageKeys.experts", storage.experts,
            f"fp4 or what linears are ({storage.linears}) for inference/config.json", "store it so",
        )  # fmt: skip
    written = {
        key: _value(config, field)
        for field, key in INFERENCE.fields.items()
        if field not in OPTIONAL_FIELDS or getattr(config, field) != _DEFAULTS[field]
    } | {
        **_fixed(INFERENCE),
        "n_layers": config.num_layers,
        "n_hash_layers": _num_hash_layers(config, "n_hash_layers"),
        "compress_ratios": _ratios(config),
        "dtype": "bf16" if storage.linears is None else storage.linears,
        "scale_fmt": "ue8m0",  # in any storage: keys and values are rounded by it, too
    }
    if storage.experts == "fp4":
        written["expert_dtype"] = "fp4"
    if storage.scales == "float32":
        written["scale_dtype"] = "fp32"
    return written


def _root(config: ModelConfig, carried: Mapping) -> dict:
    """Return what both kinds of config.json have in common."""
    return {
        **_fixed(ROOT),
        **RELEASED_TOKENS,
        **{key: copy.deepcopy(value) for key, value in carried.items() if key in ROOT.ignored},
        **{key: _value(config, field) for field, key in ROOT.fields.items()},
        "num_hidden_layers": config.num_layers,
        "qk_rope_head_dim": config.qk_rope_head_dim,
    }


def _fixed(naming: Naming) -> dict:
    """Return the keys whose value is the same in all models, as far as DeepSeek writes them."""
    return {
        key: copy.deepcopy(admitted[0])
        for key, admitted in naming.fixed.items()
        if key not in TRANSFORMERS_FIXED
    }


def _value(config: ModelConfig, field: str) -> int | float:
    """Return a number in the type that readers expect: transformers takes no int for a float."""
    value = getattr(config, field)
    if value > LARGEST:
        raise _unsaid(f"ModelConfig.{field}", value, f"at most {LARGEST}", "make it smaller")
    return float(value) if field in _FLOATS - _EITHER else value


def _yarn(config: ModelConfig) -> dict | None:
    """Return YaRN's parameters, or None if the context is not extended and they are defaults."""
    off = {field: _DEFAULTS[field] for field in YARN_KEYS} | {"yarn_factor": 1}
    if all(getattr(config, field) == value for field, value in off.items()):
        return None
    return {key: _value(config, field) for field, key in YARN_KEYS.items()}


def _fraction(width: int, head_dim: int) -> float:
    """Return the fraction of a head for which readers' int(head_dim * fraction) is the width."""
    fraction = width / head_dim
    if int(head_dim * fraction) != width:  # the quotient was rounded down, as 1 / 49 is
        fraction = math.nextafter(fraction, 1)
    return fraction


def _rates(config: ModelConfig) -> dict[str, int]:
    return {key: config.ratio(kind) for kind, key in RATE_KEYS.items()}


def _named_schedule(config: ModelConfig) -> dict:
    """Return the attention of each layer as transformers says it."""
    names = {kind: name for name, kind in ATTENTION_NAMES.items()}
    return {
        "layer_types": [names[kind] for kind in config.layer_types],
        "compress_rates": _rates(config),
    }


def _attention_schedule(config: ModelConfig) -> dict:
    """Return the attention of each layer by ratio, if ratios tell the kinds, else by name."""
    if _rates(config) == _RELEASED:
        return {"compress_ratios": _ratios(config)}
    return _named_schedule(config)


def _ratios(config: ModelConfig) -> list[int]:
    """Return the ratio of each layer and of the prediction block, which is a window layer."""
    ratios = [config.ratio(kind) for kind in config.layer_types]
    return ratios + [0] * config.num_nextn_predict_layers


def _num_hash_layers(config: ModelConfig, key: str) -> int:
    count = config.moe_types.count(HASH)
    if HASH in config.moe_types[count:]:
        raise _unsaid(
            "ModelConfig.moe_types", f"'hash' in layer {config.moe_types.index(HASH, count)}",
            f"hash layers only in front, where {key} counts them",
        )  # fmt: skip
    return count


def _quantization(storage: StorageKeys) -> dict:
    """Return quantization_config without the experts' dtype; empty if nothing is quantised."""
    if (storage.experts is None) != (storage.linears is None):
        raise _unsaid(
            "StorageKeys.experts", storage.experts,
            f"quantised if linears are ({storage.linears}), and else not, for config.json",
            "store both quantised or neither",
        )  # fmt: skip
    if storage.linears is None:
        return {}
    scales = {"scale_fmt": "ue8m0"} if storage.scales == "ue8m0" else {}  # as V3: none is float32
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        **scales,
    }


def _unsaid(
    name: str, got, expected: str, advice: str = "write transformers' config.json, which says more"
) -> InputError:
    return InputError(f"{name}: expected {expected}, got {got}; {advice}")
