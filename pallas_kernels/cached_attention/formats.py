"""Rows of a cache: a key-value vector as plain numbers, or as served, in bytes.

A served row is, byte by byte: the channels that are not rotated as FP8 (E4M3), the rotated ones as
bfloat16, and one power of two for each 64 FP8 channels, filled up; 584 bytes for V4's 448 + 64.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.blocks import power_of_two
from pallas_kernels.cached_attention.index import Column
from pallas_kernels.codes import powers

GROUP = 64  # channels of one power of two
UNIT = 8  # bytes that powers of two are filled up to a multiple of
CODES, NUMBERS = "codes", "numbers"


class Form(NamedTuple):
    """How a row stores its channels, the rotated ones last."""

    channels: int
    rotated: int
    served: bool

    @property
    def plain(self) -> int:
        """Channels that are not rotated; in served rows those of FP8."""
        return self.channels - self.rotated

    @property
    def groups(self) -> int:
        """Powers of two of a served row."""
        return -(-self.plain // GROUP)

    @property
    def scales(self) -> int:
        """The byte of a served row with the first power of two."""
        return self.plain + 2 * self.rotated

    @property
    def width(self) -> int:
        """Numbers or bytes of a row."""
        return self.scales + -(-self.groups // UNIT) * UNIT if self.served else self.channels


class Part(NamedTuple):
    """Channels of a row that a kernel on GPU reads at once.

    Served rows are read as words of two bytes, so that 32 bits suffice for places in 4 GiB.
    """

    kind: str
    columns: Column
    channels: tuple[int, ...]
    shift: int = 0  # of codes: bits below them in their words
    scale: int = 0  # of codes: the word with their power of two,
    scale_shift: int = 0  # and the bits below that


class Parts(NamedTuple):
    """The parts of a row, as columns of a table: of channel c of each part, then of c + 1 of each.

    Registers are joined so without leaving their threads.
    """

    parts: tuple[Part, ...]
    count: int  # a power of two; those past the last part are empty
    width: int  # channels of a part, filled up to a power of two

    def places(self) -> np.ndarray:
        """Return where each channel of a row lies in the table."""
        found = np.zeros(sum(len(part.channels) for part in self.parts), int)
        for number, part in enumerate(self.parts):
            found[list(part.channels)] = np.arange(len(part.channels)) * self.count + number
        return found

    def spread(self, x: Array) -> Array:
        """Lay the channels of the last axis out as the table, filled up with zeros."""
        place, size = self.places(), self.count * self.width
        if np.array_equal(place, np.arange(size)):
            return x
        source = np.full(size, -1)
        source[place] = np.arange(len(place))
        return jnp.where(source >= 0, x[..., np.maximum(source, 0)], 0)

    def gather(self, x: Array) -> Array:
        """Undo `spread`."""
        place = self.places()
        return x if np.array_equal(place, np.arange(x.shape[-1])) else x[..., place]


def decode(rows: Array, form: Form) -> Float[Array, "*rows k"]:
    """Return stored rows as float32 numbers."""
    if not form.served:
        return rows.astype(jnp.float32)
    codes = jax.lax.bitcast_convert_type(rows[..., : form.plain], jnp.float8_e4m3fn)
    scales = powers(rows[..., form.scales :][..., : form.groups])
    values = codes.astype(jnp.float32) * jnp.repeat(scales, GROUP, axis=-1)[..., : form.plain]
    turned = rows[..., form.plain : form.scales].reshape(*rows.shape[:-1], form.rotated, 2)
    turned = jax.lax.bitcast_convert_type(turned, jnp.bfloat16)
    return jnp.concatenate([values, turned.astype(jnp.float32)], axis=-1)


def words(x: Array, form: Form) -> Array:
    """View served rows as words of two bytes, which costs nothing; others stay."""
    if not form.served:
        return x
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint16)


def parts_of(form: Form) -> Parts:
    """Return the parts of a row."""
    if not form.served:
        part = Part(NUMBERS, Column(0, form.channels), tuple(range(form.channels)))
        return Parts((part,), 1, power_of_two(form.channels))
    parts = []
    for group in range(form.groups):
        first, end = group * GROUP, min((group + 1) * GROUP, form.plain)
        scale = form.scales + group
        columns = Column(first // 2, (end - first) // 2)
        parts += [
            Part(CODES, columns, tuple(range(first + half, end, 2)), 8 * half,
                 scale // 2, 8 * (scale % 2))
            for half in (0, 1)
        ]
    most = GROUP // 2
    for start in range(form.plain, form.channels, most):
        channels = tuple(range(start, min(start + most, form.channels)))
        columns = Column(start - form.plain + form.plain // 2, len(channels))
        parts.append(Part(NUMBERS, columns, channels))
    width = max(part.columns.count for part in parts)
    return Parts(tuple(parts), power_of_two(len(parts), 1), power_of_two(width))
