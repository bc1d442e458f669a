"""Choose experts for tokens and measure how even the choice is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.shapes import Array, Bool, Float, Int

# Keeps normalised weights finite when every score is 0.
WEIGHT_FLOOR = 1e-20


class Routing(NamedTuple):
    """The experts of each token and the weights of their outputs."""

    experts: Int[Array, "b t a"]
    weights: Float[Array, "b t a"]


def affinity(logits: Float[Array, "*rows e"]) -> Float[Array, "*rows e"]:
    """Return sqrt(softplus(logits)) with a gradient that stays finite.

    Far below zero softplus(x) is exp(x) to float32 precision, and its root exp(x / 2), whose
    gradient does not divide by the vanishing root.

    Source: report 2.1; fact sheet 3.
    """
    low = -20.0
    root = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, low)))
    return jnp.where(logits < low, jnp.exp(jnp.minimum(logits, low) / 2), root)


def best_experts(
    scores: Float[Array, "b t e"], bias: Float[Array, " e"], count: int
) -> Int[Array, "b t a"]:
    """Return the `count` experts of highest biased score; the bias serves the choice alone."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, count)[1]


def route(
    scores: Float[Array, "b t e"], experts: Int[Array, "b t a"], scale: float
) -> Routing:
    """Weight the chosen experts by their scores, normalised to a sum of `scale`."""
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    total = jnp.sum(chosen, axis=-1, keepdims=True) + WEIGHT_FLOOR
    return Routing(experts, chosen / total * scale)


def balanced_table(key: Array, vocab: int, experts: int, per_token: int) -> Int[Array, "v a"]:
    """Assign distinct experts to every token id, each expert equally often.

    Rows are consecutive stretches of random orders of the experts, dealt to the token ids at
    random. V4's own table is not published.
    """
    rounds = -(-vocab // experts)
    deal, shuffle = jax.random.split(key)
    orders = jax.vmap(lambda k: jax.random.permutation(k, experts))(jax.random.split(deal, rounds))
    slot = jnp.arange(experts)[:, None] * per_token + jnp.arange(per_token)
    rows = orders[:, slot % experts].reshape(rounds * experts, per_token)[:vocab]
    return jax.random.permutation(shuffle, rows).astype(jnp.int32)


def expert_load(
    experts: Int[Array, "b t a"], count: int, valid: Bool[Array, "b t"]
) -> Float[Array, " e"]:
    """Count the token slots of each expert."""
    slots = jnp.broadcast_to(valid[..., None], experts.shape).astype(jnp.float32)
    return jnp.zeros(count, jnp.float32).at[experts.reshape(-1)].add(slots.reshape(-1))


def sequence_balance(
    scores: Float[Array, "b t e"], per_token: int, valid: Bool[Array, "b t"]
) -> Float[Array, ""]:
    """Return the mean over rows of sum_e f_e P_e, which is 1 when a row's load is even.

    f_e = E / (a T) * count of the T tokens with e among their a best unbiased scores; P_e = mean
    over tokens of the scores normalised over experts. A row of the batch is one sequence.

    Source: fact sheet 3 (V3's form; whether V4 means documents or rows is not published).
    """
    experts = scores.shape[-1]
    mask = valid.astype(jnp.float32)[..., None]
    tokens = jnp.maximum(jnp.sum(mask, axis=1), 1)
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), per_token)[1]
    chosen = jnp.sum(jax.nn.one_hot(best, experts), axis=2)
    frequency = jnp.sum(chosen * mask, axis=1) / tokens * (experts / per_token)
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + WEIGHT_FLOOR)
    share = jnp.sum(share * mask, axis=1) / tokens
    return jnp.mean(jnp.sum(frequency * share, axis=-1))


def updated_bias(
    bias: Float[Array, "*z e"], load: Float[Array, "*z e"], rate: float
) -> Float[Array, "*z e"]:
    """Move the selection bias towards even load: b + rate * sign(mean(load) - load).

    Source: report 2.1 and 4.2.1 (auxiliary-loss-free balancing, rate 0.001).
    """
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
