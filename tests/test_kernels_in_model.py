"""A model with kernels is the model without: logits, lessons, gradients of every parameter."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax.linen import meta
from test_implementation import Described

from dsv4_jax import Transformer, init_params, param_shapes
from dsv4_jax.config import ModelConfig, Runtime
from pallas_kernels.mhc import WORTHWHILE
from pallas_kernels.target import compiling_for

ROUNDING = 1e-5  # of the largest value: float32 sums in another order
# Of the largest gradient of all: the gates of equal streams have a gradient of 0 but for rounding.
NOTHING = 1e-8
FP8_STEP = 2.0**-8  # of the largest value: a few of many entries' numbers one step of FP8 apart

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, layer_types=("window", "csa", "hca"),
    moe_types=("hash", "learned", "learned"), num_attention_heads=4, head_dim=64,
    qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, csa_ratio=4,
    hca_ratio=8, index_n_heads=16, index_head_dim=16, index_topk=4, yarn_original_positions=16,
    max_position_embeddings=256, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, hc_mult=2, hc_sinkhorn_iters=3, num_nextn_predict_layers=0,
)  # fmt: skip
# Pairs of layers from the first on, so that the scan starts with nothing to be written.
PAIRS = dataclasses.replace(
    CONFIG, layer_types=("hca", "window") * 2, moe_types=("learned",) * 4,
    num_nextn_predict_layers=1,
)  # fmt: skip
CONFIGS = {"layers": CONFIG, "pairs": PAIRS}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 32)).astype(np.int32)
SEGMENTS = np.array([[1] * 19 + [2] * 13, [1] * 5 + [2] * 24 + [0] * 3], np.int32)


@functools.cache
def outcome(kernels: str, config: str = "layers", **runtime):
    """Return logits, what learning indexers are told, and gradients by name."""
    params = init_params(CONFIGS[config], jax.random.key(0))
    model = Transformer(CONFIGS[config], Runtime(kernels=kernels, **runtime))

    def run(params):
        features = model.apply({"params": params}, TOKENS, SEGMENTS, method="features")
        logits = [x for x in (features.logits, features.mtp_logits) if x is not None]
        logits = jnp.where(SEGMENTS[..., None] > 0, jnp.stack(logits), 0)
        lessons = [x.lesson for x in features.layers.values() if x.lesson is not None]
        learned = sum(jnp.sum(lesson.divergence) for lesson in lessons)
        return jnp.sum(jnp.sin(logits)) + learned, (logits, lessons)

    (_, (logits, lessons)), gradients = quick_jit(
        jax.value_and_grad(run, has_aux=True, allow_int=True)
    )(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    floats = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves
              if jnp.issubdtype(x.dtype, jnp.floating)}
    return np.asarray(logits), lessons, floats


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
@pytest.mark.parametrize(
    "kernels, csa, learns",
    [
        ("sparse_attention", "sparse", False), ("sparse_attention", "dense", False),
        ("sparse_attention,index_loss", "sparse", True),
        ("sparse_attention,index_loss,indexer", "sparse", True),
        ("sparse_attention,index_loss,indexer", "dense", True),
        ("sparse_attention,indexer", "sparse", False),
        ("moe", "sparse", False), ("compressor", "sparse", False),
    ],
)
def test_logits_lessons_and_gradients_are_those_of_plain_jax(kernels, csa, learns, kernel):
    assert_same(kernels, kernel, csa=csa, index_learns=learns)


@pytest.mark.heavy
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
def test_hyper_connections_are_those_of_plain_jax(kernel, config):
    """Across layers, in a scan of recomputed ones and in the prediction."""
    assert_same("mhc", kernel, config, remat=config == "pairs")


def assert_same(operations: str, kernel: str, config: str = "layers", **runtime) -> None:
    """Compare logits, lessons and gradients of all parameters with those of plain JAX."""
    chosen = ",".join(["xla", *(f"{name}={kernel}" for name in operations.split(","))])
    logits, lessons, gradients = outcome(chosen, config, **runtime)
    wanted, wanted_lessons, wanted_gradients = outcome("xla", config, **runtime)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())
    assert len(lessons) == len(wanted_lessons) == runtime.get("index_learns", False)
    for lesson, value in zip(lessons, wanted_lessons, strict=True):
        np.testing.assert_allclose(lesson, value, rtol=ROUNDING)
        assert (np.sum(value.choices) > 0) == (runtime["csa"] == "dense")  # recall counts
        assert np.sum(value.divergence) > 0
    largest = max(np.abs(x).max() for x in wanted_gradients.values())
    for name, value in wanted_gradients.items():
        limit = ROUNDING * np.abs(value).max() + NOTHING * largest
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=limit, err_msg=name)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
def test_scores_that_are_rounded_as_served_choose_the_same_entries(kernel):
    kernels = f"xla,sparse_attention={kernel},indexer={kernel}"
    logits, *_ = outcome(kernels, indexer="fp4")
    wanted, *_ = outcome("xla", indexer="fp4")
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@pytest.mark.heavy
@pytest.mark.parametrize("compressor", ("gpu", "tpu"))
def test_entries_are_rounded_as_served(compressor):
    logits, _, gradients = outcome(f"xla,compressor={compressor}", csa="dense", keys="fp8")
    wanted, _, wanted_gradients = outcome("xla", csa="dense", keys="fp8")
    # A value within ROUNDING of the middle between two codes may go either way.
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=FP8_STEP * np.abs(wanted).max())
    for name, value in wanted_gradients.items():
        largest = max(np.abs(x).max() for x in wanted_gradients.values())
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=FP8_STEP * largest)


def test_kernels_run_where_they_are_asked_for():
    def primitives(**runtime):
        model = Transformer(CONFIG, Runtime(csa="sparse", **runtime))
        program = jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS, SEGMENTS))
        return str(program(meta.unbox(param_shapes(CONFIG))))

    assert "pallas_call" not in primitives(kernels="xla")
    assert primitives(kernels="xla,sparse_attention=gpu").count("name=attend") == 3
    assert primitives(kernels="xla,compressor=tpu").count("name=compress") == 3  # two of CSA
    assert primitives(kernels="gpu").count("name=select_entries") == 1
    assert primitives(kernels="tpu").count("name=expert_output") == 3
    learning = primitives(kernels="xla,sparse_attention=gpu,index_loss=gpu", index_learns=True)
    assert learning.count("name=attend") == 3 and learning.count("name=index_sums") == 1
    # Without a kernel for what is learned, plain JAX does the attention, too.
    plain = primitives(kernels="xla,sparse_attention=gpu", index_learns=True)
    assert plain.count("name=attend") == 2 and "name=index_sums" not in plain


def test_sublayers_write_for_each_other_in_one_kernel():
    """The first one reads; the last write is the model's own."""
    config = dataclasses.replace(
        CONFIG, layer_types=("window", *PAIRS.layer_types), moe_types=("learned",) * 5
    )
    program = stream_program(config, "xla,mhc=tpu", tokens=32)
    calls = [program.count(f"name=streams_{name}\n") for name in ("read", "writeread", "write")]
    # A layer before the scan, whose body has two.
    assert calls == [1, 1 + 4, 1]


@pytest.mark.parametrize("tokens, invariant, taken", [
    (WORTHWHILE, False, True), (WORTHWHILE - 8, False, False), (WORTHWHILE, True, False),
])
def test_few_tokens_have_no_kernel_of_hyper_connections(tokens, invariant, taken):
    """Nor have tokens whose bits must not depend on how many there are."""
    config = dataclasses.replace(CONFIG, hidden_size=128)
    with compiling_for(Described("gpu", "NVIDIA H100 80GB HBM3")):
        program = stream_program(
            config, "xla,mhc=auto", tokens, dtype="bfloat16", batch_invariant=invariant
        )
    assert ("name=streams" in program) == taken


def stream_program(config: ModelConfig, kernels: str, tokens: int, **runtime) -> str:
    model = Transformer(config, Runtime(kernels=kernels, **runtime))
    return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, np.zeros((1, tokens), int)))(
        meta.unbox(param_shapes(config))
    ))
