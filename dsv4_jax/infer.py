"""Write text with a model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.errors import InputError
from dsv4_jax.model import Transformer
from dsv4_jax.shapes import Array, Float
from dsv4_jax.token_ids import check_token_ids


def sample_token(
    key: Array, logits: Float[Array, " v"], temperature: float, top_p: float
) -> Array:
    """Draw a token id from the smallest set of likeliest tokens that holds top_p of the mass.

    Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return jnp.argmax(logits)
    order = jnp.argsort(-logits)
    probabilities = jax.nn.softmax(logits[order] / temperature)
    before = jnp.cumsum(probabilities) - probabilities
    kept = jnp.where(before < top_p, jnp.log(probabilities), -jnp.inf)
    return order[jax.random.categorical(key, kept)]


def generate(
    model: Transformer, params: dict, prompt: np.ndarray, *, max_new_tokens: int,
    temperature: float, top_p: float, seed: int, stop_id: int | None = None,
) -> np.ndarray:
    """Continue a prompt token by token, each from a forward pass over the whole padded row.

    Args:
      prompt: ids, at least one.
      temperature: divides the logits; 0 takes the likeliest token.
      stop_id: ends the text when it is drawn; it is not returned.
    Returns:
      The new ids, at most max_new_tokens.
    Raises:
      InputError: the prompt is empty or has ids outside the vocabulary.
    """
    if len(prompt) == 0:
        raise InputError("prompt: expected at least one token, got none; begin with BOS")
    check_token_ids(prompt, model.config.vocab_size)
    row = np.zeros((1, len(prompt) + max_new_tokens), np.int32)
    row[0, : len(prompt)] = prompt
    key = jax.random.key(seed)
    for length in range(len(prompt), row.shape[1]):
        key, subkey = jax.random.split(key)
        token = int(_draw(model, params, row, length, subkey, temperature, top_p))
        if token == stop_id:
            return row[0, len(prompt) : length]
        row[0, length] = token
    return row[0, len(prompt) :]


@partial(jax.jit, static_argnames=("model", "temperature", "top_p"))
def _draw(model: Transformer, params, tokens, length, key, temperature: float, top_p: float):
    """Draw the token after the first `length`; causal attention never sees what follows them."""
    logits = model.apply({"params": params}, tokens)
    return sample_token(key, logits[0, length - 1], temperature, top_p)
