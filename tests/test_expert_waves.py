"""Experts on several devices give the sums and gradients of one, whatever the load."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from compiling import quick_jit
from on_mesh import experts_on, mesh_of
from test_moe import assert_close, dense_experts, normal

from dsv4_jax.config import Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.expert_waves import _bounds
from dsv4_jax.experts import ExpertWeights
from dsv4_jax.router import Routing

EXPERTS, WIDTH, HIDDEN, CHOSEN, LIMIT = 8, 16, 8, 3, 1.5
ROWS, TOKENS = 8, 5
NOBODY = EXPERTS


def random_choice() -> np.ndarray:
    choose = np.random.default_rng(0)
    order = choose.permuted(np.tile(np.arange(EXPERTS), (ROWS * TOKENS, 1)), axis=1)
    return order[:, :CHOSEN].reshape(ROWS, TOKENS, CHOSEN)


def every(*experts: int) -> np.ndarray:
    return np.broadcast_to(np.array(experts), (ROWS, TOKENS, CHOSEN))


def one_token() -> np.ndarray:
    chosen = np.full((ROWS, TOKENS, CHOSEN), NOBODY)
    chosen[5, 2] = [7, 0, 3]
    return chosen


LOADS = {
    "random": random_choice(),
    "all to one expert": every(5, NOBODY, NOBODY),
    "all to one device's": every(6, 7, NOBODY),
    "all to one more": every(0, 1, 2),
    "all thrice to one expert": every(5, 5, 5),
    "none": every(NOBODY, NOBODY, NOBODY),
    "one token": one_token(),
    "one row": np.where(np.arange(ROWS)[:, None, None] == 3, random_choice(), NOBODY),
}
# Sizes of the mesh, waves, slack. Five tokens are not two waves or three; at a slack of 1 nearly
# every load needs further rounds, at 8 none does.
WAYS = [
    ((1, 1, 4, 1), 1, 1.0),
    ((1, 1, 4, 2), 2, 1.25),
    ((1, 2, 2, 2), 3, 1.0),
    ((1, 1, 8, 1), 2, 8.0),
]


def random_weights() -> ExpertWeights:
    gate, up = (normal(seed, EXPERTS, WIDTH, HIDDEN) for seed in (1, 2))
    return ExpertWeights(gate, up, normal(3, EXPERTS, HIDDEN, WIDTH))


@functools.cache
def program(sizes, waves: int, slack: float):
    """Compile the sum and its gradients, for any load."""
    mesh = None if sizes is None else mesh_of(*sizes)

    def on_devices(x, experts, gates, weights):
        return experts_on(
            mesh, x, Routing(experts, gates), weights, limit=LIMIT, expert_waves=waves,
            expert_slack=slack,
        )

    return gradients_of(dense_experts_here if sizes is None else on_devices)


def dense_experts_here(x, experts, gates, weights):
    return dense_experts(x, experts, gates, weights, limit=LIMIT)


def gradients_of(function):
    def values(x, experts, gates, weights, cotangent):
        y, pull = jax.vjp(lambda x, g, w: function(x, experts, g, w), x, gates, weights)
        return y, pull(cotangent)

    return quick_jit(values)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_devices_equal_the_dense_sum(way, load):
    experts = LOADS[load].astype(np.int32)
    x, gates = normal(4, ROWS, TOKENS, WIDTH), np.abs(normal(5, *experts.shape))
    args = x, experts, gates, random_weights(), normal(6, *x.shape)
    found, expected = program(*way)(*args), program(None, 0, 0)(*args)
    jax.tree.map(assert_close, found, expected)


def test_rounds_bring_every_row_once():
    """Of random counts: stretches of a round do not overlap, and all rounds together are all."""
    choose, capacity = np.random.default_rng(1), 7
    for _ in range(50):
        devices = int(choose.integers(1, 6))
        counts = choose.integers(0, 12, (devices, devices))
        sent = np.zeros((devices, devices, 12), int)
        for number in range(-(-counts.sum(axis=0).max() // capacity)):
            at_sender, at_receiver, rows = map(np.asarray, _bounds(counts, number, capacity))
            taken = np.zeros((devices, capacity), int)
            first = np.cumsum(counts, axis=1) - counts
            for s, r in np.ndindex(devices, devices):
                begin = at_sender[s, r] - first[s, r]
                sent[s, r, begin : begin + rows[s, r]] += 1
                assert at_receiver[s, r] + rows[s, r] <= capacity
                taken[r, at_receiver[s, r] : at_receiver[s, r] + rows[s, r]] += 1
            assert taken.max(initial=0) <= 1
        np.testing.assert_array_equal(sent, np.arange(12) < counts[..., None])


@pytest.mark.parametrize(("changes", "message"), [
    ({"expert_waves": 0}, "Runtime.expert_waves: expected at least 1, got 0"),
    ({"expert_slack": 0.5}, "Runtime.expert_slack: expected at least 1, got 0.5"),
    ({"expert_slack": float("nan")}, "Runtime.expert_slack: expected at least 1, got nan"),
])
def test_impossible_waves_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Runtime(**changes)
