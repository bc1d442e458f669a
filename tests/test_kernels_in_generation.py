"""A model that reads its cache by kernels is the model without."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax.linen import meta
from test_kernels_in_model import CONFIG as CONFIG_OF_TRAINING
from test_kernels_in_model import ROUNDING

from dsv4_jax import Runtime, Transformer, generate, init_params, param_shapes
from dsv4_jax.cache import init_cache

CONFIG = dataclasses.replace(CONFIG_OF_TRAINING, index_head_dim=32)  # a group of scales
ROWS, LENGTH = 2, 64
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
# Calls: many tokens, one, a few, many; rows at their own pace.
CALLS = [
    (30, (30, 17)), *[(1, (1, 1))] * 4, (3, (3, 1)), (3, (0, 2)), (3, (3, 3)), (18, (18, 9)),
    (1, (1, 0)),
]
FEW = "cached_attention",
MANY = "sparse_attention", "compressor"


@functools.cache
def logits_of(kernels: str, form: str, *others) -> np.ndarray:
    """Read rows in calls; return the logits of all tokens that were read."""
    runtime = Runtime(kernels=kernels, cache=form, **dict(others))
    params = {"params": init_params(CONFIG, jax.random.key(0))}
    model = Transformer(CONFIG, runtime)

    @quick_jit
    def read(tokens, count, state):
        features, state = model.apply(params, tokens, count, state, method="extend")
        return features.logits, state

    state, done = init_cache(CONFIG, runtime, rows=ROWS, max_length=LENGTH), np.zeros(ROWS, int)
    found = []
    for width, count in CALLS:
        part = np.zeros((ROWS, width), np.int32)
        for row, n in enumerate(count):
            part[row, :n] = TOKENS[row, done[row] : done[row] + n]
        logits, state = read(part, jnp.asarray(count, jnp.int32), state)
        found += [np.asarray(logits[row, :n]) for row, n in enumerate(count)]
        done += count
    return np.concatenate(found)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
@pytest.mark.parametrize(
    "operations", (FEW, MANY, ("indexer",), (*FEW, *MANY, "indexer")), ids="+".join
)
@pytest.mark.parametrize("options", (
    ("served", ("indexer", "fp4"), ("keys", "fp8")), ("float32", ("csa", "dense")),
    ("float32", ("batch_invariant", True)),
), ids=str)
def test_logits_are_those_of_plain_jax(options, operations, kernel):
    wanted = logits_of("xla", *options)
    found = logits_of(",".join(("xla", *(f"{x}={kernel}" for x in operations))), *options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
def test_generated_tokens_are_those_of_plain_jax(kernel):
    params = init_params(CONFIG, jax.random.key(0))
    prompts = [TOKENS[0, :21], TOKENS[1, :3]]
    texts = [
        generate(
            CONFIG, params, prompts, max_new_tokens=12, temperature=0.0,
            runtime=Runtime(kernels=kernels, batch_invariant=True),
        ).tokens
        for kernels in ("xla", f"xla,cached_attention={kernel}")
    ]
    assert [t.tolist() for t in texts[0]] == [t.tolist() for t in texts[1]]


def test_kernels_read_the_cache_for_few_tokens_and_for_many():
    params = {"params": meta.unbox(param_shapes(CONFIG))}

    def kernels_of(tokens: int, kernels: str, name: str = "attend_cached") -> int:
        runtime = Runtime(kernels=kernels, cache="served")
        state = jax.eval_shape(
            lambda: init_cache(CONFIG, runtime, rows=ROWS, max_length=LENGTH)
        )
        model = Transformer(CONFIG, runtime)
        program = jax.make_jaxpr(
            lambda p, tokens, count, state: model.apply(p, tokens, count, state, method="extend")
        )
        shapes = (ROWS, tokens), (ROWS,)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
        return str(program(params, *arrays, state)).count(f"name={name}\n")

    assert kernels_of(1, "xla,cached_attention=gpu") == 3
    assert kernels_of(8, "xla,cached_attention=tpu") == 3
    assert kernels_of(9, "xla,cached_attention=gpu") == 0
    assert kernels_of(1, "xla") == 0
    assert kernels_of(16, "xla,indexer=gpu", "select_stored") == 1
    assert kernels_of(17, "xla,indexer=gpu", "select_stored") == 0
    assert kernels_of(9, "xla,sparse_attention=gpu", "attend") == 3
    assert kernels_of(8, "xla,sparse_attention=gpu", "attend") == 0
    assert kernels_of(17, "tpu", "select_entries") == 1
    assert kernels_of(9, "xla,compressor=tpu", "compress") == 3  # two of CSA
