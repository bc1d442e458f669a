"""Matrices split over devices are orthogonalised as whole ones are, each by one device."""

from __future__ import annotations

import functools
import math
import re

import jax
import numpy as np
import pytest
from compiling import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from on_mesh import mesh_of

from dsv4_jax.muon_shards import (
    Form,
    assign,
    cut_parts,
    directions,
    join_parts,
    newton_schulz_flops,
)
from dsv4_jax.newton_schulz import as_matrices, orthogonalize
from dsv4_jax.params import Weight, moment_split, normal, parse_axes
from dsv4_jax.sharding import spec_of

ROUNDING = 1e-5  # of the largest element: products of whole matrices, in another batch

# Two layers of each; what a model has, in small.
WEIGHTS = {
    "w_q_b": ("rank -> heads head_width", (8, 4, 6)),
    "w_o_a": ("groups | group_heads head_width -> out_rank", (2, 2, 6, 8)),
    "w_o_b": ("groups out_rank -> width", (2, 8, 16)),
    "w_kv": ("width -> entry", (16, 6)),
    "fn": ("width streams -> mix", (16, 2, 2)),
    "w_up": ("experts | width -> expert_width", (4, 16, 8)),
    "w_down": ("experts | expert_width -> width", (4, 8, 16)),
}
MESHES = [(1, 2, 2, 2), (2, 2, 2, 1), (8, 1, 1, 1), (1, 1, 4, 1), (2, 1, 2, 2)]

direction = functools.partial(orthogonalize, dtype="float32")


# Of two layers: fewer matrices than the 4 devices that share each; 2 turns of 4 and 2; one and 2.
SHARED_EXPERTS = {
    f"w_{count}": ("experts | width -> expert_width", (count, 16, 8)) for count in (1, 5, 3)
}


def stacked(name: str) -> Weight:
    axes, shape = (WEIGHTS | SHARED_EXPERTS)[name]
    names, kinds = parse_axes(axes)
    value = np.random.default_rng(len(name)).normal(size=(2, *shape)).astype(np.float32)
    return Weight(value, names, kinds, normal(1.0)).add_axis(0, {})


def on_mesh(names, sizes, layout):
    """Return the weights, on the mesh, and the function to their directions."""
    mesh, weights = mesh_of(*sizes), [stacked(name) for name in names]
    splits = [moment_split(weight, mesh, layout) for weight in weights]
    placed = [jax.sharding.NamedSharding(mesh, spec_of(split)) for split in splits]
    kinds = [weight.kinds for weight in weights]
    values = jax.device_put([weight.value for weight in weights], placed)
    return values, kinds, lambda values: directions(values, kinds, splits, mesh, direction)


@pytest.mark.parametrize("layout", ["pod", pytest.param("cluster", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_directions_equal_those_of_one_device(sizes, layout):
    check(*on_mesh(WEIGHTS, sizes, layout))


def test_directions_of_stacks_of_any_length():
    """Without whole experts for all devices, these share their widths."""
    values, kinds, function = on_mesh(SHARED_EXPERTS, (1, 4, 1, 1), "pod")
    assert {value.sharding.spec[1:3] for value in values} == {(None, "fsdp")}
    check(values, kinds, function)


def check(values, kinds, function):
    for value, own, found in zip(values, kinds, quick_jit(function)(values), strict=True):
        expected = direction(as_matrices(np.asarray(value), own)).reshape(value.shape)
        assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()
        assert found.sharding.is_equivalent_to(value.sharding, value.ndim)


def collectives(program: str) -> set[str]:
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", program))


def test_experts_need_nothing_of_other_devices():
    values, _, function = on_mesh(["w_up", "w_down"], (1, 2, 2, 1), "pod")
    assert not collectives(quick_jit(function).lower(values).compile().as_text())


def test_dense_matrices_travel_once_there_and_once_back():
    names = ["w_q_b", "w_o_a", "w_o_b", "w_kv", "fn"]
    values, _, function = on_mesh(names, (2, 2, 2, 1), "pod")
    program = quick_jit(function).lower(values).compile().as_text()
    assert collectives(program) == {"all-to-all"}
    assert len(re.findall(r" all-to-all\(", program)) == 2


@pytest.mark.parametrize("split", [
    ((), ("b",)), (("a", "b"), ()), (("b", "a"), ()), (("a",), ("b",)), ((), ()), (("c",), ("a",)),
], ids=str)
def test_parts_join_as_a_mesh_has_them(split):
    """The parts that JAX gives each device are those that are joined, in the order of devices."""
    mesh = jax.make_mesh((2, 2, 2), tuple("abc"), (jax.sharding.AxisType.Auto,) * 3)
    whole = np.arange(64.0).reshape(8, 8)
    placed = jax.sharding.NamedSharding(mesh, jax.P(*(names or None for names in split)))
    parts = {shard.device: shard.data for shard in jax.device_put(whole, placed).addressable_shards}
    parts = np.stack([parts[device] for device in mesh.devices.flat])
    form = Form(parts.shape[1:], split, 1)
    assert form.matrix(mesh) == whole.shape
    flat = parts.reshape(8, -1)
    np.testing.assert_array_equal(join_parts(flat, form, tuple("abc"), (2, 2, 2)), whole)
    np.testing.assert_array_equal(cut_parts(whole, form, tuple("abc"), (2, 2, 2)), flat)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 12))
def test_every_matrix_is_assigned_once_and_loads_are_even(costs, ranks):
    own = assign(costs, ranks)
    assert sorted(sum(own, [])) == list(range(len(costs)))
    loads = [sum(costs[i] for i in items) for items in own]
    least = max(sum(costs) / ranks, max(costs, default=0))
    # Graham's bound for the dearest first, and its cause: who is last had least before.
    assert max(loads) <= 4 / 3 * max(least, pair(costs, ranks))
    used = [bool(items) for items in own]
    assert used == sorted(used, reverse=True)


def pair(costs: list[int], ranks: int) -> float:
    """Return a lower bound: of the ranks + 1 dearest, two share a rank."""
    dearest = sorted(costs, reverse=True)[: ranks + 1]
    return sum(dearest[-2:]) if len(dearest) > ranks else 0


def test_the_work_of_an_expert():
    assert newton_schulz_flops(4096, 2048) == newton_schulz_flops(2048, 4096)
    assert math.isclose(newton_schulz_flops(4096, 2048), 859e9, rel_tol=1e-3)
