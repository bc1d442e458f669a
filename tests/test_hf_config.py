"""Published configurations are read exactly, and everything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from dsv4_jax.config import CSA, HASH, HCA, LEARNED, WINDOW, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.hf_keys import INFERENCE, OPTIONAL_FIELDS, RATE_KEYS, ROOT, YARN_KEYS

DATA = Path(__file__).parent / "data"
RELEASED = {
    "flash": ModelConfig(
        vocab_size=129_280,
        hidden_size=4096,
        layer_types=(WINDOW, WINDOW) + (CSA, HCA) * 20 + (CSA,),
        moe_types=(HASH,) * 3 + (LEARNED,) * 40,
        num_attention_heads=64,
    ),
    "pro": ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        layer_types=(HCA, HCA) + (CSA, HCA) * 29 + (CSA,),
        moe_types=(HASH,) * 3 + (LEARNED,) * 58,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    ),
}


def load(name: str) -> dict:
    return json.loads((DATA / f"v4_{name}_config.json").read_text())


def edited(name: str = "flash", without: tuple = (), **values) -> dict:
    config = load(name) | values
    return {key: value for key, value in config.items() if key not in without}


def nested(**compress) -> dict:
    """Return Flash's configuration with rotary parameters as transformers writes them."""
    yarn = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65_536}
    shared = {"rope_theta": 160_000, "partial_rotary_factor": 0.125, "attention_factor": 1.0}
    compress = {
        key: value for key, value in (yarn | shared | compress).items() if value != "absent"
    }
    main = {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.125}
    without = ("rope_scaling", "rope_theta", "compress_rope_theta")
    return edited(without=without, rope_parameters={"main": main, "compress": compress})


def refusal(source) -> str:
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("size", ["flash", "pro"])
@pytest.mark.parametrize("kind", ["", "_inference"])
def test_released_configurations(size, kind):
    assert ModelConfig.from_hf(load(size + kind)) == RELEASED[size]
    assert ModelConfig.from_hf(DATA / f"v4_{size}{kind}_config.json") == RELEASED[size]


def test_directory_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load("pro")))
    assert ModelConfig.from_hf(str(tmp_path)) == RELEASED["pro"]


@pytest.mark.parametrize("size", ["flash", "pro"])
def test_what_transformers_writes_is_the_same_model(size, tmp_path):
    written = DeepseekV4Config(**load(size))
    assert ModelConfig.from_hf(written.to_dict()) == RELEASED[size]
    written.save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == RELEASED[size]


def test_schedule_forms_agree():
    ratios = load("flash")["compress_ratios"]
    assert ModelConfig.from_hf(edited(compress_ratios=ratios[:-1])) == RELEASED["flash"]
    names = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    names[128] = "heavily_compressed_attention"
    explicit = edited(
        without=("compress_ratios", "num_hash_layers"),
        layer_types=[names[ratio] for ratio in ratios[:-1]],
        mlp_layer_types=["hash_moe"] * 3 + ["moe"] * 40,
        compress_rates={names[4]: 8, names[128]: 64},
    )
    config = ModelConfig.from_hf(explicit)
    assert (config.csa_ratio, config.hca_ratio) == (8, 64)
    assert config.layer_types == RELEASED["flash"].layer_types
    assert config.moe_types == RELEASED["flash"].moe_types
    by_ratio = [{0: 0, 4: 8, 128: 64}[ratio] for ratio in ratios]
    assert ModelConfig.from_hf(explicit | {"compress_ratios": by_ratio}) == config


def test_rotary_forms_agree():
    assert ModelConfig.from_hf(nested()) == RELEASED["flash"]
    superseded = nested() | {"rope_theta": 5.0}
    assert ModelConfig.from_hf(superseded) == RELEASED["flash"]
    betas = ModelConfig.from_hf(nested(beta_fast=16, beta_slow=2))
    assert (betas.yarn_beta_fast, betas.yarn_beta_slow) == (16, 2)


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}])
def test_yarn_off(scaling):
    assert ModelConfig.from_hf(edited(rope_scaling=scaling)).yarn_factor == 1
    assert ModelConfig.from_hf(edited(without=("rope_scaling",))).yarn_factor == 1


REFUSED = {
    "unknown key": (
        edited(hidden_sise=1),
        "unknown key 'hidden_sise'; did you mean 'hidden_size'?",
    ),
    "several unknown keys": (edited(n_group=1, topk_group=1), "'n_group', 'topk_group'"),
    "no schedule": (edited(without=("compress_ratios",)), "compress_ratios: missing"),
    "no routers": (edited(without=("num_hash_layers",)), "num_hash_layers: missing"),
    "ratio": (edited(compress_ratios=[0, 0, 4, 8] + [0] * 40), "compress_ratios[3]: expected 0"),
    "ratio type": (edited(compress_ratios=[True] * 43), "compress_ratios[0]: expected 0"),
    "ratios short": (edited(compress_ratios=[0] * 42), "expected 43 or 44 entries"),
    "ratios long": (edited(compress_ratios=[0] * 45), "expected 43 or 44 entries"),
    "ratios no list": (edited(compress_ratios=4), "compress_ratios: expected a list, got 4"),
    "ratio of prediction block": (edited(compress_ratios=[0] * 43 + [4]), "(prediction block)"),
    "layer names": (edited(layer_types=["full_attention"] * 43), "layer_types[0]: expected"),
    "layer names short": (edited(layer_types=["sliding_attention"]), "expected 43 entries"),
    "schedules differ": (edited(layer_types=["sliding_attention"] * 43), "contradicts layer_types"),
    "routers differ": (edited(mlp_layer_types=["moe"] * 43), "contradicts mlp_layer_types"),
    "router name": (edited(mlp_layer_types=["dense"] * 43), "mlp_layer_types[0]: expected"),
    "too many hash layers": (edited(num_hash_layers=44), "num_hash_layers: expected at most 43"),
    "rates": (edited(compress_rates={"csa": 4}), "compress_rates: unknown key 'csa'"),
    "rates type": (edited(compress_rates=[4, 128]), "compress_rates: expected an object"),
    "rates differ": (
        edited(compress_rates={"compressed_sparse_attention": 4}, compress_rate_csa=8),
        "compress_rate_csa: expected compress_rates' 4, got 8",
    ),
    "equal rates": (edited(compress_rate_csa=128), "ratio of both compressed kinds"),
    "rope type": (edited(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling.rope_type"),
    "rope no object": (edited(rope_scaling="yarn"), "rope_scaling: expected an object"),
    "rope twice": (edited(rope_parameters={"type": "yarn"}), "given beside rope_parameters"),
    "rope typo": (edited(rope_scaling={"type": "yarn", "facto": 2}), "did you mean 'factor'?"),
    "yarn incomplete": (
        edited(rope_scaling={"type": "yarn", "factor": 2}),
        "original_max_position",
    ),
    "factor without yarn": (
        edited(rope_scaling={"factor": 2}),
        "without YaRN: unknown key 'factor'",
    ),
    "attention scale": (nested(attention_factor=1.3), "attention_factor: expected 1.0, got 1.3"),
    "attention scale absent": (nested(attention_factor="absent"), "attention_factor: missing"),
    "mscale": (nested(mscale=0.7), "compress.mscale: expected 1.0, got 0.7"),
    "widths differ": (nested(partial_rotary_factor=0.25), "rotated width of 64"),
    "main missing": (
        edited(rope_scaling=None, rope_parameters={"compress": {}}),
        "rope_parameters.main: expected an object, got None",
    ),
    "one admissible": (edited(n_shared_experts=2), "n_shared_experts: expected 1, got 2"),
    "other model": (edited(model_type="deepseek_v41"), "model_type: expected 'deepseek_v4'"),
    "bool for int": (edited(num_key_value_heads=True), "num_key_value_heads: expected 1"),
    "dimension": (edited(o_groups=7), "ModelConfig.o_groups: expected a divisor"),
    "no number": (edited(head_dim="512"), "head_dim: expected a number, got '512'"),
    "fraction": (edited(hidden_size=4096.5), "hidden_size: expected int, got 4096.5"),
    "inference key": (edited("flash_inference", dims=1), "unknown key 'dims'; did you mean 'dim'?"),
    "inference value": (edited("flash_inference", dim=None), "dim: expected a number, got None"),
    "empty": ({}, "num_hidden_layers: missing"),
    "no source": (None, "expected a mapping or a path, got NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_key(case):
    source, expected = REFUSED[case]
    assert expected in refusal(source)


# Every key of every form, nested ones too

FORMS = {
    "flash": load("flash"),
    "inference": load("flash_inference"),
    "transformers": DeepseekV4Config(**load("flash")).to_dict(),
}
NAMINGS = (ROOT, INFERENCE)
NO_PART_OF_THE_MODEL = frozenset().union(*(n.storage | n.ignored for n in NAMINGS))
NONSENSE = (
    math.nan, math.inf, -math.inf, -1, 10**30, 10**400, None, False, "1", "", "a\nb",
    [], [1], [[]], {}, {"a": 1},
)  # fmt: skip
ADMITTED = {  # which of these make sense, by key
    "architectures": (None,),
    "compress_rates": (None, {}),
    "partial_rotary_factor": (None,),
    "qk_rope_head_dim": (None,),
    "rope_parameters": (None, {}),
    "rope_scaling": (None, {}),
} | {key: (False,) for key, values in ROOT.fixed.items() if values == (False,)}
FIELD_OF = {key: field for naming in NAMINGS for field, key in naming.fields.items()}
FIELD_OF |= {key: field for field, key in YARN_KEYS.items()}
FIELD_OF |= {key: f"{kind}_ratio" for kind, key in RATE_KEYS.items()}


def places(config: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key that is part of the model."""
    for key, value in config.items():
        if key not in NO_PART_OF_THE_MODEL:
            yield (*above, key)
            if isinstance(value, dict):
                yield from places(value, (*above, key))


PLACES = [(form, place) for form, config in FORMS.items() for place in places(config)]
EVERY_PLACE = pytest.mark.parametrize(
    "form, place", PLACES, ids=lambda part: part if isinstance(part, str) else ".".join(part)
)


def holder_changed(config: dict, place: tuple[str, ...], change) -> dict:
    """Return a configuration in which the object that has a place's key is changed."""
    if len(place) == 1:
        return change(config)
    return config | {place[0]: holder_changed(config[place[0]], place[1:], change)}


def check_names(message: str, key: str) -> None:
    assert key in message or FIELD_OF.get(key, key) in message


@EVERY_PLACE
def test_nonsense_is_refused(form, place):
    key = place[-1]
    for value in NONSENSE:
        if value not in ADMITTED.get(key, ()):
            source = holder_changed(FORMS[form], place, lambda holder, v=value: holder | {key: v})
            check_names(refusal(source), key)


@EVERY_PLACE
def test_misspelt_key_is_refused(form, place):
    key = place[-1]

    def misspell(holder: dict) -> dict:
        return {name + "_" * (name == key): value for name, value in holder.items()}

    message = refusal(holder_changed(FORMS[form], place, misspell))
    assert "unknown key" in message and f"did you mean '{key}'?" in message


OPTIONAL = {naming.fields[f] for naming in NAMINGS for f in OPTIONAL_FIELDS & naming.fields.keys()}
MAY_BE_MISSING = {  # keys for which their readers have a default, or which another key repeats
    "flash": {*OPTIONAL, *ROOT.fixed, "beta_fast", "beta_slow"},
    "inference": {*OPTIONAL, *INFERENCE.fixed},
}
MAY_BE_MISSING["transformers"] = MAY_BE_MISSING["flash"] | {
    "compress_rates", *RATE_KEYS.values(), "partial_rotary_factor", "qk_rope_head_dim", "type",
    "rope_type",
}  # fmt: skip
SUPERSEDED = (("rope_theta",), ("compress_rope_theta",))  # by rope_parameters


@EVERY_PLACE
def test_missing_key(form, place):
    key = place[-1]

    def remove(holder: dict) -> dict:
        return {name: value for name, value in holder.items() if name != key}

    source = holder_changed(FORMS[form], place, remove)
    if key in ("rope_scaling", "rope_parameters"):
        no_yarn = dataclasses.replace(RELEASED["flash"], yarn_factor=1)
        assert ModelConfig.from_hf(source) == no_yarn
    elif key in MAY_BE_MISSING[form] or (form == "transformers" and place in SUPERSEDED):
        assert ModelConfig.from_hf(source) == RELEASED["flash"]
    elif key == "type":
        assert "rope_scaling without YaRN: unknown key" in refusal(source)
    else:
        check_names(refusal(source), key)


LISTS = [
    ("flash", "compress_ratios", (43, 44)),
    ("inference", "compress_ratios", (43, 44)),
    ("transformers", "layer_types", (43,)),
    ("transformers", "mlp_layer_types", (43,)),
]


@pytest.mark.parametrize("form, key, admitted", LISTS)
def test_lists_have_an_entry_for_each_layer(form, key, admitted):
    values = FORMS[form][key]
    for length in set(range(2 * len(values) + 1)) - set(admitted):
        message = refusal(FORMS[form] | {key: (values + values)[:length]})
        assert f"{key}: expected {' or '.join(map(str, admitted))} entries" in message
        assert f"got {length}" in message


@pytest.mark.parametrize("form, key, _", LISTS)
def test_nonsense_in_lists_is_refused(form, key, _):
    values = FORMS[form][key]
    for layer, value in enumerate((NONSENSE * 3)[: len(values)]):
        message = refusal(FORMS[form] | {key: values[:layer] + [value] + values[layer + 1 :]})
        assert f"{key}[{layer}]" in message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(PLACES), JSON_VALUES)
def test_any_value_is_understood_or_refused_in_one_line(where, value):
    form, place = where
    source = holder_changed(FORMS[form], place, lambda holder: holder | {place[-1]: value})
    try:
        assert isinstance(ModelConfig.from_hf(source), ModelConfig)
    except InputError as error:
        check_names(str(error), place[-1])
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "cannot be read"),
        (b"", "expected JSON"),
        (b"\xff\xfe{", "cannot be read"),
        (b'{"dim": 1', "expected JSON"),
        (b"[1, 2]", "expected a JSON object, got [1, 2]"),
        (b'{"dim": 1, "dim": 2}', "key 'dim' occurs 2 times"),
        (b"[" * 100_000, "expected JSON"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, expected):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert expected in message
    assert str(path) in message
