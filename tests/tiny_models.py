"""Tiny models with tokenizers, in folders as trainings and conversions leave them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from dsv4_jax import init_params, save_pretrained
from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.run_config import RunConfig
from dsv4_jax.tokenizer import TOKENIZER_FILE, train_tokenizer
from dsv4_jax.train_state import init_state

VOCAB_SIZE = 300
TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n" * 3
TOKENIZER = train_tokenizer([TEXT], vocab_size=VOCAB_SIZE)


def sections_of(source: Path) -> dict:
    """Return the config of a run on a text."""
    return {
        "model": {
            "vocab_size": VOCAB_SIZE, "hidden_size": 16, "layer_types": ["csa"],
            "moe_types": ["learned"], "num_attention_heads": 2, "head_dim": 8,
            "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 4,
            "sliding_window": 8, "csa_ratio": 4, "index_n_heads": 2, "index_head_dim": 8,
            "index_topk": 2, "max_position_embeddings": 256, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 8, "hc_mult": 2,
            "hc_sinkhorn_iters": 3, "num_nextn_predict_layers": 0, "initializer_range": 0.5,
        },
        "data": {"source": str(source), "held_out_fraction": 0.3},
        "stages": {
            "stage1": {"tokens": 256, "seq_len": 32, "batch_tokens": 64, "attention": "dense"},
        },
        "optimizer": {
            "name": "adamw", "learning_rate": 1e-3, "end_learning_rate": 1e-4, "warmup_steps": 1,
            "decay_fraction": 0.5,
        },
        "train": {"eval_every": 4, "checkpoint_every": 4, "sample_tokens": 8},
        "mesh": {},
    }  # fmt: skip


def write_workdir(folder: Path) -> RunConfig:
    """Write what a run leaves in its workdir, and the text beside it that it trained on."""
    source = folder.with_suffix(".txt")
    source.write_text(TEXT)
    config = RunConfig.from_config_dict(sections_of(source))
    checkpoints = Checkpoints(folder, keep=1, config=config.to_dict())
    checkpoints.save(3, init_state(config, None), {})
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / TOKENIZER_FILE).write_text(TOKENIZER.specification)
    return config


def write_saved(folder: Path, dtype: str) -> None:
    """Write a model with a tokenizer as `save_pretrained` and a copy do."""
    config = RunConfig.from_config_dict(sections_of(folder)).model
    config = dataclasses.replace(config, num_nextn_predict_layers=1)
    save_pretrained(folder, config, init_params(config, jax.random.key(1)), dtype=dtype)
    (folder / TOKENIZER_FILE).write_text(TOKENIZER.specification)
