"""What the kernels of the compressor are given."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compressor.index import Block


class Form(NamedTuple):
    """What entries are to be."""

    eps: float
    dtype: str
    rounded: bool  # to FP8


class Operands(NamedTuple):
    """Arrays; values, gates, bias and norm are float32."""

    values: Float[Array, "b t u k"]
    gates: Float[Array, "b t u k"]
    bias: Float[Array, "ratio u k"]
    norm: Float[Array, " k"]
    cos: Float[Array, "b c h"]
    sin: Float[Array, "b c h"]
    start: Int[Array, "b c"]
    has_previous: Bool[Array, "b c"]
    exists: Bool[Array, "b c"]

    @property
    def block(self) -> Block:
        """The slots of an entry."""
        return Block(*self.bias.shape[:2])
