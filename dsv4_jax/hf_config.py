"""Read a published DeepSeek-V4 configuration into a ModelConfig, accounting for every key."""

from __future__ import annotations

import difflib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dsv4_jax.config import CSA, HASH, HCA, LEARNED, WINDOW, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.hf_keys import (
    ATTENTION_NAMES,
    INFERENCE,
    MOE_NAMES,
    OPTIONAL_FIELDS,
    RATE_ALIASES,
    RATE_KEYS,
    RELEASED_RATES,
    ROOT,
    YARN_KEYS,
    Naming,
)

LARGEST = 2**31 - 1  # array dimensions and token ids are int32


def model_config_from_hf(source: Mapping | str | os.PathLike) -> ModelConfig:
    """Read the official `config.json` or `inference/config.json`, or what transformers writes.

    A key that shapes the model must be there: transformers fills gaps with V4-Flash's values,
    and fills an absent layer schedule with one that neither release has. Nested rotary parameters
    take precedence over flat ones, as in transformers.

    Args:
      source: the decoded object, a path of the file, or its directory.
    Raises:
      InputError: a key or value is unknown, missing or not of this architecture, or keys
        contradict each other; one line that names the source and the key.
    Source: the released configurations; transformers 5.23 `DeepseekV4Config`.
    """
    where, config = _load(source)
    try:
        return _convert(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _load(source) -> tuple[str, dict]:
    if isinstance(source, Mapping):
        return "configuration", dict(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"configuration: expected a mapping or a path, got {type(source).__name__}"
        )
    path = Path(source)
    try:
        path = path / "config.json" if path.is_dir() else path
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r}: cannot be read: {error}") from error
    try:
        config = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{str(path)!r}: expected a JSON object, got {reprlib.repr(config)}")
    return repr(str(path)), config


def unique_keys(pairs: list[tuple]) -> dict:
    """Build a JSON object, refusing a key that occurs twice; a hook for `json.loads`."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"key {reprlib.repr(key)} occurs {count} times")
    return mapping


def without_mtp(config: Mapping) -> dict:
    """Leave out what a configuration says of multi-token prediction, also by a DSpark draft head.

    That has several blocks, each with a ratio behind those of the layers, and keys of its own.
    """
    naming = naming_of(config)
    kept = {key: value for key, value in config.items() if not str(key).startswith("dspark_")}
    ratios, layers = kept.get("compress_ratios"), kept.get(naming.num_layers)
    if isinstance(ratios, list) and isinstance(layers, int):
        kept["compress_ratios"] = ratios[: max(layers, 0)]
    return kept | {naming.fields["num_nextn_predict_layers"]: 0}


def naming_of(config: Mapping) -> Naming:
    """Return the naming that most keys belong to."""
    return max((ROOT, INFERENCE), key=lambda naming: len(naming.known & config.keys()))


def _convert(config: dict) -> ModelConfig:
    naming = naming_of(config)
    check_keys("", config, naming.known)
    for key, admitted in naming.fixed.items():
        if key in config:
            check_value(key, config[key], admitted)
    values = _schedule(config, naming)
    if naming is ROOT:
        values |= _rotary(config)
    for field, key in naming.fields.items():
        if key in config or field not in OPTIONAL_FIELDS:
            values[field] = _number(config, key)
    return ModelConfig(**values)


# Layer schedule


def _schedule(config: dict, naming: Naming) -> dict:
    """Return the fields of the layer schedule and its compression ratios."""
    num_layers = _count(config, naming.num_layers)
    rates = _rates(config)
    return {
        "layer_types": _attention_kinds(config, num_layers, rates),
        "moe_types": _moe_kinds(config, num_layers, naming.num_hash_layers),
        "csa_ratio": rates[CSA],
        "hca_ratio": rates[HCA],
    }


def _rates(config: dict) -> dict[str, int]:
    """Return the ratio of each compressed kind, which only transformers writes separately."""
    given = config.get("compress_rates")
    given = {} if given is None else given
    check_keys("compress_rates", given, RATE_KEYS.values())
    rates = {}
    for kind, released in RELEASED_RATES.items():
        key, alias = RATE_KEYS[kind], RATE_ALIASES[kind]
        rates[kind] = _count(given, key, "compress_rates") if key in given else released
        if alias in config:
            rate = _count(config, alias)
            if key in given and rate != rates[kind]:
                raise InputError(f"{alias}: expected compress_rates' {rates[kind]}, got {rate}")
            rates[kind] = rate
    return rates


def _attention_kinds(config: dict, num_layers: int, rates: dict[str, int]) -> tuple[str, ...]:
    by_ratio = by_name = None
    if config.get("compress_ratios") is not None:
        by_ratio = _kinds_of_ratios(config["compress_ratios"], num_layers, rates)
    if config.get("layer_types") is not None:
        by_name = _look_up_list("layer_types", config["layer_types"], ATTENTION_NAMES)
        _check_length("layer_types", by_name, (num_layers,))
    return _same("compress_ratios", by_ratio, "layer_types", by_name)


def _kinds_of_ratios(ratios, num_layers: int, rates: dict[str, int]) -> tuple[str, ...]:
    """Read one ratio per layer and perhaps one more, 0, for the multi-token prediction block."""
    if rates[CSA] == rates[HCA]:
        raise InputError(
            f"compress_ratios: {rates[CSA]} is the ratio of both compressed kinds; give layer_types"
        )
    kind_of = {0: WINDOW, rates[CSA]: CSA, rates[HCA]: HCA}
    kinds = _look_up_list("compress_ratios", ratios, kind_of)
    _check_length("compress_ratios", kinds, (num_layers, num_layers + 1))
    if len(kinds) > num_layers:
        check_value(f"compress_ratios[{num_layers}] (prediction block)", ratios[-1], (0,))
    return kinds[:num_layers]


def _moe_kinds(config: dict, num_layers: int, count_key: str) -> tuple[str, ...]:
    by_count = by_name = None
    if config.get(count_key) is not None:
        num_hash = _count(config, count_key)
        if num_hash > num_layers:
            raise InputError(f"{count_key}: expected at most {num_layers} layers, got {num_hash}")
        by_count = (HASH,) * num_hash + (LEARNED,) * (num_layers - num_hash)
    if config.get("mlp_layer_types") is not None:
        by_name = _look_up_list("mlp_layer_types", config["mlp_layer_types"], MOE_NAMES)
        _check_length("mlp_layer_types", by_name, (num_layers,))
    return _same(count_key, by_count, "mlp_layer_types", by_name)


def _same(key_1: str, schedule_1, key_2: str, schedule_2) -> tuple[str, ...]:
    """Return the schedule that at least one of two keys gives, refusing a contradiction."""
    schedules = [schedule for schedule in (schedule_1, schedule_2) if schedule is not None]
    if not schedules:
        raise InputError(f"{key_1}: missing, and so is {key_2}; give one of them")
    if schedules[0] != schedules[-1]:
        raise InputError(f"{key_1}: contradicts {key_2}; give one of them")
    return schedules[0]


# Rotary parameters of config.json


def _rotary(config: dict) -> dict:
    """Return the rotary fields from flat or nested parameters."""
    given = [
        key for key in ("rope_parameters", "rope_scaling") if config.get(key) not in (None, {})
    ]
    if len(given) > 1:
        raise InputError("rope_scaling: given beside rope_parameters; give one of them")
    name = given[0] if given else "rope_scaling"
    parameters = config[name] if given else {}
    if isinstance(parameters, Mapping) and {"main", "compress"} & parameters.keys():
        return _nested_rotary(config, name, parameters)
    return {
        **{key: _number(config, key) for key in ("rope_theta", "compress_rope_theta")},
        **_yarn(name, parameters, ()),
        "qk_rope_head_dim": _rotated_width(config, {name: parameters}),
    }


def _nested_rotary(config: dict, name: str, parameters: Mapping) -> dict:
    """Read parameters of window layers ("main") and of CSA and HCA layers ("compress")."""
    for key in ("rope_theta", "compress_rope_theta"):  # superseded, but no nonsense is allowed
        if key in config and _number(config, key) <= 0:
            raise InputError(f"{key}: expected a positive number, got {config[key]}")
    check_keys(name, parameters, ("main", "compress"))
    main, compress = f"{name}.main", f"{name}.compress"
    groups = {main: parameters.get("main"), compress: parameters.get("compress")}
    own_keys = {"rope_theta", "partial_rotary_factor"}
    check_keys(main, groups[main], own_keys | {"rope_type", "type"})
    _rope_type(main, groups[main], ("default",))
    yarn = _yarn(compress, groups[compress], own_keys)
    if yarn["yarn_factor"] > 1 and "attention_factor" not in groups[compress]:
        raise InputError(
            f"{compress}.attention_factor: missing, for which transformers scales attention by "
            "0.1 ln(factor) + 1; DeepSeek-V4 does not scale: write 1.0"
        )
    return {
        "rope_theta": _number(groups[main], "rope_theta", main),
        "compress_rope_theta": _number(groups[compress], "rope_theta", compress),
        "qk_rope_head_dim": _rotated_width(config, groups),
        **yarn,
    }


def _yarn(name: str, parameters, more_keys) -> dict:
    """Return the YaRN fields; rope type "default" is no extension, a factor of 1."""
    fixed = {
        "attention_factor": (1.0,), "mscale": (1.0,), "mscale_all_dim": (1.0,), "truncate": (True,)
    }  # fmt: skip
    common = {"rope_type", "type", "partial_rotary_factor", *more_keys}
    check_keys(name, parameters, common | set(YARN_KEYS.values()) | set(fixed))
    if _rope_type(name, parameters, ("default", "yarn")) == "default":
        check_keys(f"{name} without YaRN", parameters, common)
        return {"yarn_factor": 1}
    for key, admitted in fixed.items():
        if key in parameters:
            check_value(f"{name}.{key}", parameters[key], admitted)
    required = {"yarn_factor", "yarn_original_positions"}
    return {
        field: _number(parameters, key, name)
        for field, key in YARN_KEYS.items()
        if key in parameters or field in required
    }


def _rope_type(name: str, parameters: Mapping, admitted: tuple) -> str:
    """Return the rope type, written under `rope_type`, `type` or, when alike, both."""
    types = [parameters[key] for key in ("rope_type", "type") if key in parameters] or ["default"]
    for value in types:
        check_value(f"{name}.rope_type", value, admitted if value == types[0] else types[:1])
    return types[0]


def _rotated_width(config: dict, groups: dict) -> int:
    """Return the rotated width of a head, given directly or as a fraction of head_dim."""
    widths = {}
    if config.get("qk_rope_head_dim") is not None:
        widths["qk_rope_head_dim"] = _number(config, "qk_rope_head_dim")
    for name, group in {"": config, **groups}.items():
        if group.get("partial_rotary_factor") is not None:
            fraction = _number(group, "partial_rotary_factor", name)
            key = _join(name, "partial_rotary_factor")
            widths[key] = int(_number(config, "head_dim") * fraction)
    if not widths:
        raise InputError("qk_rope_head_dim: missing, and so is partial_rotary_factor")
    first = next(iter(widths))
    for key, width in widths.items():
        if width != widths[first]:
            raise InputError(
                f"{key}: expected a rotated width of {widths[first]} as {first} says, got {width}"
            )
    return widths[first]


# Checks of single values


def _join(name: str, key) -> str:
    return f"{name}.{key}" if name else str(key)


def check_keys(name: str, mapping, known) -> None:
    """Refuse what is not a mapping and keys that are not known, with the nearest known one."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"{name}: expected an object, got {reprlib.repr(mapping)}")
    unknown = [key for key in mapping if key not in known]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), sorted(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        keys = ", ".join(map(reprlib.repr, unknown[:5]))
        raise InputError(f"{name}: unknown key {keys}{hint}".removeprefix(": "))


def check_value(name: str, value, admitted) -> None:
    """Refuse a value that is not admitted; True and 1 are different, 0 and 0.0 are not."""
    for choice in admitted:
        if isinstance(value, bool) == isinstance(choice, bool) and value == choice:
            return
    choices = " or ".join(map(repr, admitted))
    raise InputError(f"{name}: expected {choices}, got {reprlib.repr(value)}")


def _check_length(name: str, values, admitted: tuple[int, ...]) -> None:
    if len(values) not in admitted:
        choices = " or ".join(map(str, admitted))
        raise InputError(f"{name}: expected {choices} entries, one per layer, got {len(values)}")


def _look_up_list(name: str, values, table: dict) -> tuple:
    """Translate each entry of a list, refusing one that the table lacks by layer and value."""
    if not isinstance(values, (list, tuple)):
        raise InputError(f"{name}: expected a list, got {reprlib.repr(values)}")
    for layer, value in enumerate(values):
        check_value(f"{name}[{layer}]", value, table)
    return tuple(table[value] for value in values)


def _number(mapping: Mapping, key: str, name: str = "") -> int | float:
    """Return a number; ModelConfig checks its sign and whether it must be whole."""
    name = _join(name, key)
    if key not in mapping:
        raise InputError(f"{name}: missing")
    value = mapping[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        raise InputError(f"{name}: expected a number, got {reprlib.repr(value)}")
    if abs(value) > LARGEST:
        raise InputError(f"{name}: expected a size of at most {LARGEST}, got a larger one")
    return value


def _count(mapping: Mapping, key: str, name: str = "") -> int:
    """Return a whole number of at least 0."""
    value = _number(mapping, key, name)
    if not isinstance(value, int) or value < 0:
        raise InputError(f"{_join(name, key)}: expected a whole number of at least 0, got {value}")
    return value
