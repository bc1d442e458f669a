"""Fine-tuning a trained model on chats: python launch/train.py ... --init_from=DIR."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return the run config: sparse attention from the start, the loss on the answers alone.

    The sizes are for `configs/tiny.py`, minutes on two cores.
    """
    return ConfigDict({
        "model": {  # None, and all that is not here: as in the checkpoint
            "max_position_embeddings": placeholder(int),
            "yarn_factor": placeholder(float),
            "index_topk": placeholder(int),
            "num_nextn_predict_layers": placeholder(int),  # 0: without multi-token prediction
        },
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
            "source": "stdlib",  # what functions of Python's standard library do
            "format": "chat",
            "text_field": "text",
            "thinking": "off",
            "tokenizer": placeholder(str),  # None: that of the checkpoint
            "seed": 0,
            "held_out_fraction": 0.1,
            "held_out_bytes": 262_144,
        },
        "stages": {
            "stage1": {
                "tokens": 400_000,
                "seq_len": 512,
                "batch_tokens": 4096,
                "accumulation": 1,
                "attention": "sparse",
                "mtp_weight": 0.1,
                "learning_rate": placeholder(float),  # None: the optimizer's schedule
            },
        },
        "optimizer": {
            "name": "muon",
            "learning_rate": 1e-3,
            "end_learning_rate": 1e-5,
            "warmup_steps": 5,
            "decay_fraction": 0.9,
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
            "bias_update_rate": 1e-3,
            "deterministic": True,
            "skip_non_finite": True,
            "most_skips": 10,
            "eval_every": 25,
            "checkpoint_every": 25,
            "keep_checkpoints": 2,
            "checkpoint_patience": 1800.0,
            "log_every": 1,
            "seed": 0,
            "sample_prompt": _question(),
            "sample_tokens": 64,
            "sample_temperature": 0.0,
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


def _question() -> str:
    return """What does this function do?

def is_absolute(path):
    return path.startswith("/")"""
