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
    "runtime": {"dtype": "bfloat16"},
    "stages": {
        "stage1": {
            "tokens": 9000, "seq_len": 128, "batch_tokens": 1024, "accumulation": 2,
            "attention": "dense",
        },
        "stage2": {"tokens": 1, "seq_len": 256, "batch_tokens": 512, "learning_rate": 1e-3},
    },
    "optimizer": {
        "learning_rate": 1e-3,
        "end_learning_rate": 0,
        "warmup_steps": 2,
        "decay_fraction": 0.25,
    },
    "train": {"eval_every": 5, "checkpoint_every": 5},
    "mesh": {"data": 2},
}


def with_value(key: str, value) -> dict:
    """Return the valid sections with one dotted key set."""
    sections = copy.deepcopy(SECTIONS)
    *path, name = key.split(".")
    section = sections
    for part in path:
        section = section.setdefault(part, {})
    section[name] = value
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
    assert config.runtime == Runtime(dtype="bfloat16")
    assert config.mesh == MeshConfig(data=2)
    assert config.data.tokenizer is None
    assert config.optimizer.end_learning_rate == 0  # an int where a float is expected
    first, second = config.stages
    assert (first.rows, first.steps, first.csa) == (8, 9, "dense")
    assert (second.attention, second.mtp_weight, second.learning_rate) == ("sparse", None, 1e-3)


def test_stages_follow_each_other():
    config = RunConfig.from_config_dict(SECTIONS)
    assert (config.stage_ends, config.steps) == ([9, 10], 10)
    assert [config.stage_at(step) for step in (0, 1, 9, 10, 11)] == [0, 0, 0, 1, 1]
    # More than nine are in the order of their numbers, not of their names.
    stages = {f"stage{i}": {"tokens": 512 * i, "seq_len": 2, "batch_tokens": 512}
              for i in range(11, 0, -1)}  # fmt: skip
    many = RunConfig.from_config_dict(SECTIONS | {"stages": stages})
    assert [stage.steps for stage in many.stages] == list(range(1, 12))


def test_sections_without_required_keys_may_be_left_out():
    sections = copy.deepcopy(SECTIONS)
    del sections["runtime"], sections["mesh"]
    config = RunConfig.from_config_dict(sections)
    assert (config.runtime, config.mesh) == (Runtime(), MeshConfig())


def test_json_round_trip():
    config = RunConfig.from_config_dict(SECTIONS)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    assert not {"mesh", "layout", "csa", "index_learns"} & written["runtime"].keys()
    assert RunConfig.from_config_dict(written) == config


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        # Unknown keys and sections
        ("optimizer.learning_rat", 1e-3, ("unknown", "did you mean optimizer.learning_rate?")),
        ("optimiser", {}, ("unknown", "did you mean optimizer?")),
        ("zzz", {}, ("unknown", "known: model, runtime, data")),
        ("mesh.qqq", 1, ("unknown", "known: data, fsdp, expert, tensor, layout")),
        ("runtime.mesh", None, ("unknown", "known: dtype, remat")),
        # Ill-typed values
        ("data", 3, ("expected a section of keys, got 3",)),
        ("stages", {"first": {}}, ("stage1, stage2 and so on", "got 'first'")),
        ("stages", {"stage2": {}}, ("stage1, stage2 and so on", "got 'stage2'")),
        ("stages", {}, ("stage1, stage2 and so on", "got nothing")),
        ("stages", 3, ("a section for each stage, got 3",)),
        ("stages.stage2", 3, ("expected a section of keys, got 3",)),
        ("stages.stage1.seq_len", "long", ("expected int, got 'long'",)),
        ("stages.stage1.seq_len", 2.5, ("expected int, got 2.5",)),
        ("stages.stage1.seqlen", 8, ("unknown", "did you mean stages.stage1.seq_len?")),
        ("stages.stage1.tokens", 0, ("expected at least 1", "got 0")),
        ("stages.stage1.batch_tokens", 1000, ("a multiple of seq_len (128), got 1000",)),
        ("stages.stage1.attention", "full", ("one of dense, indexer, sparse, got 'full'",)),
        ("stages.stage1.mtp_weight", -0.1, ("at least 0, got -0.1",)),
        ("stages.stage2.learning_rate", 0.0, ("a positive number, got 0.0",)),
        ("data.tokenizer", 7, ("expected str, got 7",)),
        ("train.eval_every", True, ("expected int, got True",)),
        ("train.eval_every", None, ("expected int, got None",)),
        ("optimizer.learning_rate", "1e-3", ("expected float, got '1e-3'",)),
        ("model.hidden_size", "wide", ("expected int, got 'wide'",)),
        ("runtime.remat", "yes", ("expected bool, got 'yes'",)),
        ("runtime.scan_unroll", "2", ("expected int, got '2'",)),
        ("model.layer_types", 3, ("expected tuple[str, ...], got 3",)),
        # Values out of range
        ("model.o_groups", 3, ("a divisor of num_attention_heads (8), got 3",)),
        ("runtime.dtype", "float16", ("expected one of float32, bfloat16", "'float16'")),
        ("data.source", "", ("a path",)),
        ("stages.stage1.seq_len", 1, ("expected at least 2", "got 1")),
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
        ("stages.stage1.accumulation", 0, ("expected at least 1, got 0",)),
        ("train.mtp_weight", -1, ("at least 0, got -1",)),
        ("data.seed", -1, ("0 to 2^32 - 1, got -1",)),
        ("train.seed", 2**63, ("0 to 2^32 - 1, got 9223372036854775808",)),
        ("model.hash_seed", 2**32, ("0 to 2^32 - 1, got 4294967296",)),
        ("train.sample_top_p", 0.0, ("above 0 and at most 1, got 0.0",)),
        ("mesh.expert", 0, ("expected at least 1, got 0",)),
        # Sections that contradict each other
        ("stages.stage1.accumulation", 3, ("a divisor of the 8 rows of a batch, got 3",)),
        ("stages.stage2.seq_len", 512, ("at most model.max_position_embeddings (256), got 512",)),
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


@pytest.mark.parametrize("key", ["model.vocab_size", "stages.stage1.seq_len", "train.eval_every"])
def test_a_missing_key_says_how_to_set_it(key):
    sections = copy.deepcopy(SECTIONS)
    *path, name = key.split(".")
    section = sections
    for part in path:
        section = section[part]
    del section[name]
    with pytest.raises(ValueError, match=f"^{key}: expected int, got nothing; .*--config.{key}="):
        RunConfig.from_config_dict(sections)


def test_a_missing_section_names_its_first_required_key():
    sections = copy.deepcopy(SECTIONS)
    del sections["optimizer"]
    with pytest.raises(ValueError, match="^optimizer.learning_rate: expected float, got nothing"):
        RunConfig.from_config_dict(sections)


def test_steps_are_bounded():
    with pytest.raises(ValueError, match=r"^stages: expected at most 2\^31 - 1 steps, got 2199"):
        RunConfig.from_config_dict(with_value("stages.stage1.tokens", 2**51))


def test_a_config_must_be_a_mapping():
    with pytest.raises(ValueError, match="^config: expected a mapping of sections, got 'tiny'"):
        RunConfig.from_config_dict("tiny")
