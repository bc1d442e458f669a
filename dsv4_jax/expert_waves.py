"""Send tokens to the devices of their experts and back, in waves.

While one wave of tokens is computed the next one travels: no wave waits for another, so that the
compiler may put the exchange of one beside the products of another. A device takes a fixed number
of rows in a wave, `slack` times those of an even load. What an uneven load has beyond that follows
in further rounds: no token is dropped.

All this runs on each device, under `jax.shard_map`.

Source: report 3, where waves are of experts within a kernel; here they are of tokens. Fact sheet 7.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv4_jax.collectives import max_over, ragged_exchange
from dsv4_jax.expert_plan import Plan, combine, dispatch, plan_groups
from dsv4_jax.shapes import Array, Float, Int
from dsv4_jax.sharding import MESH_AXES

AXIS = "expert"
ROWS = 8  # that a device takes are a multiple of this
FURTHER = "further_rounds"  # in the names of operations that an even load skips

# From tokens, their experts of those held here (past the last: none) and the weights of these to
# outputs in float32.
Compute = Callable[[Float[Array, "t d"], Int[Array, "t a"], Float[Array, "t a"]], Array]


class Wave(NamedTuple):
    """The token slots of a wave, in the order of their experts and so of the devices of these."""

    x: Float[Array, "t d"]
    slots: Float[Array, "t a 2"]  # expert, counted from 1, and its weight
    plan: Plan
    counts: Int[Array, "e e"]  # rows from each device to each other


class Bounds(NamedTuple):
    """Which rows every device sends to every other in one round, and where they lie."""

    at_sender: Int[Array, "e e"]  # first row, among the sender's own in order
    at_receiver: Int[Array, "e e"]
    rows: Int[Array, "e e"]

    def back(self) -> Bounds:
        """Return the same for the way back, on which receivers send."""
        return Bounds(self.at_receiver.T, self.at_sender.T, self.rows.T)


def in_waves(
    compute: Compute, x: Float[Array, "t d"], experts: Int[Array, "t a"],
    gates: Float[Array, "t a"], held: int, mesh: Mesh, *, waves: int, slack: float,
) -> Float[Array, "t d"]:
    """Return the weighted sum of each token's experts, wherever they are, in float32.

    Args:
      experts: ids over all devices; one past the last stands for none.
      held: experts on each device.
      waves: parts of the tokens.
      slack: rows that a device takes at once, as a multiple of its share of an even load.
    """
    (t, _), a, devices = x.shape, experts.shape[1], mesh.shape[AXIS]
    size = -(-t // waves)
    sent = _split(x, experts, gates, held, devices, waves, size)
    most = devices * size * a  # a token may name an expert twice
    capacity = min(most, math.ceil(slack * size * a / ROWS) * ROWS)
    rounds = -(-most // capacity)

    def run(wave: Wave, number: Array | int) -> Float[Array, "t d"]:
        return _round(compute, wave, number, capacity, held)

    y = jnp.stack([run(jax.tree.map(lambda leaf, i=i: leaf[i], sent), 0) for i in range(waves)])
    if rounds > 1:
        with jax.named_scope(FURTHER):
            y = _further_rounds(run, sent, y, capacity, rounds, mesh)
    return y.reshape(waves * size, -1)[:t]


def _split(x, experts, gates, held: int, devices: int, waves: int, size: int) -> Wave:
    """Return the waves, stacked; what fills the last one up has no experts."""
    count, missing = held * devices, waves * size - x.shape[0]

    def cut(leaf, fill):
        leaf = jnp.pad(leaf, ((0, missing), (0, 0)), constant_values=fill)
        return leaf.reshape(waves, size, -1)

    x, experts, gates = cut(x, 0), cut(experts, count), cut(gates, 0)
    plans, sizes = jax.vmap(functools.partial(plan_groups, count=count))(experts)
    to_devices = jnp.sum(sizes.reshape(waves, devices, held), axis=-1)
    counts = jnp.swapaxes(jax.lax.all_gather(to_devices, AXIS), 0, 1)
    slots = jnp.stack([(experts + 1).astype(jnp.float32), gates.astype(jnp.float32)], axis=-1)
    return Wave(x, slots, plans, counts)


def _round(
    compute: Compute, wave: Wave, number: Array | int, capacity: int, held: int
) -> Float[Array, "t d"]:
    """Send the rows that it is the turn of, compute what has come, and add up what comes back."""
    bounds = _bounds(wave.counts, number, capacity)
    mine = dispatch(wave.x, wave.plan)
    slots = jnp.take(
        wave.slots.reshape(-1, 2), wave.plan.source, axis=0, mode="fill", fill_value=0
    )
    count = mine.shape[0]
    rows, slots = (_travel(leaf, capacity, count, bounds) for leaf in (mine, slots))
    local = slots[:, :1].astype(jnp.int32) - 1 - jax.lax.axis_index(AXIS) * held
    # Of a row that nothing has come to it is below 0.
    local = jnp.where((local >= 0) & (local < held), local, held)
    y = compute(rows, local, slots[:, 1:]).astype(wave.x.dtype)
    y = _travel(y, count, capacity, bounds.back())
    return combine(y.astype(jnp.float32), wave.plan)


def _bounds(counts: Int[Array, "e e"], number: Array | int, capacity: int) -> Bounds:
    """Cut what each device is to receive, ordered by sender, into rounds of its capacity."""
    first = jnp.cumsum(counts, axis=0) - counts  # at the receiver, if it took all at once
    begin, end = (
        jnp.clip(number * capacity + extra - first, 0, counts) for extra in (0, capacity)
    )
    at_sender = jnp.cumsum(counts, axis=1) - counts + begin
    at_receiver = jnp.clip(first + begin - number * capacity, 0, capacity)
    return Bounds(at_sender, at_receiver, end - begin)


def _further_rounds(
    run: Callable, sent: Wave, y: Float[Array, "w t d"], capacity: int, rounds: int, mesh: Mesh
) -> Float[Array, "w t d"]:
    """Add what did not fit into the first round of each wave, if there is such a thing."""
    received = jnp.max(jnp.sum(sent.counts, axis=1), axis=-1)
    # All devices do the same: who takes part in an exchange must not depend on the load.
    needed = -(-max_over(received, MESH_AXES, mesh) // capacity)

    @jax.checkpoint
    def turn(sent: Wave, wave: Array, number: Array) -> Float[Array, "t d"]:
        one = jax.tree.map(lambda leaf: leaf[wave], sent)
        nothing = jnp.zeros(one.x.shape, jnp.float32)
        return jax.lax.cond(number < needed[wave], lambda: run(one, number), lambda: nothing)

    @jax.checkpoint
    def rest(y, sent: Wave):
        def add(y, step):
            wave, number = step // (rounds - 1), step % (rounds - 1) + 1
            return y.at[wave].add(turn(sent, wave, number)), None

        return jax.lax.scan(add, y, jnp.arange(y.shape[0] * (rounds - 1)))[0]

    return jax.lax.cond(jnp.max(needed) > 1, rest, lambda y, _: y, y, sent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _travel(
    rows: Float[Array, "r d"], size: int, before: int, bounds: Bounds
) -> Float[Array, "size d"]:
    """Return the rows that come to this device; where none does they are 0.

    Every row has one place, so that the transpose is the way back, to as many as there were before.
    """
    return ragged_exchange(rows, size, *bounds, AXIS)


def _travel_back(size: int, before: int, bounds: Bounds, grad: Array):
    return _travel(grad, before, size, bounds.back()), None


_travel.defvjp(
    lambda rows, size, before, bounds: (_travel(rows, size, before, bounds), bounds), _travel_back
)
