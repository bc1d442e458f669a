"""Draw tokens from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.errors import InputError
from dsv4_jax.shapes import Array, Float, Int

GREEDY, PLAIN, NUCLEUS = "greedy", "plain", "nucleus"


class Sampling(NamedTuple):
    """How tokens are drawn."""

    temperature: float  # divides the logits; 0 takes the likeliest token
    top_p: float  # of the mass: the smallest set of likeliest tokens that holds it is drawn from

    @property
    def kind(self) -> str:
        """The way that needs least work."""
        if self.temperature == 0:
            return GREEDY
        return PLAIN if self.top_p == 1 else NUCLEUS


def check_sampling(temperature: float, top_p: float) -> Sampling:
    """Return the settings, or raise an InputError for one that is out of its range."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name}: expected a number, got {value!r}")
    if not 0 <= temperature < math.inf:
        raise InputError(
            f"temperature: expected 0 (the likeliest token) or more, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: expected more than 0 and at most 1, got {top_p}")
    return Sampling(float(temperature), float(top_p))


def draw_token(
    key: Array, logits: Float[Array, " v"], temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float, *, kind: str,
) -> Int[Array, ""]:
    """Draw one token id in the way that `Sampling.kind` names."""
    if kind == GREEDY:
        return jnp.argmax(logits)
    logits = logits / temperature
    if kind == PLAIN:
        return jax.random.categorical(key, logits)
    order = jnp.argsort(-logits)
    probabilities = jax.nn.softmax(logits[order])
    before = jnp.cumsum(probabilities) - probabilities
    kept = jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf)
    return order[jax.random.categorical(key, kept)]


def draw_tokens(
    keys: Array, positions: Int[Array, " b"], logits: Float[Array, "b v"],
    sampling: Float[Array, " 2"], *, kind: str,
) -> Int[Array, " b"]:
    """Draw a token for each row.

    A row's key and the token's position alone decide the chance, so that neither the batch nor
    speculation changes what is drawn.

    Args:
      keys: one for each row.
      positions: of the tokens to draw.
      sampling: temperature and top_p.
    """

    def draw(key, position, logits):
        key = jax.random.fold_in(key, position)
        return draw_token(key, logits, sampling[0], sampling[1], kind=kind)

    return jax.vmap(draw)(keys, positions, logits).astype(jnp.int32)
