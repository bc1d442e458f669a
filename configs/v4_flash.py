"""DeepSeek-V4-Flash (284B, 13B active): released dimensions, published pre-training recipe."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dsv4_jax.recipe import Recipe, with_recipe

# Of the 256 experts of a layer a device keeps 2 or 1 whole, for which Muon needs nothing of others.
# All work in bfloat16: FP8 is only simulated here, which takes time and memory.
RECIPES = {
    "v5p": Recipe(
        expert=64, fsdp=2, tokens=4096, runtime={"linears": "plain"},
        reason="The state, gradients and their sums over micro-batches take a third of the memory "
        "of 128 chips. Tokens travel among 64; half of 4 experts comes from a neighbour",
    ),
    "v6e": Recipe(
        expert=128, fsdp=2, tokens=4096, runtime={"linears": "plain"},
        reason="A slice has 256 chips of 31 GiB, and a copy takes all of them. Slices share rows "
        "and the optimizer's state. By launch/estimate.py that is not enough: 37 GiB each, 34 in 4 "
        "slices",
    ),
    "tpu7x": Recipe(
        expert=64, fsdp=2, tokens=4096, runtime={"linears": "plain"},
        reason="As v5p: a device, half of a chip, has as much memory; fsdp is the halves of a chip",
    ),
    "h100": Recipe(
        expert=16, fsdp=8, tokens=4096, runtime={"linears": "plain"},
        reason="Weights are gathered by NVLink within hosts of 8; between hosts travel tokens, and "
        "of the dense weights an eighth for each GPU",
    ),
}


def get_config(cluster: str = "") -> ConfigDict:
    """Return the run config of pre-training.

    The data are the user's to set; "unpublished" marks values that the report does not give.

    Args:
      cluster: devices as in `v5p-512`, for which `RECIPES` has a mesh and micro-batches; without,
        these are the user's to set, too.
    Source: official config.json; report sections 4.2.1 and 4.2.2.
    """
    return with_recipe(ConfigDict({
        "model": _model(),
        "runtime": {
            "dtype": "bfloat16",
            "remat": True,
            "moe": "auto",
            "expert_waves": 2,
            "expert_slack": 1.25,
            "kernels": "auto",
            "scan_unroll": 1,
            "linears": "fp8",  # "the FP8 training framework" of V3; details are unpublished
            "keys": "plain",  # unpublished for pre-training; "fp8" after it
            "indexer": "plain",  # "fp4" after pre-training, with "linears" then "fp4"
            "cache": "float32",
            "batch_invariant": False,
        },
        "data": {
            "source": "data",  # a directory of text; the report's data is not public
            "format": "text",
            "text_field": "text",
            "thinking": "off",
            "tokenizer": "data/tokenizer.json",  # the released one, of 129,280 entries
            "seed": 0,
            "held_out_fraction": 0.001,  # unpublished
            "held_out_bytes": 67_108_864,  # unpublished
        },
        "stages": _stages(),
        "optimizer": {
            "name": "muon",
            "learning_rate": 2.7e-4,
            "end_learning_rate": 2.7e-5,
            "warmup_steps": 2000,
            "decay_fraction": 0.1,  # unpublished: "near the end"
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-20,
            "muon_momentum": 0.95,
            "muon_rms": 0.18,
            "muon_dtype": "bfloat16",
            "clip_norm": 1.0,  # unpublished
        },
        "train": {
            "mtp_weight": 0.3,
            "mtp_weight_in_decay": 0.1,
            "balance_weight": 1e-4,
            "bias_update_rate": 1e-3,
            "deterministic": True,
            "skip_non_finite": True,
            "most_skips": 10,
            "eval_every": 1000,
            "checkpoint_every": 1000,
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
    }), RECIPES, cluster)


def _stages() -> dict:
    """32T tokens: 1T of dense attention, then sparse from rows of 64K tokens on.

    The lengths of rows, the full batch, the 1T and where sparsity begins are published. Unpublished
    and ours: how the 32T divide into stages; the ramp of the batch (by quarters, in the first 450B
    tokens; V3 took 469B). The indexer's warm-up is V3.2's.
    """
    full = 18_432 * 4096  # 75.5M tokens
    return {
        "stage1": _stage(150 * 10**9, 4096, full // 4),
        "stage2": _stage(150 * 10**9, 4096, full // 2),
        "stage3": _stage(150 * 10**9, 4096, full // 4 * 3),
        "stage4": _stage(250 * 10**9, 4096, full),
        "stage5": _stage(300 * 10**9, 16_384, full),
        "stage6": _stage(2_097_152_000, 65_536, 2_097_152, attention="indexer", learning_rate=1e-3),
        "stage7": _stage(30 * 10**12, 65_536, full, attention="sparse"),
        "stage8": _stage(10**12, 1_048_576, full, attention="sparse"),
    }


def _stage(tokens: int, seq_len: int, batch_tokens: int, **changes) -> dict:
    return {
        "tokens": tokens,
        "seq_len": seq_len,
        "batch_tokens": batch_tokens,
        "accumulation": 1,
        "attention": "dense",
        "mtp_weight": placeholder(float),  # None: that of the section "train"
        "learning_rate": placeholder(float),  # None: the optimizer's schedule
    } | changes


def _model() -> dict:
    layer_types = ("window", "window", "csa") + ("hca", "csa") * 20
    return {
        "vocab_size": 129_280,
        "hidden_size": 4096,
        "layer_types": layer_types,
        "moe_types": ("hash",) * 3 + ("learned",) * (len(layer_types) - 3),
        "num_attention_heads": 64,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "csa_ratio": 4,
        "hca_ratio": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "rope_theta": 10_000.0,
        "compress_rope_theta": 160_000.0,
        "yarn_factor": 16.0,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_original_positions": 65_536,
        "max_position_embeddings": 1_048_576,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
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
