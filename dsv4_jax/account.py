"""What a training step needs of a device: memory, and what is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from dsv4_jax.devices import GIB
from dsv4_jax.errors import InputError
from dsv4_jax.run_config import MeshConfig, RunConfig, StageConfig
from dsv4_jax.sharding import BATCH_AXES, AnyMesh, parts_of, product_of
from dsv4_jax.sizes import ParamCount
from dsv4_jax.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device."""

    parameters: int
    optimizer: int
    activations: int  # the streams of layers that the backward pass starts from
    temporaries: int  # what else there is at the fullest moment: gradients, what is gathered
    available: int

    @property
    def total(self) -> int:
        """What is needed at the fullest moment."""
        return self.parameters + self.optimizer + self.activations + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.total <= self.available


class Exchange(NamedTuple):
    """What the collectives of a kind do in a step."""

    kind: str
    experts: bool  # whether they carry tokens to their experts and back
    slow: bool  # whether slices or hosts exchange data
    number: float
    bytes: float  # that a device sends
    seconds: float  # at the speed of the network
    hidden: float  # of these, those in which the device computes, too

    @property
    def hidden_share(self) -> float:
        """The share of the time that computation hides."""
        return self.hidden / self.seconds if self.seconds else 1.0


def memory_lines(
    size: ParamCount, memory: Memory, devices: int, kind: str
) -> Iterator[str]:
    """Yield what is said of a model's parameters and of the memory of one of the devices."""
    yield (
        f"parameters: {size.total:,}, of which a token uses {size.active:,}, and {size.mtp:,} for "
        "multi-token prediction"
    )
    yield f"memory of a device, of {devices:,} {kind}, in GiB"
    for field in ("parameters", "optimizer", "activations", "temporaries"):
        yield f"  {field:<15}{getattr(memory, field) / GIB:8.2f}"
    verdict = "fits into" if memory.fits else "does NOT fit into"
    yield f"  {'in all':<15}{memory.total / GIB:8.2f}, {verdict} {memory.available / GIB:.2f}"


def check_size(mesh: MeshConfig, topology: Topology, flag: str) -> None:
    """Raise an InputError unless a mesh takes all devices of a topology, the value of a flag."""
    if mesh.size != topology.devices:
        raise InputError(
            f"mesh: expected a product of sizes equal to the {topology.devices} devices of "
            f"{flag}, got {product_of(mesh.sizes)}; change the mesh section of the config"
        )


def bytes_here(tree) -> int:
    """Return the bytes of a device's parts of placed arrays, or of their shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def tokens_at_once(stage: StageConfig, mesh: AnyMesh) -> int:
    """Return the tokens of a micro-batch that a device has."""
    return stage.batch_tokens // stage.accumulation // parts_of(BATCH_AXES, mesh)


def kept_bytes(config: RunConfig, stage: StageConfig, mesh: AnyMesh) -> int:
    """Return the bytes that layers keep of a micro-batch on a device, recomputing all else.

    These are the streams that each begins with, and what the layer before adds to them.
    """
    model, layers = config.model, config.model.num_layers + config.model.num_nextn_predict_layers
    channels = (model.hc_mult + 1) * model.hidden_size
    itemsize = config.runtime.compute_dtype.itemsize
    return layers * tokens_at_once(stage, mesh) * channels * itemsize
