"""Fingerprints tell arrays apart, on any mesh and any device."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from on_mesh import mesh_of

from dsv4_jax import checksum
from dsv4_jax.checksum import PIECE, fingerprints


def array(shape, dtype):
    choose = np.random.default_rng(0)
    return jnp.asarray(choose.integers(-100, 100, shape)).astype(dtype)


TREE = {
    "matrix": array((48, 40), jnp.float32), "half": array((3, 4, 5), jnp.bfloat16),
    "long": array((PIECE + 100,), jnp.float32), "ids": array((7,), jnp.int32),
    "bytes": array((9, 2), jnp.int8), "flags": array((5,), jnp.bool_), "step": jnp.int32(7),
    "nothing": jnp.zeros((0, 3)),
}


@pytest.fixture
def on_devices(monkeypatch):
    """Compute as on accelerators."""
    monkeypatch.setattr(checksum.jax, "default_backend", lambda: "tpu")


def prints(tree) -> dict[str, str]:
    return {name: leaf["fingerprint"] for name, leaf in fingerprints(tree)().items()}


def test_host_and_devices_agree(on_devices, monkeypatch):
    by_devices = fingerprints(TREE)()
    monkeypatch.undo()
    assert fingerprints(TREE)() == by_devices
    assert by_devices["half"]["shape"] == [3, 4, 5] and by_devices["half"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("axes", [("fsdp", "tensor"), ("tensor",), (None, "fsdp"), ()])
def test_a_mesh_changes_nothing(axes, on_devices):
    placed = NamedSharding(mesh_of(1, 4, 1, 2), PartitionSpec(*axes))
    matrix = {"matrix": TREE["matrix"]}
    assert fingerprints(jax.device_put(matrix, placed))() == fingerprints(matrix)()


@pytest.mark.parametrize("name", sorted(TREE.keys() - {"nothing", "step"}))
def test_every_flipped_bit_and_every_swap_changes_it(name):
    choose, value = random.Random(name), np.array(TREE[name])
    before = prints({name: value})
    for _ in range(100):
        other = value.copy()
        raw = other.reshape(-1).view(np.uint8)
        if name == "flags":  # a byte is 0 or 1
            raw[choose.randrange(raw.size)] ^= 1
        else:
            raw[choose.randrange(raw.size)] ^= 1 << choose.randrange(8)
        assert prints({name: other}) != before
        a, b = choose.sample(range(value.size), 2)
        other = value.copy().reshape(-1)
        other[[a, b]] = other[[b, a]]
        same = np.array_equal(other, value.reshape(-1))
        assert (prints({name: other.reshape(value.shape)}) == before) == same


def test_infinities_and_nans_are_counted():
    bad = jnp.array([1, jnp.nan, -jnp.inf, 2, jnp.inf])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        assert fingerprints({"x": bad.astype(dtype)})()["x"]["non_finite"] == 3
    assert not any(leaf["non_finite"] for leaf in fingerprints(TREE)().values())


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_they_are_of_the_arrays_as_they_were(backend, monkeypatch):
    """A training step takes the arrays over while another thread computes their fingerprints."""
    x = jnp.arange(1e5)
    expected = fingerprints({"x": jnp.arange(1e5)})()
    monkeypatch.setattr(checksum.jax, "default_backend", lambda: backend)
    describe = fingerprints({"x": x})
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(x))
    with ThreadPoolExecutor() as pool:
        assert pool.submit(describe).result() == expected
