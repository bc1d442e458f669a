"""Checkpoints go to PyTorch and back without a changed bit, and mean the same on both sides."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from compiling import quick_jit
from flax.traverse_util import flatten_dict
from hf_oracle import Oracle, import_tensors
from safetensors import safe_open
from test_hf_parity import (
    CASES,
    FLASH_LIKE,
    HEAVY_CASES,
    PRO_LIKE,
    assert_logits_equal,
)
from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

from dsv4_jax import ModelConfig, Transformer, init_params, load_pretrained, save_pretrained
from dsv4_jax.config import LEARNED
from dsv4_jax.infer import generate
from dsv4_jax.run_config import RunConfig
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step

# DeepSeek's own format knows but these: overlapping blocks of 4 tokens, hash routing first.
OFFICIAL = {
    "flash-like": FLASH_LIKE,
    "pro-like": dataclasses.replace(PRO_LIKE, csa_ratio=4),
    "unrolled": dataclasses.replace(CASES["unrolled"][0], moe_types=(LEARNED,) * 3),
}
MANY_FILES = 40_000  # bytes in a shard


@functools.cache
def oracle_of(name: str, dtype: torch.dtype = torch.float32) -> Oracle:
    oracle = Oracle(OFFICIAL[name], seed=len(name))
    oracle.model.to(dtype)
    return oracle


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder, read by PyTorch."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert not tensors.keys() & set(file.keys())
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def from_transformers(folder: Path, dtype: torch.dtype = torch.float32, **options):
    """Load by transformers, which must find every tensor that it expects and no other."""
    model, report = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager", **options,
    )
    assert not any(report.values()), report
    with torch.no_grad():
        # PyTorch's products round differently where memory is not aligned, as in mapped files.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.eval()


def logits_of(model: DeepseekV4ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def tokens_for(config: ModelConfig, length: int = 30) -> np.ndarray:
    return np.random.default_rng(5).integers(0, config.vocab_size, (2, length)).astype(np.int32)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def write_named(folder: Path, oracle: Oracle, naming: str) -> None:
    """Write a model of transformers under one of the three kinds of names."""
    if naming == "hybrid":
        oracle.model.save_pretrained(folder, max_shard_size=MANY_FILES)
        return
    folder.mkdir()
    oracle.model.config.save_pretrained(folder)
    tensors = {name: t.contiguous() for name, t in oracle.model.state_dict().items()}
    if naming == "original":
        tensors = {original_name(name): t for name, t in split_experts(tensors).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo transformers' stacking of experts, independently of the code under test."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, pair in enumerate(tensor):
                gate, up = pair.chunk(2)
                found[f"{stem}.{expert}.w1.weight"] = gate.contiguous()
                found[f"{stem}.{expert}.w3.weight"] = up.contiguous()
        elif stem.endswith(".experts"):
            for expert, down in enumerate(tensor):
                found[f"{stem}.{expert}.w2.weight"] = down.contiguous()
        else:
            found[name] = tensor
    return found


RENAMES = (  # of transformers' names to the original ones, in this order
    ("model.embed_tokens", "embed"), ("lm_head", "head"), ("model.hc_head.hc_", "hc_head_"),
    ("model.", ""), ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.scorer.weights_proj", "attn.indexer.weights_proj"),
    ("self_attn.compressor.indexer.", "attn.indexer.compressor."), ("self_attn.", "attn."),
    ("mlp.shared_experts.gate_proj", "ffn.shared_experts.w1"),
    ("mlp.shared_experts.down_proj", "ffn.shared_experts.w2"),
    ("mlp.shared_experts.up_proj", "ffn.shared_experts.w3"), ("mlp.", "ffn."),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("attn_hc.", "hc_attn_"), ("ffn_hc.", "hc_ffn_"), (".sinks", ".attn_sink"),
    ("compressor.kv_norm", "compressor.norm"), ("position_bias", "ape"),
    ("e_score_correction_bias", "bias"), ("q_a_norm", "q_norm"), ("q_a_proj", "wq_a"),
    ("q_b_proj", "wq_b"), ("gate_proj", "wgate"), ("kv_proj", "wkv"), ("o_a_proj", "wo_a"),
    ("o_b_proj", "wo_b"),
)  # fmt: skip


def original_name(name: str) -> str:
    for theirs, original in RENAMES:
        name = name.replace(theirs, original)
    return name


@pytest.mark.parametrize("naming", ["original", "modules", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_there_and_back(name, dtype, naming, tmp_path):
    """PyTorch -> ours -> PyTorch: the same tensors, and the same logits to the last bit."""
    oracle, config = oracle_of(name, dtype), OFFICIAL[name]
    write_named(tmp_path / "theirs", oracle, naming)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3) == (naming == "hybrid")
    loaded, params = load_pretrained(tmp_path / "theirs")
    assert loaded == config
    wanted = {key: tensor.float().numpy() for key, tensor in oracle.model.state_dict().items()}
    wanted = flatten_dict(import_tensors(wanted, config), sep="/")
    found = flatten_dict(params, sep="/")
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert np.array_equal(leaf.astype(wanted[path].dtype), wanted[path]), path

    save_pretrained(tmp_path / "hf", loaded, params, max_shard_bytes=MANY_FILES)
    assert_same_tensors(read_files(tmp_path / "hf"), oracle.model.state_dict())
    save_pretrained(tmp_path / "deepseek", loaded, params, format="deepseek")
    expected = {
        original_name(key): tensor
        for key, tensor in split_experts(oracle.model.state_dict()).items()
    }
    assert_same_tensors(read_files(tmp_path / "deepseek"), expected)
    tokens = tokens_for(config)
    expected = logits_of(from_transformers(tmp_path / "theirs", dtype), tokens)
    for folder in ("hf", "deepseek"):
        found = logits_of(from_transformers(tmp_path / folder, dtype), tokens)
        assert np.array_equal(found, expected)


@pytest.mark.usefixtures("quick_generation")
@pytest.mark.parametrize("name", HEAVY_CASES)
def test_scratch_weights_mean_the_same_in_transformers(name, tmp_path):
    """Ours, fresh -> PyTorch: the same logits and the same greedy continuation."""
    config = CASES[name][0]
    params = init_params(dataclasses.replace(config, initializer_range=0.2), jax.random.key(1))
    save_pretrained(tmp_path / "hf", config, params)
    theirs, tokens = from_transformers(tmp_path / "hf"), tokens_for(config)
    ours = Transformer(config)
    logits = quick_jit(ours.apply)({"params": params}, tokens)
    assert_logits_equal(logits, logits_of(theirs, tokens))
    prompt = tokens[0, :9]
    continued = generate(ours.config, params, prompt, max_new_tokens=12, temperature=0.0)
    expected = theirs.generate(
        torch.from_numpy(prompt[None]).long(), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert continued.tokens[0].tolist() == expected[0, 9:].tolist()


def test_prediction_block_goes_in_and_out(tmp_path):
    """Transformers ignores mtp.*; both formats keep it."""
    config = dataclasses.replace(FLASH_LIKE, num_nextn_predict_layers=1)
    params = init_params(config, jax.random.key(0))
    for format in ("hf", "deepseek"):
        save_pretrained(tmp_path / format, config, params, format=format)
        names = read_files(tmp_path / format).keys()
        assert {"mtp.0.e_proj.weight", "mtp.0.attn.wq_a.weight", "mtp.0.hc_head_fn"} <= names
        loaded, again = load_pretrained(tmp_path / format)
        assert loaded == config
        jax.tree.map(np.testing.assert_array_equal, again, params)
        from_transformers(tmp_path / format)
        without, fewer = load_pretrained(tmp_path / format, skip_mtp=True)
        assert without == FLASH_LIKE
        assert fewer.keys() == params.keys() - {"mtp"}


def test_what_transformers_saves_has_lost_the_prediction_block(tmp_path):
    """Its config still counts the block, whose tensors it never had."""
    oracle_of("flash-like").model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    config, params = load_pretrained(tmp_path)
    assert config == FLASH_LIKE and "mtp" not in params


@pytest.mark.parametrize("format", ["hf", "deepseek"])
@pytest.mark.parametrize("dtype", ["fp8", "fp4"])
def test_transformers_reads_what_is_quantised(format, dtype, tmp_path):
    """Its own dequantisation to float32 and its own names are the independent reference."""
    config = OFFICIAL["flash-like"]
    params = load_oracle_params("flash-like", tmp_path)
    save_pretrained(tmp_path / "out", config, params, format=format, dtype=dtype)
    loaded, ours = load_pretrained(tmp_path / "out", dtype="float32")
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    theirs = from_transformers(tmp_path / "out", **options)
    wanted = {key: tensor.float().numpy() for key, tensor in theirs.state_dict().items()}
    wanted = flatten_dict(import_tensors(wanted, config), sep="/")
    for path, leaf in flatten_dict(ours, sep="/").items():
        assert np.array_equal(leaf, wanted[path]), path
    tokens = tokens_for(config)
    logits = quick_jit(Transformer(loaded).apply)({"params": ours}, tokens)
    assert_logits_equal(logits, logits_of(theirs, tokens))


def load_oracle_params(name: str, tmp_path: Path) -> dict:
    oracle_of(name).model.save_pretrained(tmp_path / "oracle")
    return load_pretrained(tmp_path / "oracle")[1]


def test_training_goes_on_from_an_import(tmp_path):
    """A step of the optimizer runs on imported weights and lowers the loss of its batch."""
    config = RunConfig.from_config_dict({
        "model": dataclasses.asdict(FLASH_LIKE) | {
            "layer_types": list(FLASH_LIKE.layer_types), "moe_types": list(FLASH_LIKE.moe_types)
        },
        "stages": {"stage1": {"tokens": 320, "seq_len": 16, "batch_tokens": 32}},
        "optimizer": {"learning_rate": 3e-3, "end_learning_rate": 3e-4, "warmup_steps": 1,
                      "decay_fraction": 0.1},
        "train": {"eval_every": 10, "checkpoint_every": 10},
    })  # fmt: skip
    params = load_oracle_params("flash-like", tmp_path)
    state = init_state(config)._replace(params=params)
    batch = {"tokens": jnp.asarray(tokens_for(FLASH_LIKE, 16))}
    step = quick_jit(make_train_step(config, config.stages[0]))
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
