"""A DeepSeek-V4 with every part, small enough to train on two CPU cores."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return the run config: 7 layers on Python's standard library, minutes on two cores."""
    return ConfigDict({
        "model": _model(),
        "runtime": {
            "dtype": "float32",
            "remat": False,
            "moe": "auto",
            "expert_waves": 2,
            "expert_slack": 1.25,
            "kernels": "auto",
            "scan_unroll": 1,
            "linears": "plain",
            "keys": "plain",
            "indexer": "plain",
            "cache": "float32",
            "batch_invariant": False,
        },
        "data": {
            "source": "stdlib",
            "format": "text",
            "text_field": "text",
            "thinking": "off",
            "tokenizer": placeholder(str),  # None: trained on the source
            "seed": 0,
            "held_out_fraction": 0.03,
            "held_out_bytes": 262_144,
        },
        "stages": _stages(),
        "optimizer": {
            "name": "muon",
            "learning_rate": 6e-3,
            "end_learning_rate": 3e-4,
            "warmup_steps": 20,
            "decay_fraction": 0.3,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-20,
            "muon_momentum": 0.95,
            "muon_rms": 0.18,
            "muon_dtype": "float32",
            "clip_norm": 1.0,
        },
        "train": {
            "mtp_weight": 0.3,
            "mtp_weight_in_decay": 0.1,
            "balance_weight": 1e-4,
            "bias_update_rate": 1e-2,  # published: 1e-3, for a run of a thousand times the steps
            "deterministic": True,
            "skip_non_finite": True,
            "most_skips": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
            "keep_checkpoints": 2,
            "checkpoint_patience": 1800.0,
            "log_every": 1,
            "seed": 0,
            "sample_prompt": "def ",
            "sample_tokens": 128,
            "sample_temperature": 0.8,
            "sample_top_p": 0.95,
        },
        "spikes": {  # unpublished, all of it
            "guard": True,
            "window": 64,
            "loss_deviations": 10.0,
            "norm_deviations": 30.0,
            "margin": 3,
            "lag": 8,
            "steps": 100,
            "most_rollbacks": 3,
        },
        "mesh": {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "layout": "pod"},
    }).lock()


def _stages() -> dict:
    """From short rows to long ones, from dense attention to sparse."""
    long = {"seq_len": 1024, "batch_tokens": 4096}
    return {
        "stage1": _stage(1_600_000),
        "stage2": _stage(200_000, **long),
        "stage3": _stage(120_000, **long, attention="indexer", learning_rate=3e-3),
        "stage4": _stage(500_000, **long, attention="sparse"),
    }


def _stage(tokens: int, **changes) -> dict:
    return {
        "tokens": tokens,
        "seq_len": 256,
        "batch_tokens": 4096,
        "accumulation": 1,
        "attention": "dense",
        "mtp_weight": placeholder(float),  # None: that of the section "train"
        "learning_rate": placeholder(float),  # None: the optimizer's schedule
    } | changes


def _model() -> dict:
    layer_types = ("window", "window", "csa") + ("hca", "csa") * 2
    return {
        "vocab_size": 4096,
        "hidden_size": 128,
        "layer_types": layer_types,
        "moe_types": ("hash",) * 3 + ("learned",) * (len(layer_types) - 3),
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 64,
        "csa_ratio": 4,
        "hca_ratio": 32,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 32,
        "rope_theta": 10_000.0,
        "compress_rope_theta": 160_000.0,
        "yarn_factor": 4.0,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_original_positions": 1024,
        "max_position_embeddings": 4096,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "hc_gate_init": 0.01,
        "hash_seed": 0,
    }
