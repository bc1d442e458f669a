"""Estimate a training step on a cluster from the shapes of the model alone: nothing is compiled.

Work is counted part by part, for each the products and the bytes that a device's memory moves. A
part takes at least the longer of both at the device's peaks; nothing overlaps within a device. What
is sent takes at least its bytes over the speed of the network, and may hide behind the work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from dsv4_jax.account import Memory, bytes_here, check_size, kept_bytes, tokens_at_once
from dsv4_jax.config import CSA, HCA, WINDOW, ModelConfig
from dsv4_jax.devices import Chip
from dsv4_jax.errors import InputError
from dsv4_jax.model import param_shapes
from dsv4_jax.muon_shards import newton_schulz_flops
from dsv4_jax.optimizer import ADAMW_MATRICES, MUON
from dsv4_jax.params import BATCH, IN, OUT, Weight, split_trainable, weight_split
from dsv4_jax.run_config import DENSE, INDEXER, RunConfig, StageConfig
from dsv4_jax.sharding import MESH_AXES, AxisSplit
from dsv4_jax.sizes import ParamCount, count_params
from dsv4_jax.topology import Topology
from dsv4_jax.train_state import abstract_state

PRODUCTS = 4, 3  # of a weight, recomputing layers and not: forward, again, and two for gradients
ATTENTION_PRODUCTS = 11, 9  # of queries with what they see: 2, again, 3 for queries, 4 for keys
STREAM_PASSES = 8, 6  # reads and writes of all streams by a sublayer, forward and backward
EXCHANGES = 6, 4  # of tokens with their experts: there and back, recomputed, and of gradients
GATHERS = 2, 1  # of a weight
WORKING = 8  # streams and heads of all tokens that a layer's backward pass has at once


class Part(NamedTuple):
    """What a part of the step does on a device."""

    name: str
    flops: float  # in products, a multiply-add counting two
    bytes: float  # that memory moves

    def seconds(self, chip: Chip) -> float:
        """Return how long it takes at least."""
        return max(self.flops / chip.flops, self.bytes / chip.memory_speed)


class Sent(NamedTuple):
    """What a device sends in a step."""

    name: str
    slow: bool  # to other slices or hosts
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """Return how long it takes at least."""
        return self.bytes / (chip.slow_network if self.slow else chip.fast_network)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training step, per device, with an even load of experts."""

    devices: int
    chip: Chip
    parameters: ParamCount
    memory: Memory
    tokens: int  # of a batch
    flops: float  # in products that count: nothing done twice; of all devices together
    parts: tuple[Part, ...]
    sent: tuple[Sent, ...]

    @property
    def compute_seconds(self) -> float:
        """How long a device computes."""
        return sum(part.seconds(self.chip) for part in self.parts)

    @property
    def network_seconds(self) -> float:
        """How long a device sends, to near ones and far ones at once."""
        times = {slow: 0.0 for slow in (False, True)}
        for sent in self.sent:
            times[sent.slow] += sent.seconds(self.chip)
        return max(times.values())

    @property
    def step_seconds(self) -> float:
        """How long a step takes at least, if all that can hide does."""
        return max(self.compute_seconds, self.network_seconds)

    @property
    def mfu(self) -> float:
        """The share of the devices' peak that counts in such a step."""
        return self.flops / self.devices / self.chip.flops / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        """Tokens of all devices."""
        return self.tokens / self.step_seconds * 86_400

    def device_hours(self, tokens: float) -> float:
        """Return the hours of devices for so many tokens."""
        return tokens / self.tokens * self.step_seconds * self.devices / 3600

    @property
    def bottleneck(self) -> str:
        """What takes the longest: a part of the work, or the network."""
        if self.network_seconds > self.compute_seconds:
            return max(self.sent, key=lambda sent: sent.seconds(self.chip)).name
        return max(self.parts, key=lambda part: part.seconds(self.chip)).name


def estimate(config: RunConfig, stage: StageConfig, topology: Topology, flag: str) -> Estimate:
    """Estimate a stage's step.

    Args:
      flag: that the topology is the value of.
    Raises:
      InputError: the mesh has another number of devices than the topology; the stage trains the
        indexers alone.
    """
    if stage.attention == INDEXER:
        raise InputError(
            "--stage: expected one that trains the model, got one with attention='indexer', which "
            "trains the indexers alone; choose another"
        )
    check_size(config.mesh, topology, flag)
    mesh = AbstractMesh(tuple(config.mesh.sizes.values()), MESH_AXES)
    step = _Step(config, stage, mesh, topology)
    parts = list(step.parts())
    return Estimate(
        devices=topology.devices, chip=topology.chip, parameters=count_params(config.model),
        memory=step.memory(), tokens=stage.batch_tokens, flops=step.counted(parts),
        parts=tuple(parts), sent=tuple(step.sent()),
    )


class _Matrices(NamedTuple):
    """A weight's matrices, all of them equal."""

    path: tuple[str, ...]
    weight: Weight
    split: tuple[AxisSplit, ...]

    def size(self, kind: str) -> int:
        """Return the product of the axes of a kind."""
        axes = zip(self.weight.kinds, self.weight.value.shape, strict=True)
        return math.prod(n for own, n in axes if own == kind)

    @property
    def part(self) -> str:
        """Return the part of the step to which its products belong."""
        for name, part in _PART_OF.items():
            if name in self.path:
                return part
        return "other projections"


_PART_OF = {
    "experts": "routed experts", "indexer": "indexers", "attention_mix": "hyper-connections",
    "moe_mix": "hyper-connections", "head_mix": "hyper-connections", "head": "head and losses",
    "attention": "projections of attention", "moe": "shared experts, routers",
}


class _Step:
    """A step on a mesh: its parts, what is sent and what is held."""

    def __init__(
        self, config: RunConfig, stage: StageConfig, mesh: AbstractMesh, topology: Topology
    ):
        self.config, self.stage, self.mesh, self.topology = config, stage, mesh, topology
        self.model: ModelConfig = config.model
        self.itemsize = config.runtime.compute_dtype.itemsize
        self.tokens = tokens_at_once(stage, mesh)
        self.again = 0 if config.runtime.remat else 1  # index of the constants above
        self.state = abstract_state(config, mesh)
        boxed = flatten_dict(split_trainable(param_shapes(config.model))[0])
        self.matrices = [
            _Matrices(path, weight, weight_split(weight, mesh, config.mesh.layout))
            for path, weight in boxed.items() if IN in weight.kinds
        ]

    def parts(self) -> Iterator[Part]:
        """Yield what a device does in a step."""
        times, totals = self.stage.accumulation, {}
        for name, flops, traffic in (*self._products(), *self._attention(), *self._streams()):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + flops * times, before[1] + traffic * times
        totals["optimizer"] = self._optimizer()
        for name, (flops, traffic) in totals.items():
            yield Part(name, flops, traffic)

    def _products(self) -> Iterator[tuple[str, float, float]]:
        """Yield the products with weights, of a micro-batch."""
        for x in self.matrices:
            if x.path[-1] == "embedding" or (x.part == "indexers" and self._indexers_rest()):
                continue
            rows, inner, outer, batch = self.tokens, x.size(IN), x.size(OUT), x.size(BATCH)
            held, passes = batch / self._kept_parts(x), PRODUCTS[self.again]
            if "experts" in x.path:
                per_expert = self.tokens * self.model.num_experts_per_tok
                flops = 2 * per_expert * inner * outer * batch / self.model.n_routed_experts
                moved = per_expert * (inner + outer) * batch / self.model.n_routed_experts
            else:
                uses = 1 + self._has_mtp() if x.path == ("head",) else 1
                passes = PRODUCTS[1] if len(x.path) == 1 else passes
                flops, moved = (uses * batch * rows * n for n in (2 * inner * outer, inner + outer))
            flops /= self.mesh.shape["tensor"] if self._is_kept(x, "tensor") else 1
            weights = held * inner * outer
            # A weight is written when it has been gathered, and its gradient in float32.
            gathered = GATHERS[self.again] * self.itemsize + 4
            traffic = passes * (moved + weights) * self.itemsize + gathered * weights
            yield x.part, passes * flops, traffic

    def _attention(self) -> Iterator[tuple[str, float, float]]:
        """Yield the products of queries with what they see."""
        model = self.model
        layers = {kind: model.layer_types.count(kind) for kind in (WINDOW, CSA, HCA)}
        layers[WINDOW] += self._has_mtp()
        heads = model.num_attention_heads / self.mesh.shape["tensor"]
        width = self.tokens * heads * model.head_dim
        for kind, count in layers.items():
            flops = 2 * ATTENTION_PRODUCTS[self.again] * width * self._seen(kind)
            traffic = 3 * PRODUCTS[self.again] * width * self.itemsize
            yield "attention", count * flops, count * traffic
        if not self._indexers_rest():
            width = self.tokens * model.index_n_heads * model.index_head_dim
            scored = self.stage.seq_len / model.csa_ratio / 2
            yield "indexers", layers[CSA] * 2 * PRODUCTS[self.again] * width * scored, 0.0

    def _seen(self, kind: str) -> float:
        """Return how many keys and entries a query sees on average."""
        model, length = self.model, self.stage.seq_len
        seen = min(model.sliding_window, length / 2)
        if kind == WINDOW:
            return seen
        entries = length / model.ratio(kind) / 2
        chosen = kind == CSA and self.stage.attention != DENSE
        return seen + (min(entries, model.index_topk) if chosen else entries)

    def _streams(self) -> Iterator[tuple[str, float, float]]:
        """Yield how the streams are read and written, by two sublayers of each layer."""
        sublayers = 2 * (self.model.num_layers + self._has_mtp())
        size = self.tokens * self.model.hc_mult * self.model.hidden_size * self.itemsize
        yield "hyper-connections", 0.0, sublayers * STREAM_PASSES[self.again] * size

    def _optimizer(self) -> tuple[float, float]:
        flops = sum(
            newton_schulz_flops(x.size(IN), x.size(OUT)) * x.size(BATCH) for x in self.matrices
            if self.config.optimizer.name == MUON and x.path[-1] not in ADAMW_MATRICES
            and not (x.part == "indexers" and self._indexers_rest())
        )
        held = bytes_here(self.state.params) + bytes_here(self.state.opt_state)
        # Read and written once, and the gradients and the updates read.
        return flops / self.mesh.size, 2 * held + 2 * bytes_here(self.state.params)

    def counted(self, parts: list[Part]) -> float:
        """Return the products of all devices, without what is computed again."""
        again, once = self.again, 1
        shares = {
            "attention": ATTENTION_PRODUCTS[once] / ATTENTION_PRODUCTS[again],
            "head and losses": 1.0, "optimizer": 1.0,
        }
        usual = PRODUCTS[once] / PRODUCTS[again]
        return self.mesh.size * sum(x.flops * shares.get(x.name, usual) for x in parts)

    def memory(self) -> Memory:
        """Return what a device holds at the fullest moment: in the backward pass."""
        parameters, optimizer = bytes_here(self.state.params), bytes_here(self.state.opt_state)
        # Of this micro-batch, and their sum over those before.
        gradients = parameters * (2 if self.stage.accumulation > 1 else 1)
        return Memory(
            parameters=parameters, optimizer=optimizer,
            activations=kept_bytes(self.config, self.stage, self.mesh),
            temporaries=round(gradients + self._heads() + self._layer()),
            available=int(self.topology.chip.memory),
        )

    def _heads(self) -> float:
        """Return the bytes of the head's and the embedding's gradients, whole, and of errors."""
        model, uses = self.model, 1 + self._has_mtp()
        matrix, errors = model.vocab_size * model.hidden_size, self.tokens * model.vocab_size
        gathered = 2 * self.itemsize * matrix
        return gathered + 4 * (1 + uses) * matrix + uses * self.itemsize * errors

    def _layer(self) -> float:
        """Return the bytes of a layer's gathered experts, their gradients, and its activations."""
        model = self.model
        size = 3 * model.hidden_size * model.moe_intermediate_size * model.n_routed_experts
        experts = size / (self.mesh.shape["expert"] * self.mesh.shape["tensor"])
        wide = model.hc_mult * model.hidden_size + model.num_attention_heads * model.head_dim
        return experts * (self.itemsize + 4) + WORKING * self.tokens * wide * self.itemsize

    def sent(self) -> Iterator[Sent]:
        """Yield what a device sends in a step."""
        times, dense, experts = self.stage.accumulation, {}, {}
        for x in self.matrices:
            held = x.size(IN) * x.size(OUT) * x.size(BATCH) / self._kept_parts(x)
            found = experts if "experts" in x.path else dense
            for axis in {name for part in x.split for name in part.shared}:
                n = self.mesh.shape[axis]
                # Gathered in the compute dtype, reduced and scattered in float32.
                whole = held * (self.itemsize * GATHERS[self.again] + 4) * times
                found[axis] = found.get(axis, 0.0) + whole * (n - 1) / n / self._inner(x, axis)
        for name, found in (("dense weights", dense), ("experts' weights", experts)):
            for axis, size in found.items():
                yield Sent(f"{name} along {axis}", self._is_slow(axis), size)
        n = self.mesh.shape["expert"]
        moved = self.tokens * self.model.num_experts_per_tok * self.model.hidden_size
        layers = self.model.num_layers + self._has_mtp()
        yield Sent(
            "tokens to experts", self._is_slow("expert"),
            EXCHANGES[self.again] * times * layers * moved * self.itemsize * (n - 1) / n,
        )
        n = self.mesh.shape["data"]
        gradients = bytes_here(self.state.params)
        # Summed where the moments are; the updates go the other way.
        yield Sent("copies of the model", self._is_slow("data"), 2 * gradients * (n - 1) / n)

    def _inner(self, x: _Matrices, axis: str) -> int:
        """Return how many parts are left of a weight when it is gathered along a mesh axis."""
        shared = next(part.shared for part in x.split if axis in part.shared)
        return math.prod(self.mesh.shape[name] for name in shared[: shared.index(axis)])

    def _is_slow(self, axis: str) -> bool:
        """Say whether devices along a mesh axis are in several slices, or hosts of GPUs."""
        inner = MESH_AXES[MESH_AXES.index(axis) :]
        reach = math.prod(self.mesh.shape[name] for name in inner)
        return reach > self.topology.devices_per_slice and self.mesh.shape[axis] > 1

    def _kept_parts(self, x: _Matrices) -> int:
        """Return into how many parts a weight is split in use, too."""
        return math.prod(self.mesh.shape[name] for part in x.split for name in part.kept)

    def _is_kept(self, x: _Matrices, axis: str) -> bool:
        return any(axis in part.kept for part in x.split)

    def _has_mtp(self) -> int:
        return self.model.num_nextn_predict_layers

    def _indexers_rest(self) -> bool:
        return self.stage.attention == DENSE
