"""A training with kernels is the training without them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from compiling import quick_jit
from on_mesh import mesh_of

from dsv4_jax.run_config import RunConfig
from dsv4_jax.sharding import batch_sharding
from dsv4_jax.train_state import init_state, state_shardings
from dsv4_jax.train_step import make_train_step

STEPS = 20
ROUNDING = 1e-4  # ratio: float32 sums in another order, over 20 steps

CONFIG = RunConfig.from_config_dict({
    "model": {
        "vocab_size": 32, "hidden_size": 16, "layer_types": ["window", "csa", "hca"],
        "moe_types": ["hash", "learned", "learned"], "num_attention_heads": 4, "head_dim": 16,
        "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8,
        "sliding_window": 8, "csa_ratio": 4, "hca_ratio": 8, "index_n_heads": 16,
        "index_head_dim": 16, "index_topk": 4, "yarn_original_positions": 16,
        "max_position_embeddings": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    },
    "stages": {
        "stage1": {
            "tokens": STEPS * 64, "seq_len": 32, "batch_tokens": 64, "attention": "sparse",
        },
    },
    "optimizer": {
        "name": "muon", "learning_rate": 1e-2, "end_learning_rate": 1e-3, "warmup_steps": 2,
        "decay_fraction": 0.5,
    },
    "train": {"eval_every": 10, "checkpoint_every": 10},
})  # fmt: skip

BATCH = {
    "tokens": np.random.default_rng(0).integers(0, 32, (2, 32)).astype(np.int32),
    "segment_ids": np.array([[1] * 19 + [2] * 13, [1] * 5 + [2] * 24 + [0] * 3], np.int32),
}


def losses(kernels: str, mesh=None) -> np.ndarray:
    """Train on one batch of packed rows; return the loss of each step."""
    config = dataclasses.replace(
        CONFIG, runtime=dataclasses.replace(CONFIG.runtime, kernels=kernels)
    )
    state, batch = init_state(config, mesh), BATCH
    step = make_train_step(config, config.stages[0], mesh)
    if mesh is not None:
        batch = jax.device_put(BATCH, batch_sharding(mesh, len(BATCH["tokens"])))
    program = str(jax.make_jaxpr(step)(state, batch))
    for kernel in ("attend", "index_sums", "index_key_gradient"):
        assert (f"name={kernel}" in program) == (kernels != "xla")
    outputs = None if mesh is None else (state_shardings(config, mesh), None)
    step = quick_jit(step, out_shardings=outputs)
    values = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    return np.array(values)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    values = losses("xla")
    assert values[-1] < values[0]
    return values


@pytest.mark.heavy
@pytest.mark.parametrize("kernels", ("gpu", "tpu"))
def test_the_loss_of_20_steps_agrees_with_all_kernels(plain, kernels):
    np.testing.assert_allclose(losses(kernels), plain, rtol=ROUNDING)


@pytest.mark.heavy
@pytest.mark.parametrize("kernels", ("xla", "gpu", "tpu"))
def test_the_loss_of_20_steps_agrees_on_a_mesh(plain, kernels):
    """Devices share rows, experts, heads and weights; each runs the kernels on what it has."""
    np.testing.assert_allclose(losses(kernels, mesh_of(1, 1, 2, 2)), plain, rtol=ROUNDING)
