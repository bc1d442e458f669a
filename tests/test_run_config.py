"""Test that a run config is read, checked and written back."""

from __future__ import annotations

import copy
import json

import pytest
from ml_collections import ConfigDict

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.run_config import MeshConfig, RunConfig

SECTIONS = {
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "layer_types": ["window", "csa", "hca"],
        "moe_types": ["hash", "learned", "learned"],
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
    },
    "runtime": {"csa": "dense"},
    "data": {"seq_len": 128, "batch_size": 8},
    "optimizer": {
        "learning_rate": 1e-3,
        "end_learning_rate": 0,
        "warmup_steps": 2,
        "decay_fraction": 0.25,
    },
    "train": {"steps": 10, "eval_every": 5, "checkpoint_every": 5, "accumulation": 2},
    "mesh": {"data": 2},
}


def with_value(key: str, value) -> dict:
    """Return the valid sections with one dotted key set."""
    sections = copy.deepcopy(SECTIONS)
    section, _, name = key.partition(".")
    if name:
        sections[section][name] = value
    else:
        sections[section] = value
    return sections


def test_mappings_and_config_dicts_give_the_same_config():
    config = RunConfig.from_config_dict(SECTIONS)
    assert RunConfig.from_config_dict(ConfigDict(SECTIONS).lock()) == config
    assert config.model == ModelConfig(
        vocab_size=64,
        hidden_size=16,
        layer_types=("window", "csa", "hca"),
        moe_types=("hash", "learned", "learned"),
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    assert config.runtime == Runtime(csa="dense")
    assert config.mesh == MeshConfig(data=2)
    assert config.data.tokenizer is None
    assert config.optimizer.end_learning_rate == 0  # an int where a float is expected


def test_sections_without_required_keys_may_be_left_out():
    sections = copy.deepcopy(SECTIONS)
    del sections["runtime"], sections["mesh"]
    config = RunConfig.from_config_dict(sections)
    assert (config.runtime, config.mesh) == (Runtime(), MeshConfig())


def test_json_round_trip():
    config = RunConfig.from_config_dict(SECTIONS)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    assert "mesh" not in written["runtime"]
    assert RunConfig.from_config_dict(written) == config


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        # Unknown keys and sections
        ("optimizer.learning_rat", 1e-3, ("unknown", "did you mean optimizer.learning_rate?")),
        ("optimiser", {}, ("unknown", "did you mean optimizer?")),
        ("zzz", {}, ("unknown", "known: model, runtime, data")),
        ("mesh.qqq", 1, ("unknown", "known: data, fsdp, expert, tensor")),
        ("runtime.mesh", None, ("unknown", "known: dtype, remat")),
        # Ill-typed values
        ("data", 3, ("expected a section of keys, got 3",)),
        ("data.seq_len", "long", ("expected int, got 'long'",)),
        ("data.seq_len", 2.5, ("expected int, got 2.5",)),
        ("data.tokenizer", 7, ("expected str, got 7",)),
        ("train.steps", True, ("expected int, got True",)),
        ("train.steps", None, ("expected int, got None",)),
        ("optimizer.learning_rate", "1e-3", ("expected float, got '1e-3'",)),
        ("model.hidden_size", "wide", ("expected int, got 'wide'",)),
        ("runtime.remat", "yes", ("expected bool, got 'yes'",)),
        ("runtime.scan_unroll", "2", ("expected int, got '2'",)),
        ("model.layer_types", 3, ("expected tuple[str, ...], got 3",)),
        # Values out of range
        ("model.o_groups", 3, ("a divisor of num_attention_heads (8), got 3",)),
        ("runtime.dtype", "float16", ("expected one of float32, bfloat16", "'float16'")),
        ("data.source", "", ("a path",)),
        ("data.seq_len", 1, ("expected at least 2", "got 1")),
        ("data.held_out_fraction", 1.0, ("between 0 and 1", "got 1.0")),
        ("optimizer.name", "sgd", ("expected one of muon, adamw, got 'sgd'",)),
        ("optimizer.muon_dtype", "int8", ("expected one of float32, bfloat16, got 'int8'",)),
        ("optimizer.learning_rate", 0.0, ("expected a positive number, got 0.0",)),
        ("optimizer.learning_rate", float("nan"), ("expected a positive number, got nan",)),
        ("optimizer.clip_norm", float("inf"), ("expected a positive number, got inf",)),
        ("optimizer.end_learning_rate", 1, ("between 0 and learning_rate (0.001), got 1",)),
        ("optimizer.beta2", 1.0, ("below 1", "got 1.0")),
        ("optimizer.decay_fraction", 1.5, ("between 0 and 1, got 1.5",)),
        ("optimizer.weight_decay", -0.1, ("at least 0, got -0.1",)),
        ("train.accumulation", 0, ("expected at least 1, got 0",)),
        ("train.mtp_weight", -1, ("at least 0, got -1",)),
        ("data.seed", -1, ("0 to 2^32 - 1, got -1",)),
        ("train.seed", 2**63, ("0 to 2^32 - 1, got 9223372036854775808",)),
        ("model.hash_seed", 2**32, ("0 to 2^32 - 1, got 4294967296",)),
        ("train.sample_top_p", 0.0, ("above 0 and at most 1, got 0.0",)),
        ("mesh.expert", 0, ("expected at least 1, got 0",)),
        # Sections that contradict each other
        ("data.batch_size", 5, ("a multiple of train.accumulation (2), got 5",)),
        ("data.seq_len", 512, ("at most model.max_position_embeddings (256), got 512",)),
        ("train.sample_tokens", 256, ("less than model.max_position_embeddings (256), got 256",)),
    ],
)
def test_a_bad_value_is_one_line_with_its_dotted_key(key, value, fragments):
    with pytest.raises(ValueError) as caught:
        RunConfig.from_config_dict(with_value(key, value))
    message = str(caught.value)
    assert message.startswith(f"{key}: expected ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("key", ["model.vocab_size", "data.seq_len", "train.steps"])
def test_a_missing_key_says_how_to_set_it(key):
    sections = copy.deepcopy(SECTIONS)
    section, name = key.split(".")
    del sections[section][name]
    with pytest.raises(ValueError, match=f"^{key}: expected int, got nothing; .*--config.{key}="):
        RunConfig.from_config_dict(sections)


def test_a_missing_section_names_its_first_required_key():
    sections = copy.deepcopy(SECTIONS)
    del sections["data"]
    with pytest.raises(ValueError, match="^data.seq_len: expected int, got nothing"):
        RunConfig.from_config_dict(sections)


def test_a_config_must_be_a_mapping():
    with pytest.raises(ValueError, match="^config: expected a mapping of sections, got 'tiny'"):
        RunConfig.from_config_dict("tiny")
