"""A run goes on on another mesh: the state bit by bit, and the same loss as far as sums round."""

from __future__ import annotations

import functools
import random

import jax
import numpy as np
import pytest
from compiling import quick_jit
from fault_cases import cases
from on_mesh import mesh_of
from saved_states import PLACE, assert_same
from test_sharding import ROWS, initial_state, packed_batch, run_config

from dsv4_jax import sharding
from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.sharding import batch_sharding
from dsv4_jax.stage_model import make_evaluation
from dsv4_jax.train_state import abstract_state, state_shardings

pytestmark = [pytest.mark.faults, pytest.mark.heavy]

# From 8 devices to 1, in several ways; None is one device without a mesh.
MESHES = [(1, 2, 2, 2), (8, 1, 1, 1), (2, 1, 1, 2), (1, 4, 1, 1), (1, 1, 2, 1), (2, 1, 1, 1), None]
ROUNDING = 1e-6  # of the loss: sums over devices in another order
CONFIG = run_config("sparse")


def placed_on(sizes):
    return None if sizes is None else mesh_of(*sizes)


def state_on(mesh):
    """Return the state with random moments, too, placed on a mesh."""
    choose, state = np.random.default_rng(1), initial_state("sparse")
    moments = jax.tree.map(
        lambda x: choose.normal(size=x.shape).astype(x.dtype), state.opt_state
    )
    state = state._replace(opt_state=moments)
    return jax.device_put(state, state_shardings(CONFIG, mesh))


@functools.cache
def evaluation(sizes):
    return quick_jit(make_evaluation(CONFIG, CONFIG.stages[0], placed_on(sizes)))


def loss(sizes, params) -> float:
    batch = packed_batch()
    if sizes is not None:
        batch = jax.device_put(batch, batch_sharding(placed_on(sizes), ROWS))
    return float(evaluation(sizes)(params, batch))


def restore(workdir, mesh):
    checkpoints = Checkpoints(workdir, keep=1, config=CONFIG.to_dict())
    state, _ = checkpoints.restore(abstract_state(CONFIG, mesh))
    checkpoints.close()
    return state


def save(workdir, state) -> None:
    checkpoints = Checkpoints(workdir, keep=1, config=CONFIG.to_dict())
    checkpoints.save(1, state, PLACE)
    checkpoints.close()


def test_any_mesh_to_any_other(tmp_path, record_property):
    choose, count = random.Random(0), cases(12, 20)
    pairs = [(a, b) for a in MESHES for b in MESHES]
    for number, (before, after) in enumerate(choose.sample(pairs, count)):
        workdir, state = tmp_path / str(number), state_on(placed_on(before))
        save(workdir, state)
        found = restore(workdir, placed_on(after))
        assert_same(found, state)
        placed = state_shardings(CONFIG, placed_on(after))
        if placed is not None:
            assert jax.tree.map(lambda x: x.sharding, found) == placed
        old, new = loss(before, state.params), loss(after, found.params)
        assert new == pytest.approx(old, rel=0 if before == after else ROUNDING)
    record_property("F9: restored on another mesh, state bitwise, next loss to 1e-6", count)


def test_other_rules_of_sharding(tmp_path, monkeypatch):
    state = state_on(placed_on(MESHES[0]))
    save(tmp_path, state)
    monkeypatch.setitem(sharding.LAYOUTS, "pod", {"dense": ("tensor",), "experts": ("data",)})
    found = restore(tmp_path, placed_on(MESHES[0]))
    assert_same(found, state)
    moved = [a.sharding != b.sharding for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(state), strict=True
    )]
    assert any(moved)
