"""What a kernel tells of the logits tile by tile, and the softmax that follows from it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LogitTiles(NamedTuple):
    """Logits [t, v], cut into tiles of ids; numbers are float32 where nothing else is said."""

    maxima: Float[Array, "t tiles"]
    sums: Float[Array, "t tiles"]  # of exp(logit - the tile's maximum)
    target: Float[Array, " t"]  # the logit of each token's target
    exps: Float[Array, "t v"] | None  # exp(logit - the tile's maximum), in the dtype of hidden
    winners: Int[Array, "t tiles"] | None  # the lowest id that has the tile's maximum

    def log_total(self) -> Float[Array, " t"]:
        """Return the logarithm of the softmax's denominator."""
        return jax.nn.logsumexp(self.maxima, axis=1, b=self.sums)

    def hit(self, targets: Int[Array, " t"]) -> Bool[Array, " t"]:
        """Say of each target whether it is the likeliest id, the lowest of equally likely ones."""
        best = jnp.argmax(self.maxima, axis=1)
        return jnp.take_along_axis(self.winners, best[:, None], axis=1)[:, 0] == targets

    def factors(self, weights: Float[Array, " t"]) -> tuple[Array, Array]:
        """Return what makes weight (softmax - one-hot) of exps: factors and targets' elements.

        The element of the target, which is close to -1 or to 0, is made from its own logit: exps
        are rounded.

        Returns:
          [t, tiles] and [t], float32.
        """
        log_total = self.log_total()
        factors = weights[:, None] * jnp.exp(self.maxima - log_total[:, None])
        return factors, weights * jnp.expm1(self.target - log_total)
