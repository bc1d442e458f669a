"""What accelerators can do at most, and what they hold.

A device is what JAX calls one. Half a chip is a device of TPU 7x, a whole chip one of the others.
"""

from __future__ import annotations

import resource
from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """Peaks of one device: what no program can exceed.

    Networks are counted in one direction, as what a device can send while it receives as much: in
    the fast one the sum over all its links, of which a ring along one axis of a torus uses a part.
    """

    kind: str  # the start of `jax.Device.device_kind`
    flops: float  # dense bfloat16 FLOP/s
    memory_speed: float  # bytes/s of HBM
    memory: float  # bytes of HBM that a program may use
    fast_network: float  # bytes/s to the devices of its slice (TPU: ICI) or host (GPU: NVLink)
    slow_network: float  # bytes/s to other slices (TPU: data center network) or hosts (InfiniBand)

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, whose programs say what they keep on the chip."""
        return self.kind.startswith("TPU")


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, figures of a chip. FLOP/s and HBM
# bytes/s are theirs. "Bidirectional ICI bandwidth per chip" is 400 GB/s for v5e, 1200 for v5p and
# 7x, 800 for v6e; the half is one direction. Older pages call this half the bandwidth: 1600 Gb/s of
# v5e (4 links), 4800 of v5p (6), 3200 of v6e (4), 2400 of v4 (6). "DCN bandwidth per chip" is 50
# Gb/s for v5p, 100 for v6e and 7x; v5e has 2 cards of 100 Gb/s for a host of 8 chips. That of v4 is
# an assumption: as v5p. Usable HBM is what libtpu 0.0.42 names when a program does not fit; for v4
# it names 15.25 GiB of half a chip.
# GPU: data sheets of DGX and HGX A100 (80 GB), H100 and H200 (SXM), B200. NVLink has 600, 900, 900
# and 1800 GB/s in both directions together. Assumed is a network card for each GPU: ConnectX-6 of
# 200 Gb/s for A100, ConnectX-7 of 400 Gb/s for the others. Memory of H100 and B200 is that of
# the devices described in pallas_kernels/gpus; JAX takes three quarters of it unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says another share.
_V5E = Chip("TPU v5 lite", 197e12, 819e9, 15.75 * GIB, 200e9, 25e9 / 8)
_V5P = Chip("TPU v5", 459e12, 2765e9, 95.74 * GIB, 600e9, 50e9 / 8)
_V6E = Chip("TPU v6 lite", 918e12, 1638e9, 31.25 * GIB, 400e9, 100e9 / 8)
CHIPS = (
    Chip("NVIDIA A100", 312e12, 2039e9, 80e9, 300e9, 25e9),
    Chip("NVIDIA H100", 989e12, 3350e9, 84_942_979_072, 450e9, 50e9),
    Chip("NVIDIA H200", 989e12, 4800e9, 141e9, 450e9, 50e9),
    Chip("NVIDIA B200", 2250e12, 8000e9, 191_514_411_008, 900e9, 50e9),
    Chip("TPU v4", 275e12, 1228e9, 30.5 * GIB, 300e9, 50e9 / 8),
    _V5E,
    _V5E._replace(kind="TPU v5e"),
    _V5P,
    _V5P._replace(kind="TPU v5p"),
    _V6E,
    _V6E._replace(kind="TPU v6e"),
    # Half of a chip: 2307 TFLOP/s, 7380 GB/s of HBM, 600 GB/s of ICI one way, 100 Gb/s of DCN.
    Chip("TPU7x", 2307e12 / 2, 7380e9 / 2, 94.75 * GIB, 600e9 / 2, 100e9 / 8 / 2),
)


def chip_of(kind: str) -> Chip | None:
    """Return what is known of a kind of device, as `jax.Device.device_kind` names it."""
    known = [chip for chip in CHIPS if kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind)) if known else None


def peak_flops(kind: str) -> float | None:
    """Return the bfloat16 FLOP/s of a kind of device, if they are known."""
    chip = chip_of(kind)
    return chip.flops if chip else None


def peak_memory() -> int:
    """Return the most bytes that have been in use on a device; on CPU, in this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return process_memory()


def process_memory() -> int:
    """Return the most bytes of this machine's memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
