"""What is read of programs that are compiled for devices that are not here is what they should do.

The numbers follow from the shapes of the programs below.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import described
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_jax.devices import chip_of
from dsv4_jax.hlo.collectives import collectives
from dsv4_jax.hlo.loops import unknown_loops
from dsv4_jax.hlo.overlap import compute_seconds, overlap
from dsv4_jax.hlo.text import Program, parse_program
from pallas_kernels import aot

pytestmark = pytest.mark.aot

TARGETS = ("v5p:2x2x2", "h100:1x1x8")
N = 8  # devices of each
LAYERS, ROWS, WIDTH, INNER = 6, 2048, 4096, 8192
# Forward, and backward two; two matrices; of a device.
LAYER_FLOPS = LAYERS * 3 * 2 * (2 * ROWS * WIDTH * INNER)
SHARD = 2 * WIDTH * INNER // N  # bytes of a matrix on a device

# Options of the TPU compiler. Without the first it replaces gathering by steps of a ring.
WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
FUSED = WHOLE | {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_enable_async_all_gather": "true",
}
OFFLOADED = WHOLE | {"xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true"}
ALL_TO_ALL = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}


@pytest.fixture(scope="module", autouse=True)
def no_dumps():
    """Remove what the TPU compiler leaves behind of programs: hundreds of megabytes."""
    yield
    for path in aot._tpu_dumps().iterdir():
        path.unlink()


@functools.cache
def mesh_of(target: str) -> Mesh:
    return Mesh(np.array(described(target)), ("x",))


def compiled(target: str, function, *arguments, options=None) -> Program:
    """Return a function compiled and read.

    Args:
      arguments: shape, type and partition of each.
    """
    mesh = mesh_of(target)
    shaped = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    platform = "cuda" if target.startswith("h100") else "tpu"
    lowered = jax.jit(function).trace(*shaped).lower(lowering_platforms=(platform,))
    program = parse_program(lowered.compile(compiler_options=options).as_text())
    assert not unknown_loops(program)
    return program


def mapped(target: str, function, specs, out):
    return jax.shard_map(
        function, mesh=mesh_of(target), in_specs=specs, out_specs=out, check_vma=False
    )


def sent(program: Program, per_slice: int = N) -> dict[str, float]:
    """Return the bytes that a device sends, by kind; few are the compiler's own affair."""
    totals = {}
    for x in collectives(program, per_slice):
        totals[x.kind] = totals.get(x.kind, 0.0) + x.bytes
    return {kind: total for kind, total in totals.items() if total > 1e6}


def flops_of(program: Program, target: str) -> float:
    """Return the operations of all matrix products: the time with a memory that takes none."""
    chip = chip_of(mesh_of(target).devices[0].device_kind)._replace(memory_speed=math.inf)
    return compute_seconds(program, chip) * chip.flops


def hidden_shares(program: Program, target: str, **chosen) -> dict[str, float]:
    chip = chip_of(mesh_of(target).devices[0].device_kind)
    found = overlap(program, chip, devices_per_slice=N, **chosen)
    return {kind: x.hidden_share for kind, x in found.items()}


def layers(x, w, whole):
    """Return a loss of layers, each of two matrices that are split over the devices."""

    def layer(x, w):
        first, second = map(whole, w)
        return x + jax.nn.silu(x @ first) @ second, None

    x, _ = jax.lax.scan(layer, x, w)
    return (x.astype(jnp.float32) ** 2).sum()


MATRICES = P(None, "x")
LAYER_ARGUMENTS = (
    ((ROWS * N, WIDTH), jnp.bfloat16, P("x")),
    ((LAYERS, WIDTH, INNER), jnp.bfloat16, MATRICES),
    ((LAYERS, INNER, WIDTH), jnp.bfloat16, MATRICES),
)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_gathered_and_their_gradients_scattered(target):
    """By hand. For few devices, libtpu makes an all-reduce, twice the bytes, of a scattering."""

    def gradients(x, *w):
        whole = functools.partial(jax.lax.all_gather, axis_name="x", axis=0, tiled=True)
        return jax.grad(lambda w: layers(x, w, whole))(w)

    specs = (P("x"), MATRICES, MATRICES)
    found = compiled(target, mapped(target, gradients, specs, specs[1:]), *LAYER_ARGUMENTS)
    kinds = sent(found)
    gathered = 2 * LAYERS * (N - 1) * SHARD
    assert kinds["all-gather"] == gathered
    assert kinds.get("reduce-scatter", 0) + kinds.get("all-reduce", 0) / 2 == gathered
    assert flops_of(found, target) == pytest.approx(LAYER_FLOPS, rel=1e-12)


def sharded_layers(target: str, options=None) -> Program:
    """Return gradients of layers in which the compiler puts the collectives."""
    rows = NamedSharding(mesh_of(target), P("x"))

    def gradients(x, *w):
        def loss(w):
            x_rows = functools.partial(jax.lax.with_sharding_constraint, shardings=rows)
            return layers(x_rows(x), w, lambda part: part)

        return jax.grad(loss)(w)

    return compiled(target, gradients, *LAYER_ARGUMENTS, options=options)


def test_by_default_the_tpu_compiler_makes_rings_of_products():
    """Windowed products: each device hands its part on while it multiplies with another's."""
    found = sharded_layers("v5p:2x2x2")
    assert "all-gather" not in sent(found)
    assert hidden_shares(found, "v5p:2x2x2")["collective-permute"] > 0.8
    assert flops_of(found, "v5p:2x2x2") == pytest.approx(LAYER_FLOPS, rel=1e-12)


@pytest.mark.parametrize("options, kind, hidden", [
    (WHOLE, "all-gather", (0, 0)),
    (FUSED, "all-gather", (0.4, 0.99)),
    (OFFLOADED, "all-reduce", (0.4, 1)),
])
def test_options_of_the_tpu_compiler(options, kind, hidden):
    found = sharded_layers("v5p:2x2x2", options)
    least, most = hidden
    assert least <= hidden_shares(found, "v5p:2x2x2")[kind] <= most
    # Forward and backward pass each gather both matrices, but the first needs no gradient of x.
    assert sent(found)["all-gather"] == 4 * LAYERS * (N - 1) * SHARD
    assert flops_of(found, "v5p:2x2x2") == pytest.approx(LAYER_FLOPS, rel=1e-12)


def test_gpus_gather_while_they_multiply():
    found = sharded_layers("h100:1x1x8")
    assert 0.2 < hidden_shares(found, "h100:1x1x8")["all-gather"] < 1
    assert sent(found)["all-gather"] == 4 * LAYERS * (N - 1) * SHARD
    assert flops_of(found, "h100:1x1x8") == pytest.approx(LAYER_FLOPS, rel=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_a_ring(target):
    def ring(x, w):
        def step(carry, _):
            x, total = carry
            following = jax.lax.ppermute(x, "x", [(i, (i + 1) % N) for i in range(N)])
            return (following, total + x @ w), None

        total = jnp.zeros((ROWS, INNER), x.dtype)
        return jax.lax.scan(step, (x, total), None, length=N)[0][1]

    found = compiled(
        target,
        mapped(target, ring, (P("x"), P()), P("x")),
        ((ROWS * N, WIDTH), jnp.bfloat16, P("x")),
        ((WIDTH, INNER), jnp.bfloat16, P()),
    )
    assert sent(found) == {"collective-permute": N * ROWS * WIDTH * 2}
    assert flops_of(found, target) == pytest.approx(N * 2 * ROWS * WIDTH * INNER, rel=1e-12)
    assert hidden_shares(found, target)["collective-permute"] == pytest.approx(1)


@pytest.mark.parametrize("target, options", [
    ("v5p:2x2x2", None), ("v5p:2x2x2", ALL_TO_ALL), ("h100:1x1x8", None),
])
def test_rows_for_experts(target, options):
    """Two waves of rows, each sent to the experts and back."""

    def wave(x, sizes, w):
        ends = jnp.cumsum(sizes)
        arrived = jax.lax.all_to_all(sizes, "x", 0, 0, tiled=True)
        places = jnp.cumsum(arrived) - arrived
        theirs = jax.lax.all_to_all(places, "x", 0, 0, tiled=True)
        with jax.named_scope("experts"):
            buffer = jnp.zeros((2 * len(x), WIDTH), x.dtype)
            rows = jax.lax.ragged_all_to_all(
                x, buffer, ends - sizes, sizes, theirs, arrived, axis_name="x"
            )
        return rows @ w

    def waves(x, sizes, w):
        return [wave(x[: ROWS // 2], sizes[0], w), wave(x[ROWS // 2 :], sizes[1], w)]

    found = compiled(
        target,
        mapped(target, waves, (P("x"), P(None, "x"), P()), [P("x")] * 2),
        ((ROWS * N, WIDTH), jnp.bfloat16, P("x")),
        ((2, N * N), jnp.int32, P(None, "x")),
        ((WIDTH, INNER), jnp.bfloat16, P()),
        options=options,
    )
    assert sent(found) == {"ragged-all-to-all": ROWS * WIDTH * 2}
    if target.startswith("v5p"):  # the GPU compiler forgets where these come from
        chosen = hidden_shares(found, target, chosen=lambda x: "/experts/" in x.op_name)
        assert set(chosen) == {"ragged-all-to-all"}
        assert (chosen["ragged-all-to-all"] > 0.3) == (options is not None)


def test_several_slices():
    """A device sends its part to the other slice, then both parts within its own."""
    target = "v6e:2x2*2"
    gather = functools.partial(jax.lax.all_gather, axis_name="x", axis=0, tiled=True)
    found = compiled(
        target, mapped(target, gather, P("x"), P()), ((ROWS * N, WIDTH), jnp.bfloat16, P("x"))
    )
    part = ROWS * WIDTH * 2
    assert found.devices == 4  # libtpu compiles for one slice, and has hosts send to the other
    large = [x for x in collectives(found, 4) if x.bytes > 1e6]
    assert sum(x.bytes for x in large) == 7 * part
    assert sum(x.slow * x.times for x in large) == part


def test_a_kernel_s_estimate_is_its_cost():
    target, flops = "v5p:2x2x2", 7 * 10**12

    def double(x):
        def kernel(x, out):
            out[...] = 2 * x[...]

        estimate = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=10)
        return pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate
        )(x)

    found = compiled(
        target, mapped(target, double, P(), P()), ((256, 256), jnp.float32, P())
    )
    assert flops_of(found, target) == pytest.approx(flops)


def test_groups_in_all_spellings_are_those_of_the_mesh():
    """A sum over one axis of a mesh of two, whichever way the compiler writes its groups."""
    mesh = Mesh(mesh_of("v5p:2x2x2").devices.reshape(2, 4), ("a", "b"))
    x = jax.ShapeDtypeStruct((8, 2**20), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    for axis, size in (("a", 2), ("b", 4)):
        total = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=axis),
            mesh=mesh, in_specs=P("a", "b"), out_specs=P(*(n for n in "ab" if n != axis)),
            check_vma=False,
        )
        lowered = jax.jit(total).trace(x).lower(lowering_platforms=("tpu",))
        (found,) = collectives(parse_program(lowered.compile().as_text()), devices_per_slice=4)
        assert found.kind == "all-reduce" and found.group == size
        assert found.crosses == (axis == "a")
        assert found.sent == 2 * (size - 1) / size * 8 * 2**20 * 4 / N
