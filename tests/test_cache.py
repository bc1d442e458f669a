"""A cache changes nothing: any way of reading a row gives the logits of one forward pass."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from test_hf_parity import CASES, HEAVY_CASES, oracle_of

from dsv4_jax import InputError, Runtime, Transformer, cache
from dsv4_jax.attention import cached
from dsv4_jax.cache import init_cache
from dsv4_jax.config import CSA

# Of the largest logit: float32 sums of other order. A choice of entries that rounding decides
# would show as a thousand times more.
SAME_SUMS = 1e-5
ROWS = 3
ROOM = 256
FLOAT32 = Runtime()

# Widths of a call: one token; fewer than any window; several windows, with a ragged last one.
WIDTHS = (1, 5, 61)


@functools.cache
def reader(name: str, runtime: Runtime, entry_tile: int = 256, index_tile: int = 8192):
    """Return a function that reads tokens into a cache and returns logits and the cache."""
    model = Transformer(CASES[name][0], runtime)
    params = {"params": oracle_of(name)[1]}

    def read(tokens, count, state):
        features, state = model.apply(params, tokens, count, state, method="extend")
        return features.logits, state

    return quick_jit(read)


@functools.cache
def rows_and_logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of tokens and the logits of one forward pass over them."""
    config, lengths = CASES[name]
    shape = (ROWS, max(lengths) + 40)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, shape).astype(np.int32)
    apply = quick_jit(Transformer(config).apply)
    return tokens, np.asarray(apply({"params": oracle_of(name)[1]}, tokens))


def empty(name: str, runtime: Runtime = FLOAT32):
    return init_cache(CASES[name][0], runtime, rows=ROWS, max_length=ROOM)


def read_all(read, tokens: np.ndarray, state, counts) -> tuple[np.ndarray, object]:
    """Read rows in calls of the given widths and counts; return the logits of all tokens."""
    out, done = np.full((*tokens.shape, 0), np.nan), np.zeros(len(tokens), int)
    for width, count in counts:
        count = np.minimum(count, tokens.shape[1] - done)
        part = np.zeros((len(tokens), width), np.int32)
        for row, n in enumerate(count):
            part[row, :n] = tokens[row, done[row] : done[row] + n]
        logits, state = read(part, jnp.asarray(count, jnp.int32), state)
        if out.shape[2] == 0:
            out = np.full((*tokens.shape, logits.shape[2]), np.nan, np.float32)
        for row, n in enumerate(count):
            out[row, done[row] : done[row] + n] = logits[row, :n]
        done += count
    assert np.array_equal(state.length, done)
    return out, state


def ragged(rng, length: int, widths=WIDTHS) -> list[tuple[int, np.ndarray]]:
    """Return calls in which rows go on at their own pace, until all have read their tokens."""
    calls, done = [], np.zeros(ROWS, int)
    while done.min() < length:
        width = int(rng.choice(widths))
        count = rng.integers(0, width + 1, ROWS)
        calls.append((width, count))
        done = np.minimum(done + count, length)
    return calls


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= SAME_SUMS * np.abs(expected).max()


@pytest.mark.parametrize("name", HEAVY_CASES)
def test_any_chunks_give_the_logits_of_one_pass(name):
    """One call; token by token; and rows that go on at their own pace, in calls of any width."""
    tokens, expected = rows_and_logits(name)
    read, length, rng = reader(name, Runtime()), tokens.shape[1], np.random.default_rng(2)
    one_call = [(length, np.full(ROWS, length))]
    by_token = [(1, np.ones(ROWS, int))] * length
    for calls in (one_call, by_token, *(ragged(rng, length) for _ in range(3))):
        assert_same(read_all(read, tokens, empty(name), calls)[0], expected)


@pytest.mark.parametrize("name", ["flash-like", "unrolled"])
def test_tiles_change_nothing(name, monkeypatch):
    """Stored entries in many tiles, of which the last of the index overlaps the one before."""
    monkeypatch.setattr(cache, "ENTRY_TILE", 4)
    monkeypatch.setattr(cached, "ENTRY_TILE", 4)
    monkeypatch.setattr(cached, "INDEX_TILE", 7)
    tokens, expected = rows_and_logits(name)
    calls = ragged(np.random.default_rng(3), tokens.shape[1])
    state = empty(name)
    slots = {layer.index.entries.shape[2] for layer in state.layers.values() if layer.index}
    assert slots == {ROOM // 4} and ROOM // 4 % 7 != 0
    assert_same(read_all(reader(name, Runtime(), 4, 7), tokens, state, calls)[0], expected)


def test_a_cache_for_less_than_an_entry_is_a_cache():
    tokens, expected = rows_and_logits("flash-like")
    state = init_cache(CASES["flash-like"][0], FLOAT32, rows=ROWS, max_length=3)
    read = reader("flash-like", FLOAT32)
    assert_same(read_all(read, tokens[:, :3], state, [(3, np.full(ROWS, 3))])[0], expected[:, :3])


@pytest.mark.parametrize("end", (1, 14, 15, 40))
def test_a_layer_is_decoded_up_to_what_is_seen(end, monkeypatch):
    """In tiles, of which the last begins earlier, to end with the array."""
    monkeypatch.setattr(cached, "INDEX_TILE", 7)
    rng = np.random.default_rng(0)
    stored = jnp.asarray(rng.standard_normal((3, 2, 40, 4)), jnp.float32)
    seen = cached.read_seen(stored, jnp.int32(1), jnp.asarray([[1], [end]]), lambda x: 2 * x)
    np.testing.assert_array_equal(seen[:, :end], 2 * stored[1, :, :end])
    assert seen.shape == (2, 40, 4) and np.isfinite(seen).all()


@pytest.mark.parametrize("csa", ["sparse", "dense"])
def test_all_entries_are_attended_where_the_index_cannot_choose(csa):
    """With room for no more entries than the best, or trained densely: the forward's own way."""
    config, _ = CASES["flash-like"]
    context = {"dense": config.max_position_embeddings, "sparse": 4 * config.index_topk}[csa]
    config = dataclasses.replace(config, max_position_embeddings=context)
    assert cached.sees_all_entries(config) == (csa == "sparse")
    length = min(context, 40)
    model, params = Transformer(config, Runtime(csa=csa)), {"params": oracle_of("flash-like")[1]}
    tokens = rows_and_logits("flash-like")[0][:, :length]
    expected = np.asarray(quick_jit(model.apply)(params, tokens))
    state = init_cache(config, Runtime(), rows=ROWS, max_length=context)

    @quick_jit
    def read(tokens, count, state):
        features, state = model.apply(params, tokens, count, state, method="extend")
        return features.logits, state

    calls = [(length, np.full(ROWS, 7)), (1, np.ones(ROWS, int)), (length, np.full(ROWS, length))]
    assert_same(read_all(read, tokens, state, calls)[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_used_again_carries_nothing_over(name):
    """Bit for bit: also a prompt shorter than a block, after a longer request."""
    tokens, _ = rows_and_logits(name)
    read = reader(name, Runtime())
    short = tokens[::-1, 3:6]
    calls = [(1, np.ones(ROWS, int))] * short.shape[1]
    fresh, _ = read_all(read, short, empty(name), calls)
    long_calls = [(61, np.full(ROWS, 61))] * 2
    _, used = read_all(read, tokens, empty(name), long_calls)
    again, _ = read_all(read, short, used._replace(length=jnp.zeros(ROWS, jnp.int32)), calls)
    assert np.array_equal(again, fresh)


@pytest.mark.parametrize("name", CASES)
def test_a_row_forgets_its_last_token(name):
    """At every length, by its length alone: the logits are bit for bit those without the token."""
    tokens, _ = rows_and_logits(name)
    read, wrong = reader(name, Runtime()), (tokens + 1) % CASES[name][0].vocab_size
    one, state, spoilt = jnp.ones(ROWS, jnp.int32), empty(name), empty(name)
    for place in range(tokens.shape[1]):
        expected, state = read(tokens[:, place : place + 1], one, state)
        _, spoilt = read(wrong[:, place : place + 1], one, spoilt)
        spoilt = spoilt._replace(length=spoilt.length - 1)
        actual, spoilt = read(tokens[:, place : place + 1], one, spoilt)
        assert np.array_equal(actual, expected), place


@pytest.mark.parametrize("form, error", [("bfloat16", 0.03), ("served", 0.12)])
def test_other_formats_stay_near_float32(form, error):
    """Norm of the difference over norm: keys of 8 bits; of 4 (FP8), and some other entries."""
    tokens, expected = rows_and_logits("unrolled")
    runtime = Runtime(cache=form)
    calls = ragged(np.random.default_rng(4), tokens.shape[1])
    actual, _ = read_all(reader("unrolled", runtime), tokens, empty("unrolled", runtime), calls)
    difference = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < error


def test_a_cache_of_any_format_is_read_back_as_the_chunk_saw_it():
    """Chunks of other sizes agree in every format: new keys are rounded before they are used."""
    tokens, _ = rows_and_logits("unrolled")
    runtime = Runtime(cache="served")
    read = reader("unrolled", runtime)
    calls = [(61, np.full(ROWS, 61))] * 4
    by_chunk, _ = read_all(read, tokens, empty("unrolled", runtime), calls)
    by_token, _ = read_all(
        read, tokens, empty("unrolled", runtime), [(1, np.ones(ROWS, int))] * tokens.shape[1]
    )
    # A rounding may tip where sums differ in the last bit, and another entry be chosen.
    near = np.abs(by_chunk - by_token).max(axis=-1) <= SAME_SUMS * np.abs(by_token).max()
    assert near[:, :20].all() and near.mean() > 0.5


@pytest.mark.parametrize("change, message", [
    ({"rows": 0}, "rows: expected at least 1, got 0"),
    ({"max_length": 0}, "max_length: expected 1 to 256 tokens"),
    ({"max_length": 257}, r"max_length: expected 1 to 256 .*max_position_embeddings.* got 257"),
    ({"drafting": True}, "drafting: expected a model with multi-token prediction"),
])
def test_an_impossible_cache_is_refused(change, message):
    options = {"rows": 1, "max_length": 8} | change
    with pytest.raises(InputError, match=message):
        init_cache(CASES["flash-like"][0], Runtime(), **options)


def test_a_format_that_cannot_hold_the_index_keys_is_refused():
    config = CASES["flash-like"][0]
    assert CSA in config.layer_types and config.index_head_dim == 12
    with pytest.raises(InputError, match="index keys in FP4: expected index_head_dim"):
        init_cache(config, Runtime(cache="served"), rows=1, max_length=8)


def test_every_leaf_can_be_donated():
    """No two leaves share memory, so that a step can take the whole cache over."""
    leaves = jax.tree.leaves(empty("flash-like"))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
