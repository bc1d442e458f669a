"""Tokens are drawn from the stated distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import InputError
from dsv4_jax.sampling import check_sampling, draw_token, draw_tokens

DRAWS = 4000
SIGMAS = 5  # of a frequency over so many draws: fails by chance once in a million


def frequencies(probabilities, temperature: float, top_p: float) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.log(jnp.array(probabilities))
    kind = check_sampling(temperature, top_p).kind
    draw = jax.vmap(lambda key: draw_token(key, logits, temperature, top_p, kind=kind))
    return np.bincount(draw(keys), minlength=len(probabilities)) / DRAWS


@pytest.mark.parametrize(("temperature", "top_p", "expected"), [
    (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
    (1.0, 0.7, [0, 5 / 8, 0, 3 / 8]),  # the two that reach 0.7 together
    (1.0, 0.45, [0, 1, 0, 0]),  # the likeliest alone has it
    (1.0, 0.9, [3 / 19, 10 / 19, 0, 6 / 19]),
    (0.5, 1.0, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),  # squared and normalised
    (0.5, 0.9, [0, 100 / 136, 0, 36 / 136]),
    (0, 1.0, [0, 1, 0, 0]),
    (0, 0.1, [0, 1, 0, 0]),
])
def test_tokens_are_drawn_from_the_stated_distribution(temperature, top_p, expected):
    expected = np.array(expected)
    error = np.abs(frequencies([0.15, 0.5, 0.05, 0.3], temperature, top_p) - expected)
    assert np.all(error <= SIGMAS * np.sqrt(expected * (1 - expected) / DRAWS))


def test_a_row_s_key_and_position_alone_decide():
    logits = jnp.tile(jnp.linspace(0, 1, 50), (4, 1))
    keys = jax.random.split(jax.random.key(1), 4)
    sampling = jnp.array([1.0, 1.0])

    def draw(rows, positions):
        positions = jnp.asarray(positions)
        return draw_tokens(keys[rows], positions, logits[rows], sampling, kind="plain")

    together = draw(np.arange(4), [3, 5, 5, 9])
    assert [int(draw(np.array([row]), [place])[0]) for row, place in
            enumerate([3, 5, 5, 9])] == together.tolist()
    many = np.stack([draw(np.arange(4), [place] * 4) for place in range(20)])
    assert len(np.unique(many)) > 20  # neither the row nor the position is left out


@pytest.mark.parametrize(("temperature", "top_p", "message"), [
    (-0.1, 1.0, "temperature: expected 0 .* got -0.1"),
    (float("nan"), 1.0, "temperature: expected 0"),
    (float("inf"), 1.0, "temperature: expected 0"),
    ("1", 1.0, "temperature: expected a number, got '1'"),
    (True, 1.0, "temperature: expected a number, got True"),
    (1.0, 0.0, "top_p: expected more than 0 and at most 1, got 0"),
    (1.0, 1.01, "top_p: expected .* got 1.01"),
    (1.0, -1, "top_p: expected .* got -1"),
    (1.0, float("nan"), "top_p: expected .* got nan"),
])
def test_settings_out_of_their_range_are_refused(temperature, top_p, message):
    with pytest.raises(InputError, match=message):
        check_sampling(temperature, top_p)
