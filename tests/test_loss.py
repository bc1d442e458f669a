"""Targets and losses against loops over plain numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import chunks, loss
from dsv4_jax.attention.layout import tokens_ahead
from dsv4_jax.loss import next_token_loss, shifted_targets, token_nats, token_scores

VOCAB, WIDTH = 11, 9
ROUNDING = 1e-6  # float32 sums of a few dozen terms, relative
GRADIENT = 1e-5  # the same; gradients are of order 1
BFLOAT16 = 2**-7  # up to three roundings to 8 bits, relative to the largest
PACKED = np.array([
    [3, 3, 3, 5, 5, 5, 5, 0, 0],  # documents, then padding
    [0, 2, 1, 1, 7, 7, 0, 4, 4],  # padding in front and between, documents of one token
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
])


def random_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(1, VOCAB, (rows, length)).astype(np.int32)


def loop_over_targets(tokens, segment_ids, shift):
    """Yield (row, place, target) of all tokens that have a target."""
    for row, place in np.ndindex(tokens.shape):
        if place + shift < tokens.shape[1]:
            ids = segment_ids[row, place : place + shift + 1]
            if ids[0] > 0 and (ids == ids[0]).all():
                yield row, place, tokens[row, place + shift]


def forms_of(segment_ids: np.ndarray) -> list:
    """Return the ways to say the same: rows of one document each need no ids."""
    return [jnp.asarray(segment_ids), None][: 2 if (segment_ids == 1).all() else 1]


CASES = [(PACKED, shift) for shift in (1, 2)]
CASES += [(np.array([[1, 2, 1, 1, 2, 1, 3, 3]]), 2)]  # ids that come again
CASES += [(np.ones((2, length), int), shift) for length in (1, 2, 3, 9) for shift in (1, 2)]


@pytest.mark.parametrize("segment_ids, shift", CASES)
def test_shifted_targets(segment_ids, shift):
    tokens = random_tokens(*segment_ids.shape)
    expected = np.zeros(tokens.shape)
    for row, place, target in loop_over_targets(tokens, segment_ids, shift):
        expected[row, place] = target
    for form in forms_of(segment_ids):
        targets, weights = shifted_targets(jnp.asarray(tokens), form, shift)
        assert targets.shape == weights.shape == tokens.shape
        np.testing.assert_array_equal(weights, expected > 0)
        np.testing.assert_array_equal(targets * weights, expected)


@pytest.mark.parametrize("segment_ids", [PACKED, np.ones((2, 1), int), np.ones((2, 6), int)])
def test_tokens_ahead(segment_ids):
    tokens = random_tokens(*segment_ids.shape)
    expected = np.zeros(tokens.shape)
    for row, place, target in loop_over_targets(tokens, segment_ids, 1):
        expected[row, place] = target
    for form in forms_of(segment_ids):
        after, exists = tokens_ahead(jnp.asarray(tokens), form, 1)
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_array_equal(exists, expected > 0)


def random_operands(shape: tuple[int, ...], scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Return hidden vectors and a head; logits have a deviation of about 3 * scale."""
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((*shape, WIDTH)), rng.standard_normal((WIDTH, VOCAB))
    return jnp.asarray(scale * hidden, jnp.float32), jnp.asarray(head, jnp.float32)


def negative_log_probability(hidden, head, target: int) -> float:
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    return np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target]


@pytest.mark.parametrize("chunk_elements, pieces", [(2**18, (1, 7)), (18, (3, 3)), (1, (7, 1))])
def test_token_nats(chunk_elements, pieces, monkeypatch):
    """Cut into pieces or not, value and gradients are those of a loop and of one piece."""
    hidden, head = random_operands((2, 7))
    targets = random_tokens(2, 7)
    weights = np.random.default_rng(1).random((2, 7)).astype(np.float32)
    monkeypatch.setattr(
        chunks, "CHUNK_ELEMENTS", dict.fromkeys(chunks.CHUNK_ELEMENTS, chunk_elements)
    )
    count, size = pieces
    assert loss.split(targets, loss._elements(hidden, head)).shape == (count, 2, size)
    run = jax.jit(jax.value_and_grad(token_nats, argnums=(0, 1, 3)))
    nats, gradients = run(hidden, head, targets, weights)
    each = np.array([
        negative_log_probability(hidden[place], head, targets[place])
        for place in np.ndindex(2, 7)
    ]).reshape(2, 7)
    assert nats == pytest.approx(np.sum(weights * each), rel=ROUNDING)
    alone = jax.jit(token_nats)(hidden, head, targets, weights)
    assert alone == pytest.approx(float(nats), rel=ROUNDING)
    error = jax.nn.softmax(hidden @ head) - jax.nn.one_hot(targets, VOCAB)
    error = error * weights[..., None]
    np.testing.assert_allclose(gradients[0], error @ head.T, atol=GRADIENT)
    np.testing.assert_allclose(
        gradients[1], np.einsum("btd,btv->dv", hidden, error), atol=GRADIENT
    )
    np.testing.assert_allclose(gradients[2], each, atol=GRADIENT)


def test_token_nats_of_bfloat16_are_those_of_rounded_factors():
    """Sums are float32; the gradients, made with a rounded error, are rounded themselves."""
    hidden, head = random_operands((2, 7))
    targets, weights = random_tokens(2, 7), jnp.ones((2, 7))
    run = jax.jit(jax.value_and_grad(lambda h, w: 3 * token_nats(h, w, targets, weights), (0, 1)))
    nats, gradients = run(hidden.astype(jnp.bfloat16), head)
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))
    expected, exact = run(*rounded)
    assert nats == pytest.approx(float(expected), rel=ROUNDING)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    for found, wanted in zip(gradients, exact, strict=True):
        error = np.abs(found.astype(jnp.float32) - wanted).max()
        assert error <= BFLOAT16 * np.abs(wanted).max()


@pytest.mark.parametrize("chunk_elements", [2**18, 18, 1])
def test_token_scores(chunk_elements, monkeypatch):
    """Cut into pieces or not, each score is that of a loop."""
    hidden, head = random_operands((2, 7))
    monkeypatch.setattr(
        chunks, "CHUNK_ELEMENTS", dict.fromkeys(chunks.CHUNK_ELEMENTS, chunk_elements)
    )
    likeliest = np.argmax(hidden @ head, axis=-1)
    targets = np.where(np.arange(7) % 2, likeliest, random_tokens(2, 7))
    scores, greedy = jax.jit(token_scores)(hidden, head, targets)
    for place in np.ndindex(2, 7):
        expected = -negative_log_probability(hidden[place], head, targets[place])
        assert scores[place] == pytest.approx(expected, rel=GRADIENT)
    np.testing.assert_array_equal(greedy, targets == likeliest)


def test_token_scores_hold_the_logits_of_a_stretch_alone():
    hidden, head = jnp.zeros((1, 4096, 4)), jnp.zeros((4, 4096))
    compiled = jax.jit(token_scores).lower(hidden, head, jnp.zeros((1, 4096), int)).compile()
    logits = 4 * hidden.shape[1] * head.shape[1]  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4


def test_token_nats_of_large_logits_stay_finite():
    hidden, head = random_operands((2, 7), scale=1e4)
    run = jax.jit(jax.value_and_grad(token_nats, argnums=(0, 1)))
    nats, gradients = run(hidden, head, random_tokens(2, 7), jnp.ones((2, 7)))
    assert np.isfinite(nats) and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("segment_ids", [PACKED, np.ones((2, 6), int)])
def test_next_token_loss(segment_ids):
    tokens, (hidden, head) = random_tokens(*segment_ids.shape), random_operands(segment_ids.shape)
    losses = [
        negative_log_probability(hidden[row, place], head, target)
        for row, place, target in loop_over_targets(tokens, segment_ids, 1)
    ]
    for form in forms_of(segment_ids):
        mean = jax.jit(next_token_loss)(hidden, head, tokens, form)
        assert mean == pytest.approx(np.mean(losses), rel=ROUNDING)


def test_loss_of_even_logits_is_the_log_of_the_vocabulary():
    hidden, head = random_operands((2, 5), scale=0.0)
    mean = next_token_loss(hidden, head, random_tokens(2, 5))
    assert mean == pytest.approx(np.log(VOCAB), rel=ROUNDING)


@pytest.mark.parametrize("segment_ids", [None, [[0, 0, 0, 0]], [[1, 2, 3, 0]]])
def test_loss_without_successors_is_zero(segment_ids):
    length = 1 if segment_ids is None else 4
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    hidden, head = random_operands((1, length))
    tokens = random_tokens(1, length)
    mean, gradient = jax.jit(jax.value_and_grad(next_token_loss))(hidden, head, tokens, segment_ids)
    assert mean == 0
    np.testing.assert_array_equal(gradient, 0)


def test_loss_moves_only_tokens_that_have_a_successor():
    tokens, (hidden, head) = random_tokens(*PACKED.shape), random_operands(PACKED.shape)
    gradient = jax.jit(jax.grad(next_token_loss))(hidden, head, tokens, jnp.asarray(PACKED))
    expected = np.zeros(PACKED.shape, bool)
    for row, place, _ in loop_over_targets(tokens, PACKED, 1):
        expected[row, place] = True
    np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, expected)
