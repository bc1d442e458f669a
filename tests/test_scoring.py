"""Scores are those of the plain forward pass, whatever the batch; windows score each token once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from compiling import quick_jit

from dsv4_jax import InputError, ModelConfig, Runtime, Transformer, init_params
from dsv4_jax.scoring import (
    MOST_ROWS,
    SMALLEST_LENGTH,
    Row,
    check_windows,
    score_rows,
    windows,
)

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, layer_types=("csa",), moe_types=("learned",),
    num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
    o_lora_rank=4, sliding_window=4, csa_ratio=2, index_n_heads=2, index_head_dim=8, index_topk=2,
    max_position_embeddings=256, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, hc_mult=2, hc_sinkhorn_iters=3, num_nextn_predict_layers=0,
    initializer_range=0.5,
)  # fmt: skip
RUNTIME = Runtime()
LONGEST = 130  # tokens
TOLERANCE = 1e-5  # relative, of sums of float32 log-likelihoods


pytestmark = pytest.mark.usefixtures("quick_scores")


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def log_softmax(params):
    """The log-probabilities that the plain forward pass gives to all ids after each token.

    It reads any tokens after those that are asked for, so that it has one shape.
    """
    apply = quick_jit(Transformer(CONFIG, RUNTIME).apply)

    def of(tokens: np.ndarray) -> np.ndarray:
        logits = apply({"params": params}, np.resize(tokens, (1, LONGEST)))[0, : len(tokens)]
        return np.asarray(jax.nn.log_softmax(logits), float)

    return of


def random_row(length: int, first: int, seed: int = 0) -> Row:
    tokens = np.random.default_rng([length, seed]).integers(CONFIG.vocab_size, size=length)
    return Row(tokens.astype(np.int32), first)


def expected(log_softmax, row: Row) -> tuple[float, bool]:
    table = log_softmax(row.tokens)[row.first - 1 : -1]
    targets = row.tokens[row.first :]
    likeliest = table.argmax(axis=-1)
    return table[np.arange(len(targets)), targets].sum(), bool((likeliest == targets).all())


def test_scores_are_those_of_the_forward_pass(params, log_softmax):
    sizes = (2, 1), (65, 1), (66, 40), (100, 99), (129, 1), (130, 129)
    rows = [random_row(length, first) for length, first in sizes]
    scores = score_rows(CONFIG, RUNTIME, params, rows)
    for row, score in zip(rows, scores, strict=True):
        total, greedy = expected(log_softmax, row)
        assert score.log_likelihood == pytest.approx(total, rel=TOLERANCE)
        assert score.greedy is greedy


def test_tokens_that_the_model_itself_would_take_are_greedy(params, log_softmax):
    tokens = list(random_row(20, 1).tokens)
    for _ in range(3):
        tokens.append(int(log_softmax(np.array(tokens))[-1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % CONFIG.vocab_size]
    rows = [Row(np.array(tokens), 20), Row(np.array(other), 20), Row(np.array(other), 22)]
    scores = score_rows(CONFIG, RUNTIME, params, rows)
    assert [score.greedy for score in scores] == [True, False, False]


def test_a_row_without_scored_tokens_has_likelihood_1(params):
    (score,) = score_rows(CONFIG, RUNTIME, params, [Row(np.array([3]), 1)])
    assert score == (0.0, True)


def test_scores_come_in_the_order_of_the_rows_in_whatever_batches(params):
    rows = [random_row(2 + n % 3, 1, seed=n) for n in range(MOST_ROWS + 3)]
    rows.insert(1, random_row(SMALLEST_LENGTH + 2, 5))
    together = score_rows(CONFIG, RUNTIME, params, rows)
    alone = score_rows(CONFIG, RUNTIME, params, rows, batch_tokens=1)
    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=TOLERANCE)
        assert one.greedy is other.greedy


@pytest.mark.parametrize("row, message", [
    (Row(np.array([1, 32]), 1), "expected 0 to 31"),
    (Row(np.array([1, 2]), 0), "expected a first scored token of 1 to 2, .* got 0; begin with BOS"),
    (Row(np.array([], int), 1), "of 1 to 0"),
    (random_row(258, 1), "at most 256 tokens before the last .* got 257; score it in windows"),
])
def test_a_bad_row_is_refused(params, row, message):
    with pytest.raises(InputError, match=message):
        score_rows(CONFIG, RUNTIME, params, [row])


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9, 20])
@pytest.mark.parametrize("context, stride", [(4, 4), (4, 1), (4, 3), (1, 1), (30, 7)])
def test_windows_score_every_token_once_with_a_full_context(count, context, stride):
    tokens = np.arange(count)
    rows = list(windows(tokens, context=context, stride=stride))
    scored = [row.tokens[row.first :].tolist() for row in rows]
    assert sum(scored, []) == tokens[1:].tolist()
    for row in rows:
        last = row.tokens[-1]
        assert row.tokens.tolist() == list(range(max(0, last - context), last + 1))
    assert all(len(part) == stride for part in scored[1:-1])


def test_windows_as_long_as_their_stride_are_those_of_the_evaluation_harness():
    # The example in the documentation of lm_eval's `LM.loglikelihood_rolling`; -1 is the prefix.
    rows = windows(np.arange(-1, 10), context=4, stride=4)
    assert [(row.tokens[:-1].tolist(), row.tokens[row.first :].tolist()) for row in rows] == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9]),
    ]  # fmt: skip


@pytest.mark.parametrize("context, stride, message", [
    (0, 1, "context: expected 1 to 256 .* got 0"),
    (257, 1, "context: expected 1 to 256 .* got 257"),
    (8, 9, "stride: expected 1 to 8 .* got 9"),
    (8, 0, "stride: expected 1 to 8 .* got 0"),
])
def test_impossible_windows_are_refused(context, stride, message):
    with pytest.raises(InputError, match=message):
        check_windows(CONFIG, context, stride)
