"""How the tensors of a checkpoint are stored, as its configuration files say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsv4_jax.config import check_choice
from dsv4_jax.errors import InputError
from dsv4_jax.hf_config import check_keys, check_value, naming_of
from dsv4_jax.hf_keys import (
    DTYPES,
    EXPERT_DTYPES,
    INFERENCE,
    INFERENCE_STORAGE,
    QUANTIZATION,
)

UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageKeys:
    """How a checkpoint's tensors are stored, as far as config.json says it.

    Config.json may leave out `expert_dtype`, as the first release of V4-Flash, whose experts are
    FP4, and conversions of it to FP8: experts are then "unknown". V4-Flash-Base calls its float32
    scales "ue8m0", as they are powers of two. In both cases only the tensors tell.

    Raises:
      InputError: a value is not one of those below.
    Source: the released configurations; fact sheet 1.4 and 10.3.
    """

    dtype: str = "bfloat16"  # of tensors that are not quantised: "bfloat16", "float16", "float32"
    experts: str | None = None  # routed experts: "fp4", "fp8", "unknown"; None: not quantised
    linears: str | None = None  # the other quantised matrices: "fp8"; None: not quantised
    scales: str = "ue8m0"  # of FP8: "ue8m0" or "float32"; those of FP4 are always ue8m0

    def __post_init__(self):
        check_choice("StorageKeys.dtype", self.dtype, DTYPES)
        check_choice("StorageKeys.experts", self.experts, (*EXPERT_DTYPES, UNKNOWN, None))
        check_choice("StorageKeys.linears", self.linears, ("fp8", None))
        check_choice("StorageKeys.scales", self.scales, ("ue8m0", "float32"))


def storage_of(config_json: Mapping) -> StorageKeys | None:
    """Read how tensors are stored from any config.json or inference/config.json.

    Returns:
      The storage, or None if no key is about it. What the keys leave out is as readers of the file
      take it: bfloat16; without `scale_fmt` float32 scales; in inference/config.json FP8 with ue8m0
      scales, and experts as the other matrices.
    Raises:
      InputError: a key or value is unknown or contradicts another; one line that names the key.
    Source: transformers 5.24 `FineGrainedFP8Config`; fact sheet 1.1, 1.3 and 1.4.
    """
    naming = naming_of(config_json)
    given = {key: value for key, value in config_json.items() if key in naming.storage}
    if naming is INFERENCE:
        return _inference_storage(given) if given else None
    given = {key: value for key, value in given.items() if value is not None}
    return _root_storage(given) if given else None


def _root_storage(given: Mapping) -> StorageKeys:
    dtype = _agreed(given, ("dtype", "torch_dtype"), DTYPES) or "bfloat16"
    name = "quantization_config"
    quantization = given.get(name, {})
    check_keys(name, quantization, QUANTIZATION)
    inner = {f"{name}.{key}": value for key, value in quantization.items()}
    keys = ("expert_dtype", f"{name}.expert_dtype")
    experts = _agreed(given | inner, keys, EXPERT_DTYPES)
    if name not in given and experts is None:
        return StorageKeys(dtype=dtype)
    for key, value in {"quant_method": None, **quantization}.items():
        check_value(f"{name}.{key}", value, QUANTIZATION[key])
    scales = "ue8m0" if quantization.get("scale_fmt") == "ue8m0" else "float32"
    return StorageKeys(dtype=dtype, experts=experts or UNKNOWN, linears="fp8", scales=scales)


def _inference_storage(given: Mapping) -> StorageKeys:
    for key, value in given.items():
        check_value(key, value, INFERENCE_STORAGE[key])
    linears = "fp8" if given.get("dtype", "fp8") == "fp8" else None
    experts = given.get("expert_dtype") or linears
    if experts not in ("fp4", linears):
        raise InputError(f"expert_dtype: {experts!r} contradicts dtype {given['dtype']!r}")
    scales = "float32" if given.get("scale_dtype") == "fp32" else "ue8m0"
    return StorageKeys(experts=experts, linears=linears, scales=scales)


def _agreed(given: Mapping, keys: tuple[str, ...], admitted: tuple):
    """Return the value of those keys that are given, refusing a contradiction; None without any."""
    found = {key: given[key] for key in keys if key in given}
    for key, value in found.items():
        first = next(iter(found))
        check_value(key, value, admitted)
        if value != found[first]:
            raise InputError(f"{key}: expected {first}'s {found[first]!r}, got {value!r}")
    return next(iter(found.values()), None)
