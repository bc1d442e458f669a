"""A model that reads its cache by kernels is the model without."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax.linen import meta
from test_implementation import Described
from test_kernels_in_model import CONFIG as CONFIG_OF_TRAINING
from test_kernels_in_model import ROUNDING

from dsv4_jax import Runtime, Transformer, generate, init_params, param_shapes
from dsv4_jax.attention.cached_by_kernel import attend_by_kernel
from dsv4_jax.attention.core import Earlier, attend_window
from dsv4_jax.cache import LayerCache, StackedCache, init_cache, ring_positions
from pallas_kernels.target import compiling_for

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


SPARSE = (
    ("served", ("indexer", "fp4"), ("keys", "fp8")), ("float32", ("batch_invariant", True)),
)
DENSE = "float32", ("csa", "dense")


def named(operations: tuple[str, ...], kernel: str) -> str:
    return ",".join(("xla", *(f"{name}={kernel}" for name in operations)))


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
@pytest.mark.parametrize("operations, options", [
    *itertools.product((FEW, MANY, ("indexer",), (*FEW, *MANY, "indexer")), SPARSE),
    *itertools.product((FEW, MANY), (DENSE,)),
    *itertools.product((("indexer",),), (("float32",), ("served",))),
], ids=str)
def test_logits_are_those_of_plain_jax(operations, options, kernel):
    wanted = logits_of("xla", *options)
    found = logits_of(named(operations, kernel), *options)
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
        for kernels in ("xla", named((*FEW, *MANY, "indexer"), kernel))
    ]
    assert [t.tolist() for t in texts[0]] == [t.tolist() for t in texts[1]]


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
def test_padding_past_the_end_of_a_full_cache_changes_nothing(kernel):
    """Of 64 tokens 24 fill a cache of 1,024 up; the others' blocks would have no place in it."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=2048)
    params = {"params": init_params(config, jax.random.key(0))}
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 1024))

    def logits_at_end(kernels: str) -> np.ndarray:
        runtime = Runtime(kernels=kernels)
        read = quick_jit(functools.partial(Transformer(config, runtime).apply, method="extend"))
        state = init_cache(config, runtime, rows=1, max_length=1024)
        for first, count in ((0, 500), (500, 500), (1000, 24)):
            width = 64 if count == 24 else count
            part = np.pad(tokens[:, first : first + count], ((0, 0), (0, width - count)))
            features, state = read(params, part, jnp.full(1, count), state)
        return np.asarray(features.logits[:, :24])

    wanted, found = (logits_at_end(x) for x in ("xla", named((*MANY, "indexer"), kernel)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ("gpu", "tpu"))
def test_no_query_sees_a_position_below_0(kernel):
    """A draft's row begins there: the slot of position -1 has some other key."""
    rng, window = np.random.default_rng(0), CONFIG.sliding_window
    (ring, kv), q = (
        jnp.asarray(rng.standard_normal((2, t, CONFIG.head_dim)), jnp.float32) for t in (window, 20)
    ), jnp.asarray(rng.standard_normal((2, 20, 4, CONFIG.head_dim)), jnp.float32)
    start, sink = jnp.asarray([-1, 11]), jnp.zeros(4)
    earlier = Earlier(ring, ring_positions(start, window), start)
    cache = StackedCache(LayerCache(ring[None], None, None), jnp.int32(0))
    attend = attend_by_kernel(
        q, kv, kv, sink, earlier, cache, config=CONFIG,
        runtime=Runtime(kernels=named(MANY, kernel)),
    )
    wanted = attend_window(q, kv, sink, window=window, earlier=earlier)
    # The first token of the row that begins below 0 is none.
    for row, first in ((0, 1), (1, 0)):
        np.testing.assert_allclose(attend()[row, first:], wanted[row, first:], rtol=0, atol=1e-5)


def kernels_of(tokens: int, kernels: str, name: str = "attend_cached", **others) -> int:
    """Count a kernel's calls in the program that reads so many tokens into a cache."""
    return program_of(tokens, kernels, **others).count(f"name={name}\n")


def program_of(tokens: int, kernels: str, *, config=CONFIG, **others) -> str:
    runtime = Runtime(kernels=kernels, cache="served", **others)
    state = jax.eval_shape(lambda: init_cache(config, runtime, rows=ROWS, max_length=LENGTH))
    model = Transformer(config, runtime)
    program = jax.make_jaxpr(
        lambda p, tokens, count, state: model.apply(p, tokens, count, state, method="extend")
    )
    shapes = (ROWS, tokens), (ROWS,)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    params = {"params": meta.unbox(param_shapes(config))}
    return str(program(params, *arrays, state))


@pytest.mark.parametrize("device", (
    Described("gpu", "NVIDIA H100 80GB HBM3"), Described("tpu", "TPU v5"),
), ids=lambda device: device.platform)
def test_where_bits_must_not_depend_on_the_batch_neither_does_the_choice_of_kernels(device):
    """How many tokens are read at once depends on the longest prompt."""
    with compiling_for(device):
        compressors = [
            [kernels_of(tokens, "auto", "compress", dtype="bfloat16", batch_invariant=invariant)
             for tokens in (16, 128)]
            for invariant in (True, False)
        ]
    assert compressors == [[0, 0], [0, 3]]


@pytest.mark.parametrize("topk, invariant, kernels", [
    (2, False, 2), (16, False, 3), (2, True, 2), (4, True, 3),
])
def test_a_tpu_masks_few_entries_alone(topk, invariant, kernels):
    """A cache has room for 256 entries, the longest row for 64: in vain are those not chosen."""
    config = dataclasses.replace(CONFIG, index_topk=topk)
    with compiling_for(Described("tpu", "TPU v5")):
        options = dict(config=config, dtype="bfloat16", batch_invariant=invariant)
        assert kernels_of(64, "auto", "attend", **options) == kernels


def test_kernels_read_the_cache_for_few_tokens_and_for_many():
    assert kernels_of(1, "xla,cached_attention=gpu") == 3
    assert kernels_of(8, "xla,cached_attention=tpu") == 3
    assert kernels_of(9, "xla,cached_attention=gpu") == 0
    assert kernels_of(1, "xla") == 0
    assert kernels_of(1, "xla,indexer=gpu", "select_stored") == 1
    assert kernels_of(16, "xla,indexer=gpu", "select_stored") == 1
    assert "pallas_call" not in program_of(1, "xla") + program_of(17, "xla,indexer=gpu")
    assert kernels_of(9, "xla,sparse_attention=gpu", "attend") == 3
    assert kernels_of(8, "xla,sparse_attention=gpu", "attend") == 0
    assert kernels_of(17, "tpu", "select_entries") == 1
    assert kernels_of(9, "xla,compressor=tpu", "compress") == 3  # two of CSA
