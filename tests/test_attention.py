"""Attention against a dense softmax, entries against loops, and the choice of entries."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax import linen as nn

from dsv4_jax import ModelConfig, Runtime, chunks
from dsv4_jax.attention import core, csa
from dsv4_jax.attention.compressor import Compressor, overlap, pool
from dsv4_jax.attention.core import all_visible, attend_hybrid, attend_window
from dsv4_jax.attention.csa import attend_csa
from dsv4_jax.attention.indexer import IndexQueries, index_scores, top_entries, top_mask
from dsv4_jax.attention.layout import block_starts, document_offsets, entry_layout
from dsv4_jax.config import CSA, HCA, LEARNED, WINDOW
from dsv4_jax.rope import frequencies, rotation

ROUNDING = 1e-5  # of the largest element: float32 products and sums of other order

HEADS, WIDTH, INDEX_HEADS, INDEX_WIDTH = 3, 4, 16, 5
WINDOW_SIZE, RATIO, TOPK = 5, 2, 3

# Document ids; borders lie inside blocks of the window's size and on them.
PACKED = np.array([
    [4] * 3 + [9] * 9 + [1] * 6 + [0] * 5,  # padding behind
    [2] * 5 + [1] + [3] + [5] * 16,  # documents of one token; a border on a block's
    [0] * 2 + [6] * 13 + [0] * 3 + [7] * 5,  # padding in front and between
])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_close(actual, expected, tolerance: float = ROUNDING) -> None:
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    limit = tolerance * np.maximum(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(actual - expected).max(initial=0) <= limit


def documents_of(ids: np.ndarray) -> list[range]:
    """Return the documents of a row, padding left out."""
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    ranges = (range(a, b) for a, b in zip(borders, borders[1:], strict=False))
    return [tokens for tokens in ranges if ids[tokens.start] > 0]


def blocks_of(ids: np.ndarray, ratio: int) -> list[tuple[range, range]]:
    """Return (document, block) of each complete block of a row, in order."""
    return [
        (document, range(start, start + ratio))
        for document in documents_of(ids)
        for start in range(document.start, document.stop - ratio + 1, ratio)
    ]


def dense_masks(
    ids: np.ndarray, ratio: int, window: int = WINDOW_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens and which entries each token of the rows sees, by loops."""
    b, t = ids.shape
    tokens, entries = np.zeros((b, t, t), bool), np.zeros((b, t, t // ratio), bool)
    for row in range(b):
        for document in documents_of(ids[row]):
            for query in document:
                near = range(max(document.start, query - window + 1), query + 1)
                tokens[row, query, list(near)] = True
        for entry, (document, block) in enumerate(blocks_of(ids[row], ratio)):
            seeing = [query for query in document if query >= block[-1]]
            entries[row, seeing, entry] = True
    return tokens, entries


def dense_attention(q, keys, entries, sink, token_mask, entry_mask) -> jax.Array:
    """Softmax over all tokens, entries and the sink, masked."""
    kv = jnp.concatenate([keys, entries], axis=1)
    mask = jnp.concatenate([token_mask, entry_mask], axis=-1)[:, :, None]
    logits = jnp.einsum("bqhk,bsk->bqhs", q, kv) / np.sqrt(WIDTH)
    logits = jnp.where(mask, logits, -1e30)
    sinks = jnp.broadcast_to(sink[:, None], (*q.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)
    return jnp.einsum("bqhs,bsk->bqhk", weights[..., :-1], kv)


def random_operands(b: int, t: int, slots: int) -> tuple[jax.Array, ...]:
    return (
        2 * normal(0, b, t, HEADS, WIDTH),
        2 * normal(1, b, t, WIDTH),
        2 * normal(2, b, slots, WIDTH),
        normal(3, HEADS),
    )


def value_and_gradients(function, operands, wanted: np.ndarray):
    """Return function(*operands) where wanted [b, t] and the gradients of a random sum of it."""
    weights = normal(9, *operands[0].shape) * wanted[:, :, None, None]
    out, pull = jax.vjp(function, *operands)
    return jnp.where(wanted[:, :, None, None], out, 0), pull(weights)


def assert_equal_functions(ours, dense, operands, wanted: np.ndarray) -> None:
    def run(operands):
        return [value_and_gradients(function, operands, wanted) for function in (ours, dense)]

    jax.tree.map(assert_close, *quick_jit(run)(operands))


def layout_of(shape, ratio, segment_ids):
    offsets = None if segment_ids is None else document_offsets(segment_ids)
    return entry_layout(shape, ratio, segment_ids, offsets)


jit_layout_of = jax.jit(layout_of, static_argnums=(0, 1))


def plain(*lengths: int) -> list[tuple[np.ndarray, None]]:
    """Return rows of one document, as loops and as the model see them."""
    return [(np.ones((2, t), int), None) for t in lengths]


@pytest.mark.parametrize("ids, segment_ids", plain(1, 5, 6, 11) + [(PACKED, PACKED)])
def test_window_equals_dense(ids, segment_ids):
    q, keys, _, sink = random_operands(*ids.shape, 0)
    mask, no_entries = dense_masks(ids, ratio=ids.shape[1] + 1)

    def ours(q, keys, sink):
        return attend_window(q, keys, sink, window=WINDOW_SIZE, segment_ids=segment_ids)

    def dense(q, keys, sink):
        return dense_attention(q, keys, keys[:, :0], sink, mask, no_entries)

    assert_equal_functions(ours, dense, (q, keys, sink), ids > 0)


@pytest.mark.parametrize("ratio", [RATIO, 7])
@pytest.mark.parametrize("ids, segment_ids", plain(6, 17) + [(PACKED, PACKED)])
def test_hybrid_equals_dense(ids, segment_ids, ratio):
    operands = random_operands(*ids.shape, ids.shape[1] // ratio)
    masks = dense_masks(ids, ratio)

    def ours(*operands):
        return attend_hybrid(
            *operands, window=WINDOW_SIZE, ratio=ratio, segment_ids=segment_ids,
            layout=layout_of(ids.shape, ratio, segment_ids), choose=all_visible,
        )[0]  # fmt: skip

    def dense(*operands):
        return dense_attention(*operands, *masks)

    assert_equal_functions(ours, dense, operands, ids > 0)


def test_queries_before_the_first_complete_block_see_their_window_alone():
    """With a window of one token a whole stretch of the row may come before it."""
    ids = np.ones((1, 48), np.int32)
    operands, masks = random_operands(1, 48, 3), dense_masks(ids, 16, window=1)

    def ours(*operands):
        return attend_hybrid(
            *operands, window=1, ratio=16, segment_ids=None,
            layout=layout_of(ids.shape, 16, None), choose=all_visible,
        )[0]  # fmt: skip

    assert_equal_functions(ours, lambda *x: dense_attention(*x, *masks), operands, ids > 0)


# Long rows: more entries than the window, so that a row has several stretches; the last block is
# cut. The second row is packed, with a document border in a stretch's middle.
LONG = np.array([[1] * 83, [3] * 2 + [2] * 38 + [1] * 39 + [0] * 4])


def csa_of(ids: np.ndarray, topk: int, *, sparse: bool = True, learn: bool = False):
    """Return CSA as a function of q, keys, entries, index vectors and sink."""
    return functools.partial(
        attend_csa, topk=topk, sparse=sparse, learn=learn, window=WINDOW_SIZE, ratio=RATIO,
        layout=layout_of(ids.shape, RATIO, ids), segment_ids=ids,
    )  # fmt: skip


def random_index(b: int, t: int) -> IndexQueries:
    return IndexQueries(
        normal(5, b, t, INDEX_HEADS, INDEX_WIDTH), normal(6, b, t, INDEX_HEADS),
        normal(7, b, t // RATIO, INDEX_WIDTH),
    )  # fmt: skip


def selected(ids: np.ndarray, topk: int):
    """Return CSA as a function of q, keys, entries, sink, with random index vectors."""
    index = random_index(*ids.shape)

    def attend(q, keys, entries, sink):
        return csa_of(ids, topk)(q, keys, entries, index, sink)[0]

    return attend, index


def chosen_entries(index: IndexQueries, visible: np.ndarray, topk: int) -> np.ndarray:
    """Mark the best visible entries of each query, by sorting float64 scores."""
    index = jax.tree.map(lambda x: np.asarray(x, np.float64), index)
    hits = np.maximum(np.einsum("btij,bcj->btic", index.queries, index.keys), 0)
    scores = np.einsum("btic,bti->btc", hits, index.head_weights)
    best = np.argsort(np.where(visible, -scores, np.inf), axis=-1, kind="stable")[..., :topk]
    chosen = np.zeros(visible.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen & visible


@functools.cache
def long_reference(topk: int):
    operands = random_operands(*LONG.shape, LONG.shape[1] // RATIO)
    tokens, visible = dense_masks(LONG, RATIO)
    chosen = chosen_entries(selected(LONG, topk)[1], visible, topk)


    def dense(*operands):
        return dense_attention(*operands, tokens, chosen)

    return quick_jit(lambda operands: value_and_gradients(dense, operands, LONG > 0))(operands)


ALL = LONG.shape[1]
SETTINGS = {
    "as shipped": {},
    "masked": {"MASK_UP_TO": 10**6},
    "one stretch": {"CAUSAL_STRETCHES": 1},
    "three stretches, masked": {"CAUSAL_STRETCHES": 3, "MASK_UP_TO": 10**6},
    "a few blocks at a time": {"CHUNK_ELEMENTS": 20_000},
    "a block at a time, gathered": {"CHUNK_ELEMENTS": 1, "MASK_UP_TO": 0},
}


def patch(monkeypatch, setting: dict) -> None:
    homes = {"MASK_UP_TO": csa, "CAUSAL_STRETCHES": core, "CHUNK_ELEMENTS": chunks}
    for name, value in setting.items():
        if name == "CHUNK_ELEMENTS":
            value = dict.fromkeys(chunks.CHUNK_ELEMENTS, value)
        monkeypatch.setattr(homes[name], name, value)


@pytest.mark.parametrize(
    "setting, topk", [(name, TOPK) for name in SETTINGS] + [("as shipped", ALL)]
)
def test_selected_equals_dense_in_every_form(setting, topk, monkeypatch):
    """With topk = ALL nothing is left out: sparse attention is dense."""
    patch(monkeypatch, SETTINGS[setting])
    operands, (attend, _) = random_operands(*LONG.shape, ALL // RATIO), selected(LONG, topk)
    run = quick_jit(lambda operands: value_and_gradients(attend, operands, LONG > 0))
    jax.tree.map(assert_close, run(operands), long_reference(topk))


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_have_the_forms_they_name(setting, monkeypatch):
    patch(monkeypatch, SETTINGS[setting])
    forms = []

    def recorded(q, keys, mask, compressed, sink):
        forms.append((q.shape[1], compressed.entries.ndim == 5))
        return attend(q, keys, mask, compressed, sink)

    attend = core.attend
    monkeypatch.setattr(core, "attend", recorded)
    jax.eval_shape(selected(LONG, TOPK)[0], *random_operands(*LONG.shape, ALL // RATIO))
    blocks, gathered = zip(*forms, strict=True)
    stretches = SETTINGS[setting].get("CAUSAL_STRETCHES", core.CAUSAL_STRETCHES)
    assert len(forms) == stretches
    assert any(gathered) == ("masked" not in setting)
    if "a block" in setting:
        assert set(blocks) == {1}
    elif "a few" in setting:
        assert 1 < blocks[-2] < blocks[0]  # where more entries are seen; the last is cut short


def test_index_has_no_gradient():
    operands = random_operands(*LONG.shape, LONG.shape[1] // RATIO)
    _, index = selected(LONG, TOPK)

    def loss(index):
        return jnp.sum(csa_of(LONG, TOPK)(*operands[:3], index, operands[3])[0])

    for gradient in quick_jit(jax.grad(loss))(index):
        np.testing.assert_array_equal(gradient, 0)


def dense_lesson(operands, index, token_mask, entry_mask):
    """Return KL(attention || indexer) and the attention, by query, of whole arrays."""
    q, keys, entries, sink = operands
    kv = jnp.concatenate([keys, entries], axis=1)
    mask = jnp.concatenate([token_mask, entry_mask], axis=-1)[:, :, None]
    logits = jnp.where(mask, jnp.einsum("bqhk,bsk->bqhs", q, kv) / np.sqrt(WIDTH), -1e30)
    sinks = jnp.broadcast_to(sink[:, None], (*q.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)
    mass = jnp.sum(weights[..., keys.shape[1] : -1], axis=2)
    teacher = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)
    hits = jnp.maximum(jnp.einsum("btij,bcj->btic", index.queries, index.keys), 0)
    scores = jnp.einsum("btic,bti->btc", hits, index.head_weights)
    learner = jax.nn.log_softmax(jnp.where(entry_mask, scores, -1e30), axis=-1)
    terms = jax.scipy.special.xlogy(teacher, teacher) - teacher * learner
    return jnp.sum(jnp.where(entry_mask, terms, 0), axis=-1), teacher


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("sparse", [True, False])
def test_lesson_equals_dense_in_every_form(setting, sparse, monkeypatch):
    """The divergence, its gradient, the recall; and the attention is as without the lesson."""
    patch(monkeypatch, SETTINGS[setting])
    operands = random_operands(*LONG.shape, ALL // RATIO)
    index, weights = random_index(*LONG.shape), normal(8, *LONG.shape)
    tokens, visible = dense_masks(LONG, RATIO)
    chosen = chosen_entries(index, visible, TOPK)
    mask = chosen if sparse else visible

    def ours(index):
        *rest, sink = operands
        out, lesson = csa_of(LONG, TOPK, sparse=sparse, learn=True)(*rest, index, sink)
        return jnp.sum(weights * lesson.divergence), (out, lesson)

    def dense(index):
        divergence, teacher = dense_lesson(operands, index, tokens, mask)
        return jnp.sum(weights * divergence), (divergence, teacher)

    def both(index):
        return [jax.value_and_grad(f, has_aux=True)(index) for f in (ours, dense)]

    (found, expected) = quick_jit(both)(index)
    (_, (out, lesson)), gradient = found
    (_, (divergence, teacher)), expected_gradient = expected
    assert_close(lesson.divergence, divergence)
    jax.tree.map(assert_close, gradient, expected_gradient)
    assert_close(
        jnp.where(LONG[..., None, None] > 0, out, 0),
        jnp.where(LONG[..., None, None] > 0, dense_attention(*operands, tokens, mask), 0),
    )
    chooses = (visible.sum(-1) > TOPK) & (not sparse)
    np.testing.assert_array_equal(lesson.choices, chooses)
    assert_close(lesson.recall, np.where(chooses, (teacher * chosen).sum(-1), 0))


def test_lesson_has_no_gradient_for_the_attention():
    operands, index = random_operands(*LONG.shape, ALL // RATIO), random_index(*LONG.shape)

    def loss(operands):
        *rest, sink = operands
        _, lesson = csa_of(LONG, TOPK, learn=True)(*rest, index, sink)
        return jnp.sum(lesson.divergence)

    for gradient in quick_jit(jax.grad(loss))(operands):
        np.testing.assert_array_equal(gradient, 0)


def test_index_scores_equal_a_loop():
    queries, weights, keys = normal(0, 2, 3, 4, 6, 5), normal(1, 2, 3, 4, 6), normal(2, 2, 7, 5)
    expected = np.zeros((2, 3, 4, 7))
    for b, z, q, c in np.ndindex(expected.shape):
        hits = np.asarray(queries[b, z, q], np.float64) @ np.asarray(keys[b, c], np.float64)
        expected[b, z, q, c] = np.maximum(hits, 0) @ np.asarray(weights[b, z, q], np.float64)
    assert_close(index_scores(queries, weights, keys), expected)


def scores_with_ties(rng, rows: int, slots: int) -> np.ndarray:
    """Draw scores of few values, as many zeros of either sign as a relu leaves."""
    values = np.array([-2.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 3e38, -3e38], np.float32)
    return rng.choice(values, (rows, slots))


@pytest.mark.parametrize("slots, k", [(1, 1), (7, 1), (8, 3), (8, 8), (33, 5), (64, 40)])
def test_choices_agree_with_sorting(slots, k):
    """Both give the best visible entries, the lowest index first among equals."""
    rng = np.random.default_rng(slots)
    distinct = rng.standard_normal((30, slots)).astype(np.float32)
    scores = np.concatenate([scores_with_ties(rng, 60, slots), distinct])
    visible = rng.random(scores.shape) < rng.random((90, 1)) * 1.2
    order = np.argsort(np.where(visible, -scores.astype(np.float64), np.inf), kind="stable")
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    expected &= visible

    mask, (index, exists) = quick_jit(
        lambda *args: (top_mask(*args, k), top_entries(*args, k))
    )(scores, visible)
    np.testing.assert_array_equal(mask, expected)
    assert index.shape == exists.shape == (90, k)
    of_indices = np.zeros(scores.shape, int)
    np.add.at(of_indices, (np.arange(90)[:, None], index), np.asarray(exists, int))
    np.testing.assert_array_equal(of_indices, expected)


def test_mask_takes_all_where_fewer_are_visible_than_wanted():
    scores, visible = normal(0, 5, 6), np.random.default_rng(0).random((5, 6)) < 0.5
    for k in (6, 100):
        mask = jax.jit(top_mask, static_argnums=2)(scores, visible, k)
        np.testing.assert_array_equal(mask, visible)


def test_document_offsets():
    expected = np.zeros(PACKED.shape, int)
    for row, ids in enumerate(PACKED):
        for document in documents_of(ids):
            expected[row, list(document)] = np.arange(len(document))
    offsets = np.asarray(jax.jit(document_offsets)(PACKED))
    np.testing.assert_array_equal(np.where(PACKED > 0, offsets, 0), expected)


@pytest.mark.parametrize("ratio", [2, 3, 7])
def test_layout_equals_loops(ratio):
    layout = jax.tree.map(np.asarray, jit_layout_of(PACKED.shape, ratio, PACKED))
    _, visible = dense_masks(PACKED, ratio)
    entry = np.arange(PACKED.shape[1] // ratio)
    first, end = (x[..., None] for x in (layout.first, layout.end))
    np.testing.assert_array_equal((entry >= first) & (entry < end), visible)
    for row, ids in enumerate(PACKED):
        for slot, (document, block) in enumerate(blocks_of(ids, ratio)):
            assert layout.start[row, slot] == block.start
            assert layout.has_previous[row, slot] == (block.start > document.start)


def test_layout_of_one_document_equals_that_of_no_ids():
    without_ids, packed = (jit_layout_of((2, 13), 4, ids) for ids in (None, np.ones((2, 13), int)))
    np.testing.assert_array_equal(without_ids.first, packed.first)
    np.testing.assert_array_equal(without_ids.end, packed.end)
    np.testing.assert_array_equal(packed.start, np.arange(3) * 4 + np.zeros((2, 1)))
    np.testing.assert_array_equal(packed.has_previous, [[False, True, True]] * 2)


CONFIG = ModelConfig(
    vocab_size=4, hidden_size=6, layer_types=(WINDOW,), moe_types=(LEARNED,),
    num_attention_heads=8, head_dim=8, qk_rope_head_dim=4, index_head_dim=8,
    compress_rope_theta=30.0,
)  # fmt: skip


def numpy_entries(x, params, ids, ratio: int, overlapping: bool, freqs) -> np.ndarray:
    """Make each entry of a row [t, d] by a loop, in float64; empty slots are 0."""
    x, params = np.asarray(x, np.float64), jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    entries = np.zeros((x.shape[0] // ratio, CONFIG.head_dim))

    def rows(tokens, series):
        """Return values and gates of a block's tokens in one of the series of projections."""
        at = (series,) * overlapping
        gates = x[list(tokens)] @ params["w_gate"][at] + params["position_bias"][:, *at]
        return x[list(tokens)] @ params["w_kv"][at], gates

    for slot, (document, block) in enumerate(blocks_of(ids, ratio)):
        values, gates = rows(block, 1)
        if overlapping and block.start > document.start:
            before = rows(range(block.start - ratio, block.start), 0)
            values, gates = np.concatenate([before, (values, gates)], axis=1)
        weights = np.exp(gates) / np.exp(gates).sum(axis=0)
        entry = (weights * values).sum(axis=0)
        entry *= params["norm"] / np.sqrt(np.mean(entry**2) + CONFIG.rms_norm_eps)
        pairs = entry[-2 * len(freqs) :: 2] + 1j * entry[-2 * len(freqs) + 1 :: 2]
        pairs = pairs * np.exp(1j * (block.start - document.start) * freqs)
        entry[-2 * len(freqs) :: 2], entry[-2 * len(freqs) + 1 :: 2] = pairs.real, pairs.imag
        entries[slot] = entry
    return entries


@pytest.mark.parametrize("ids, segment_ids", [*plain(23), (PACKED, PACKED)])
@pytest.mark.parametrize("kind, ratio", [(CSA, 3), (HCA, 5)])
def test_entries_equal_a_loop(kind, ratio, ids, segment_ids):
    x, overlapping = normal(0, *ids.shape, CONFIG.hidden_size), kind == CSA
    freqs = frequencies(CONFIG, kind)
    compressor = Compressor(CONFIG, Runtime(), ratio, CONFIG.head_dim, overlapping=overlapping)

    def run(method, first):
        layout = layout_of(ids.shape, ratio, segment_ids)
        at = rotation(block_starts(document_offsets(jnp.asarray(ids)), layout, ratio), freqs)
        return method(first, x, layout, at)

    shapes = jax.eval_shape(functools.partial(run, compressor.init), jax.random.key(0))
    shapes = nn.meta.unbox(shapes)["params"]
    params = {name: normal(i, *shape.shape) for i, (name, shape) in enumerate(shapes.items())}
    entries, _ = quick_jit(functools.partial(run, compressor.apply))({"params": params})
    assert entries.shape == (ids.shape[0], ids.shape[1] // ratio, CONFIG.head_dim)
    for row, row_ids in enumerate(ids):
        expected = numpy_entries(x[row], params, row_ids, ratio, overlapping, freqs)
        made = len(blocks_of(row_ids, ratio))
        assert_close(entries[row, :made], expected[:made])


def test_pool_of_even_gates_is_the_mean():
    values = normal(0, 2, 3, 4, 5)
    assert_close(pool(values, jnp.zeros(values.shape)), np.asarray(values).mean(axis=2))
    ignored = jnp.where(jnp.arange(4)[:, None] == 1, -jnp.inf, jnp.zeros(values.shape))
    assert_close(pool(values, ignored), np.asarray(values)[:, :, [0, 2, 3]].mean(axis=2))


def test_overlap_joins_the_previous_block():
    blocks = normal(0, 1, 3, 2, 2, 4)  # entries, tokens, series, width
    joined = overlap(blocks, jit_layout_of((1, 6), 2, None), -1.0)
    np.testing.assert_array_equal(joined[:, :, 2:], blocks[:, :, :, 1])
    np.testing.assert_array_equal(joined[:, 1:, :2], blocks[:, :-1, :, 0])
    np.testing.assert_array_equal(joined[:, 0, :2], -1.0)
    layout = jit_layout_of((1, 6), 2, np.array([[1, 1, 2, 2, 2, 2]]))
    packed = overlap(blocks, layout, -1.0)
    np.testing.assert_array_equal(packed[:, 1, :2], -1.0)
    np.testing.assert_array_equal(packed[:, 2, :2], blocks[:, 1, :, 0])
