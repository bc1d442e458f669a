"""The kernels of hyper-connections, interpreted, against the plain computation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax import linen as nn

from dsv4_jax import ModelConfig, Runtime
from dsv4_jax.config import LEARNED, WINDOW
from dsv4_jax.mhc import StreamMix, collapse, expand
from pallas_kernels.mhc import (
    claims,
    gpu_backward,
    read_streams,
    reference,
    tpu,
    write_and_read,
    write_streams,
)
from pallas_kernels.mhc.index import Blocks, Groups

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
GATING = {"rms_eps": 1e-6, "hc_eps": 1e-6, "iterations": 20}
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-7  # of the largest value: a result rounded to either side of a border

# A batch and length that fill no block, a block and a little more, a single token; a width that
# fills no register, one that takes two pieces.
SHAPES = [(2, 5, 2, 40), (1, 17, 4, 384), (1, 1, 3, 64)]


def problem(shape, dtype="float32"):
    """Return the streams, what is written to them and the weights of what is read."""
    b, t, n, d = shape
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    comb = jax.nn.softmax(normal(n, n, b, t), axis=1)
    written = normal(b, t, d).astype(dtype), 2 * jax.nn.sigmoid(normal(n, b, t)), comb
    gates = 2 * n + n * n
    # Large logits: matrices that are far from balanced, which rounding would show in.
    mixing = normal(d, n, gates, scale=(n * d) ** -0.5), normal(3, scale=2.0), normal(gates)
    return normal(b, t, n, d).astype(dtype), written, mixing


def operation(name, streams, written, mixing, implementation):
    """Return a function of arrays, and these."""
    options = {"implementation": implementation}
    if name == "write":
        return lambda *a: (write_streams(*a, **options),), (streams, *written)
    if name == "read":
        return lambda *a: read_streams(*a, **GATING, **options), (streams, *mixing)
    return lambda *a: write_and_read(*a, **GATING, **options), (streams, *written, *mixing)


def results(name, arrays, implementation):
    """Return an operation's results and gradients, for fixed gradients of the results."""
    function, arguments = operation(name, *arrays, implementation)

    @quick_jit
    def run(arguments):
        done, gradient = jax.vjp(function, *arguments)
        keys = jax.random.split(jax.random.key(1), len(done))
        grads = [
            jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
            for key, x in zip(keys, done, strict=True)
        ]
        return done, gradient(tuple(grads))

    return run(arguments)


def error(actual, wanted):
    """Return the largest difference of two arrays, of the largest value."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    return np.abs(actual - wanted).max() / np.abs(wanted).max()


@pytest.fixture(autouse=True)
def few_tokens_at_a_time(monkeypatch):
    """Let a few tokens fill several blocks and groups, which are interpreted faster, too."""
    monkeypatch.setattr(tpu, "MOST_TOKENS", 16)
    monkeypatch.setattr(gpu_backward, "STREAM", gpu_backward.STREAM._replace(fewest=1, groups=2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ("read", "write", "write and read"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_and_their_gradients_are_those_of_the_reference(shape, name, kernel):
    arrays = problem(shape)
    actual, wanted = results(name, arrays, kernel), results(name, arrays, "xla")
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == w.dtype
        assert error(a, w) <= ROUNDING


@pytest.mark.parametrize("kernel", KERNELS)
def test_streams_in_bfloat16_lose_nothing_but_by_storage(kernel):
    """The gates and the gradients of their weights are those of float32."""
    arrays = problem((1, 17, 4, 384), "bfloat16")
    streams, (y, *gates), mixing = arrays
    (new, u, *next_gates), grads = results("write and read", arrays, kernel)
    assert new.dtype == u.dtype == grads[0].dtype == grads[1].dtype == jnp.bfloat16
    assert error(new, reference.write_streams(streams, y, *gates)) <= BFLOAT16
    read, *wanted = reference.read_streams(new.astype(jnp.float32), *mixing, **GATING)
    assert error(u, read) <= BFLOAT16
    for actual, gate in zip(next_gates, wanted, strict=True):
        assert error(actual, gate) <= ROUNDING
    for actual, gradient in zip(grads, results("write and read", arrays, "xla")[1], strict=True):
        assert error(actual, gradient) <= BFLOAT16
    weights, others = (results("read", arrays, which)[1][1:] for which in (kernel, "xla"))
    for actual, gradient in zip(weights, others, strict=True):
        assert error(actual, gradient) <= ROUNDING


class TwoSublayers(nn.Module):
    """Write to the streams and read from them, as layers of the model do."""

    config: ModelConfig

    @nn.compact
    def __call__(self, streams, y, post, comb):
        streams = expand(streams, y, post, comb)
        pre, post, comb = StreamMix(self.config, Runtime(), 1).gates(streams)
        return streams, collapse(streams, pre), post, comb


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_kernels_are_the_hyper_connections_of_the_model(kernel):
    streams, written, _ = problem((2, 5, 2, 24))
    n, d = streams.shape[2:]
    config = ModelConfig(
        vocab_size=4, hidden_size=d, layer_types=(WINDOW,), moe_types=(LEARNED,),
        num_attention_heads=8, hc_mult=n, hc_sinkhorn_iters=GATING["iterations"],
        hc_eps=GATING["hc_eps"], rms_norm_eps=GATING["rms_eps"],
    )  # fmt: skip
    model = TwoSublayers(config)
    params = nn.meta.unbox(model.init(jax.random.key(0), streams, *written))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    params = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape) / 4, params)

    def own(params, streams, *written):
        (mix,) = params["params"].values()
        fn = [mix[name].reshape(d, n, -1) for name in ("fn_pre", "fn_post", "fn_comb")]
        base = [mix[name].reshape(-1) for name in ("base_pre", "base_post", "base_comb")]
        return write_and_read(
            streams, *written, jnp.concatenate(fn, axis=-1), mix["scale"], jnp.concatenate(base),
            **GATING, implementation=kernel,
        )

    def run(function):
        done, gradient = jax.vjp(function, params, streams, *written)
        grads = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in done]
        return done, gradient(tuple(grads))

    actual, wanted = (quick_jit(lambda function=f: run(function))() for f in (own, model.apply))
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert error(a, w) <= ROUNDING


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_streams_side_by_side_are_the_same(kernel):
    streams, written, mixing = problem((1, 3, 2, 24))
    options = {**GATING, "implementation": kernel}
    wanted = write_and_read(streams, *written, *mixing, **options)
    flat = streams.reshape(1, 3, -1)
    new, *read = write_and_read(flat, *written, *mixing, **options)
    assert new.shape == flat.shape
    np.testing.assert_array_equal(new.reshape(streams.shape), wanted[0])
    for actual, other in zip(read, wanted[1:], strict=True):
        np.testing.assert_array_equal(actual, other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_kernels_cannot_do_is_refused(kernel):
    (streams, written, mixing), five = problem((1, 3, 2, 8)), problem((1, 1, 5, 8))
    options = {**GATING, "implementation": kernel}
    with pytest.raises(ValueError, match="streams in bfloat16 or float32, got float16"):
        write_streams(streams.astype("float16"), *written, implementation=kernel)
    with pytest.raises(ValueError, match="2 streams of width 8, got 2 of width 7"):
        read_streams(streams[..., :7], *mixing, **options)
    with pytest.raises(ValueError, match=r"scale of shape \(3,\), got \(2,\)"):
        read_streams(streams, mixing[0], mixing[1][:2], mixing[2], **options)
    with pytest.raises(ValueError, match="1 to 4 streams, got 5"):
        read_streams(five[0], *five[2], **options)
    with pytest.raises(ValueError, match="iterations of 1 or more, got 0"):
        read_streams(streams, *mixing, **{**options, "iterations": 0})


class LongLastGroup(Groups):
    """Groups the last of which is as long as the others."""

    def length(self, group):
        return self.per_group


class OneBlockOff(Blocks):
    """Blocks that are taken backwards from one past the last."""

    def reversed(self, block):
        return lambda i, j: block(self.tokens - i, j)


@pytest.mark.parametrize(
    "kinds, statement",
    [({"groups": LongLastGroup}, "a tile is one of those there are"),
     ({"blocks": OneBlockOff}, "a block begins among the tokens and columns, last first")],
    ids=("groups", "blocks"),
)  # fmt: skip
def test_an_index_function_that_is_one_off_is_refuted(kinds, statement):
    refuted = {
        verdict.statement
        for proof in claims.proofs(**kinds) for verdict in proof.verdicts() if not verdict.proved
    }
    assert statement in refuted
