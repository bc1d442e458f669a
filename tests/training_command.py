"""Run the training command on a run of seconds, to break it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv4_jax.manifest import MANIFEST_FILE
from dsv4_jax.pace import SPEED

ROOT = Path(__file__).parents[1]

MODEL = {
    "vocab_size": 300, "hidden_size": 16, "layer_types": ["csa"], "moe_types": ["learned"],
    "num_attention_heads": 2, "head_dim": 8, "qk_rope_head_dim": 4, "q_lora_rank": 8,
    "o_groups": 2, "o_lora_rank": 4, "sliding_window": 8, "csa_ratio": 4, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 4, "yarn_original_positions": 16,
    "max_position_embeddings": 128, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    "num_nextn_predict_layers": 0,
}  # fmt: skip


def sections_of(source: Path, *, steps: int = 60, **train_keys) -> dict:
    """Return a config of one stage, whose steps take milliseconds."""
    stage = {"tokens": 128 * steps, "seq_len": 32, "batch_tokens": 128, "attention": "dense"}
    return {
        "model": MODEL,
        "data": {"source": str(source), "held_out_fraction": 0.1},
        "stages": {"stage1": stage},
        "optimizer": {
            "learning_rate": 3e-2, "end_learning_rate": 1e-3, "warmup_steps": 2,
            "decay_fraction": 0.3,
        },
        "train": {"eval_every": 30, "checkpoint_every": 3, "sample_tokens": 1}
        | train_keys,
    }


def write_text(path: Path) -> Path:
    """Write a text of a few kilobytes in a small vocabulary."""
    choose = random.Random(0)
    words = ["the", "model", "routes", "every", "token", "to", "experts", "and", "adds"]
    path.write_text("".join(f"{choose.choice(words)} " for _ in range(1500)))
    return path


def start(
    sections: dict, workdir: Path, compiled: Path, arguments: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen:
    """Start the command on one device; equal programs are compiled once for all processes."""
    path = workdir.with_suffix(".py")
    path.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({sections!r})\n"
    )
    return subprocess.Popen(
        [
            sys.executable, ROOT / "launch" / "train.py", f"--config={path}",
            f"--workdir={workdir}", *arguments,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment,
        },
    )


def complete(process: subprocess.Popen) -> tuple[str, str]:
    """Wait for a process; return what it printed to each stream.

    Without Orbax's advice to save less often: on a busy machine it comes up at any time in runs
    that save every few milliseconds.
    """
    out, errors = process.communicate()
    lines = errors.splitlines(keepends=True)
    return out, "".join(line for line in lines if "Waiting for previous save" not in line)


def finish(process: subprocess.Popen) -> str:
    """Wait for a process that is to succeed, and return what it printed."""
    out, errors = complete(process)
    assert process.returncode == 0 and errors == "", errors
    return out


def committed_steps(workdir: Path) -> list[int]:
    """Return the steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def result_of(workdir: Path) -> dict:
    """Return all that a run leaves that has to be equal, bit by bit, if another did the same."""
    newest = workdir / "checkpoints" / str(committed_steps(workdir)[-1])
    manifest = json.loads((newest / MANIFEST_FILE).read_text())
    return {
        "state": manifest["leaves"],
        "data": json.loads((newest / "data" / "metadata").read_text()),
        "metrics": list(metrics_of(workdir)),
    }


def metrics_of(workdir: Path) -> Iterator[dict]:
    """Yield the metrics that do not depend on the clock."""
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        yield {
            name: x for name, x in values.items()
            if name != "time" and not name.startswith(SPEED)
        }
