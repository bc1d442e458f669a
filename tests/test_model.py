"""The whole model: causality, packing, scan over depth, precision, sizes of intermediates."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, Jaxpr

from dsv4_jax import ModelConfig, Runtime, Transformer, chunks, model, mtp
from dsv4_jax.attention import core
from dsv4_jax.block import Batch
from dsv4_jax.config import CSA, HASH, HCA, LEARNED, WINDOW
from dsv4_jax.layer_stats import LayerStats
from dsv4_jax.mhc import StreamMix
from dsv4_jax.model import param_shapes
from dsv4_jax.params import IN, Weight, merge, path_name, split_trainable
from dsv4_jax.schedule import by_layer, factor_schedule

SAME_SUMS = 1e-5  # of the largest element: float32 sums of other order, through all layers
BFLOAT16 = 0.05  # norm of the difference over norm: 8 bits through a few layers

# 16 index heads: with few, all of a query's scores may be exactly 0 and the choice be arbitrary.
FULL = ModelConfig(
    vocab_size=48,
    hidden_size=12,
    layer_types=(WINDOW, HCA, CSA, HCA, CSA),
    moe_types=(HASH,) + (LEARNED,) * 4,
    num_attention_heads=2,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=8,
    o_groups=2,
    o_lora_rank=4,
    sliding_window=5,
    csa_ratio=4,
    hca_ratio=8,
    index_n_heads=16,
    index_head_dim=8,
    index_topk=2,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    hc_sinkhorn_iters=4,
)
ROWS, LENGTH = 3, 40


def one_layer(kind: str, **changes) -> ModelConfig:
    fields = dict(layer_types=(kind,), moe_types=(LEARNED,), num_nextn_predict_layers=0)
    return dataclasses.replace(FULL, **{**fields, **changes})


@functools.cache
def random_params(config: ModelConfig) -> dict:
    """Draw weights that give every part of the model a say, unlike fresh ones."""
    rng = np.random.default_rng(0)

    def draw(path, weight: Weight) -> jax.Array:
        name, shape = path_name(path), weight.value.shape
        if name.endswith("hash_table"):
            orders = np.argsort(rng.random((shape[0], config.n_routed_experts)), axis=-1)
            return jnp.asarray(orders[:, : shape[1]], jnp.int32)
        sizes = [n for n, kind in zip(shape, weight.kinds, strict=True) if kind == IN]
        deviation = 1 if name == "embedding" else 0.5 if not sizes else math.prod(sizes) ** -0.5
        centre = 1 if name.endswith("norm") else 0
        return jnp.asarray(centre + deviation * rng.standard_normal(shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        draw, param_shapes(config), is_leaf=lambda leaf: isinstance(leaf, Weight)
    )


def random_tokens(rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, FULL.vocab_size, (rows, length)).astype(np.int32)


def make_features(config: ModelConfig = FULL, **runtime):
    """Return the compiled function from (params, tokens, ...) to `Features`."""
    transformer = Transformer(config, Runtime(**runtime))
    return quick_jit(
        lambda params, *args: transformer.apply({"params": params}, *args, method="features")
    )


@functools.cache
def plain_features(csa: str):
    return make_features(csa=csa)


def assert_close(actual, expected, tolerance: float = SAME_SUMS) -> None:
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# Causality


def dependence(config: ModelConfig, **runtime) -> np.ndarray:
    """Return how strongly each output depends on each token's embedding, [heads, t, t].

    Tokens are distinct, so that row s of the embedding is token s; heads are the logits and, if
    there is one, the multi-token prediction.
    """
    params = random_params(config)
    mix = np.random.default_rng(2).standard_normal(config.vocab_size)
    tokens = jnp.arange(config.vocab_size)[None]
    transformer = Transformer(config, Runtime(**runtime))

    def outputs(embedding):
        changed = {"params": {**params, "embedding": embedding}}
        features = transformer.apply(changed, tokens, method="features")
        heads = [features.logits, features.mtp_logits][: 1 + config.num_nextn_predict_layers]
        return jnp.stack([logits[0] @ mix for logits in heads])

    jacobian = quick_jit(jax.jacrev(outputs))(params["embedding"])
    return np.linalg.norm(jacobian, axis=-1)


def past(length: int, reach: int) -> np.ndarray:
    """Mark the last `reach` tokens, a token's own included."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < reach)


def test_window_layer_and_prediction_depend_on_their_windows():
    window, t = FULL.sliding_window, FULL.vocab_size
    main, ahead = dependence(one_layer(WINDOW, num_nextn_predict_layers=1))
    np.testing.assert_array_equal(main > 0, past(t, window))
    # Prediction joins the next token, and its own layer adds a window.
    expected = past(t, 2 * window - 1) | np.eye(t, k=1, dtype=bool)
    np.testing.assert_array_equal(ahead > 0, expected)


def compressed_past(ratio: int) -> np.ndarray:
    """Mark the window and all tokens of complete blocks."""
    token = np.arange(FULL.vocab_size)
    return past(token.size, FULL.sliding_window) | (token < (token[:, None] + 1) // ratio * ratio)


@pytest.mark.parametrize("kind, ratio", [(HCA, FULL.hca_ratio), (CSA, FULL.csa_ratio)])
def test_compressed_layers_depend_on_window_and_complete_blocks(kind, ratio):
    (strength,) = dependence(one_layer(kind), csa="dense")
    np.testing.assert_array_equal(strength > 0, compressed_past(ratio))


def test_sparse_layer_depends_on_window_and_some_blocks():
    (strength,) = dependence(one_layer(CSA), csa="sparse")
    far = (strength > 0) & ~past(FULL.vocab_size, FULL.sliding_window)
    assert not (far & ~compressed_past(FULL.csa_ratio)).any()
    # An entry covers two blocks, and the window may hide a part of them.
    assert far.sum(axis=1).max() <= FULL.index_topk * 2 * FULL.csa_ratio
    assert (far.sum(axis=1)[4 * FULL.sliding_window :] > 0).mean() > 0.9
    assert far[-1, : FULL.vocab_size // 2].any() or far[-2, : FULL.vocab_size // 2].any()


@pytest.mark.parametrize("csa", ["sparse", "dense"])
def test_no_output_changes_with_later_tokens(csa):
    """Token ids act beyond their embeddings: through hash tables."""
    tokens, params = random_tokens(), random_params(FULL)
    features = plain_features(csa)
    before = features(params, tokens)
    for border in (1, 7, 23):
        other = tokens.copy()
        other[:, border:] = (other[:, border:] + 1) % FULL.vocab_size
        after = features(params, other)
        assert_close(after.logits[:, :border], before.logits[:, :border])
        assert (after.logits[:, border] != before.logits[:, border]).any()
        if border > 1:
            ahead, expected = (f.mtp_logits[:, : border - 1] for f in (after, before))
            assert_close(ahead, expected)
        assert (after.mtp_logits[:, border - 1] != before.mtp_logits[:, border - 1]).any()


# Packing


def random_documents(rng, rows: int) -> list[list[range]]:
    """Divide rows into documents of at least one token, with padding behind or between some."""
    divided = []
    for _ in range(rows):
        documents, start = [], int(rng.integers(0, 3))
        while start < LENGTH:
            end = min(LENGTH, start + int(rng.choice([1, 2, 3, 5, 8, 13, 21])))
            documents.append(range(start, end))
            start = end + int(rng.choice([0, 0, 0, 2]))
        divided.append(documents)
    return divided


@functools.cache
def packed_features(csa: str):
    return make_features(csa=csa)


@pytest.mark.parametrize("csa", ["sparse", "dense"])
@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_equal_documents_alone(csa, seed):
    """Alone, a document starts its row; what stands behind it there has no effect on it."""
    tokens, params = random_tokens(), random_params(FULL)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    documents = [
        (row, document)
        for row, of_row in enumerate(random_documents(np.random.default_rng(seed), ROWS))
        for document in of_row
    ]
    for number, (row, document) in enumerate(documents):
        segment_ids[row, list(document)] = 2 - number % 2  # ids come again, in no order
        positions[row, list(document)] = np.arange(len(document))
    alone = np.zeros((-(-len(documents) // ROWS) * ROWS, LENGTH), np.int32)
    for own, (row, document) in zip(alone, documents, strict=False):
        own[: len(document)] = tokens[row, list(document)]
    # Dense runs count the positions themselves.
    given = (segment_ids, positions) if csa == "sparse" else (segment_ids,)
    packed = packed_features(csa)(params, tokens, *given)
    parts = [
        plain_features(csa)(params, alone[i : i + ROWS]) for i in range(0, len(alone), ROWS)
    ]
    for name, left_out in (("logits", 0), ("mtp_logits", 1)):  # the last token has no next one
        ours, separate = np.asarray(getattr(packed, name)), [getattr(p, name) for p in parts]
        separate = np.concatenate(separate)
        expected = np.full_like(ours, np.nan)
        for own, (row, document) in zip(separate, documents, strict=False):
            kept = len(document) - left_out
            expected[row, document.start : document.start + kept] = own[:kept]
        known = np.isfinite(expected).all(axis=-1)
        assert known.sum() == sum(len(document) - left_out for _, document in documents) > 0
        assert_close(ours[known], expected[known])
    assert_loads(packed.layers, np.count_nonzero(segment_ids), len(documents))


def test_documents_do_not_see_each_other():
    """The first document's last token, too, whose next token is another's, keeps all outputs."""
    tokens, params, border = random_tokens(), random_params(FULL), 17
    segment_ids = np.where(np.arange(LENGTH) < border, 2, 1) + 0 * tokens
    positions = np.arange(LENGTH) % border + 0 * tokens
    first, last = slice(0, border), slice(border, LENGTH)
    before = packed_features("sparse")(params, tokens, segment_ids, positions)
    for changed, kept in ((first, last), (last, first)):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % FULL.vocab_size
        after = packed_features("sparse")(params, other, segment_ids, positions)
        for name in ("logits", "mtp_logits"):
            ours, expected = (np.asarray(getattr(f, name)) for f in (after, before))
            assert_close(ours[:, kept], expected[:, kept])
            assert (ours[:, changed] != expected[:, changed]).any(axis=-1).all()


def assert_loads(layers: dict, tokens: int, documents: int) -> None:
    """Check that each layer gave all tokens that are not padding their experts.

    In multi-token prediction the last token of a document has no next one and does not count.
    """
    assert layers.keys() == {"layers_0", "pairs/hca", "pairs/csa", "mtp/block"}
    for name, stats in layers.items():
        loads = np.atleast_2d(stats.load)
        assert loads.shape == (2 if "pairs" in name else 1, FULL.n_routed_experts)
        counted = tokens - documents * (name == "mtp/block")
        np.testing.assert_array_equal(loads.sum(axis=1), counted * FULL.num_experts_per_tok)


def test_router_counts_every_token_of_plain_rows():
    features = plain_features("sparse")(random_params(FULL), random_tokens())
    assert_loads(features.layers, ROWS * LENGTH, documents=ROWS)
    balance = {name: np.asarray(stats.balance_loss) for name, stats in features.layers.items()}
    np.testing.assert_array_equal(balance.pop("layers_0"), 0)  # routed by a fixed table
    assert all((loss > 0.5).all() for loss in balance.values())


def test_sinkhorn_error_is_that_of_the_worse_sublayer():
    config = one_layer(WINDOW)
    features, kept = quick_jit(
        lambda params, tokens: Transformer(config).apply(
            {"params": params}, tokens, method="features", mutable="intermediates",
            capture_intermediates=lambda module, _: isinstance(module, StreamMix),
        )
    )(random_params(config), random_tokens())
    mixes, errors = kept["intermediates"]["layers_0"], []
    for name in ("attention_mix", "moe_mix"):
        ((*_, comb),) = mixes[name]["__call__"]
        errors.append(np.abs(np.sum(comb, axis=1) - 1).max())  # of the rows, which are worse
    assert errors[0] != errors[1]
    assert features.layers["layers_0"].sinkhorn_error == pytest.approx(max(errors), rel=SAME_SUMS)


# Multi-token prediction


class NoBlock(nn.Module):
    """Stands in for the prediction's layer and leaves the streams as they are."""

    config: ModelConfig
    runtime: Runtime
    attention_kind: str
    moe_kind: str
    layer: int

    def __call__(self, residual, batch, cache):
        return residual, LayerStats(*[None] * len(LayerStats._fields)), cache


def test_prediction_joins_streams_and_next_embedding(monkeypatch):
    """Around its layer, each token's vector equals fact sheet 4 in float64."""
    rng, eps, n, d = np.random.default_rng(4), FULL.rms_norm_eps, FULL.hc_mult, FULL.hidden_size
    params = {k: v for k, v in random_params(FULL)["mtp"].items() if k != "block"}
    monkeypatch.setattr(mtp, "block_class", lambda runtime: NoBlock)
    streams, embedded = rng.standard_normal((2, 3, n, d)), rng.standard_normal((2, 3, d))
    embedded[0, 2] = 0  # no next token
    actual, _, _ = mtp.MultiTokenPrediction(FULL, Runtime()).apply(
        {"params": params}, jnp.float32(streams), jnp.float32(embedded), Batch(None, None, {})
    )

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + eps) * weight

    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    for place in np.ndindex(2, 3):
        from_token = norm(embedded[place], p["token_norm"]) @ p["w_token"]
        from_streams = [norm(x, p["stream_norm"]) @ p["w_stream"] for x in streams[place]]
        joined = np.stack([x + from_token for x in from_streams])
        logits = np.einsum("nd,dnx->x", norm(joined, 1), p["head_mix"]["fn"])
        logits = logits * p["head_mix"]["scale"] + p["head_mix"]["base"]
        read = (1 / (1 + np.exp(-logits)) + FULL.hc_eps) @ joined
        assert_close(actual[place], norm(read, p["final_norm"]))


# Depth


def unrolled(params: dict, config: ModelConfig) -> dict:
    """Give the stacked layers of the scan a name of their own each."""
    prelude, pairs = factor_schedule(config)
    layers = {name: tree for name, tree in params.items() if name != "pairs"}
    for pair, place in itertools.product(range(pairs), range(2)):
        stacked = params["pairs"][config.layer_types[prelude + place]]
        single = jax.tree.map(lambda x, pair=pair: x[pair], stacked)
        layers[f"layers_{prelude + 2 * pair + place}"] = single
    return layers


def test_scan_equals_a_loop(monkeypatch):
    tokens, params = random_tokens(), random_params(FULL)
    expected = plain_features("sparse")(params, tokens)
    layers = unrolled(params, FULL)
    monkeypatch.setattr(model, "factor_schedule", lambda config: (config.num_layers, 0))
    looped = make_features()(layers, tokens)
    assert_close(looped.logits, expected.logits)
    assert_close(looped.mtp_logits, expected.mtp_logits)
    for place, kind in enumerate((HCA, CSA)):
        for pair in range(2):
            ours, stacked = looped.layers[f"layers_{1 + 2 * pair + place}"], expected.layers
            stats = jax.tree.map(lambda x, pair=pair: x[pair], stacked[f"pairs/{kind}"])
            np.testing.assert_array_equal(ours.load, stats.load)
            assert_close(ours.balance_loss, stats.balance_loss)
            assert_close(ours.sinkhorn_error, stats.sinkhorn_error)


def test_choices_of_speed_and_memory_leave_the_function_alone():
    tokens, params = random_tokens(), random_params(FULL)
    expected = plain_features("sparse")(params, tokens)
    actual = make_features(scan_unroll=2, remat=True, moe="ragged")(params, tokens)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.mtp_logits, expected.mtp_logits)


SCHEDULES = [
    ((WINDOW, HCA, CSA, HCA, CSA), (HASH,) + (LEARNED,) * 4, (1, 2)),
    ((HCA, CSA) * 2, (LEARNED,) * 4, (0, 2)),
    ((HCA, CSA) * 2, (HASH,) + (LEARNED,) * 3, (4, 0)),  # one pair is none
    ((HCA, CSA) * 3, (HASH,) + (LEARNED,) * 5, (2, 2)),
    ((CSA, HCA, CSA, HCA, CSA), (LEARNED,) * 5, (1, 2)),
    ((HCA, CSA, HCA, CSA), (HASH,) * 4, (4, 0)),
    ((CSA,) * 6, (LEARNED,) * 6, (6, 0)),
    ((WINDOW,), (LEARNED,), (1, 0)),
]


@pytest.mark.parametrize("layer_types, moe_types, expected", SCHEDULES)
def test_schedule_is_factored_into_prelude_and_pairs(layer_types, moe_types, expected):
    config = dataclasses.replace(FULL, layer_types=layer_types, moe_types=moe_types)
    assert factor_schedule(config) == expected


def test_what_blocks_have_is_told_by_layer():
    blocks = {"layers_0": 0, "pairs/hca": [1, 3], "pairs/csa": [2, 4], "mtp/block": 5}
    names = [*(f"layer_{i}" for i in range(5)), "mtp"]
    assert by_layer(FULL, blocks) == dict(zip(names, range(6), strict=True))
    deep = one_layer(CSA, layer_types=(CSA,) * 11, moe_types=(LEARNED,) * 11)
    layers = by_layer(deep, {f"layers_{layer}": layer for layer in range(11)})
    assert sorted(layers, key=layers.get) == sorted(layers)


def is_jaxpr(x) -> bool:
    return isinstance(x, (ClosedJaxpr, Jaxpr))


def equations(jaxpr: Jaxpr) -> Iterator:
    """Yield all equations, those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr)):
            yield from equations(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def shapes_of_params(config: ModelConfig) -> dict:
    return jax.tree.map(
        lambda weight: weight.value, param_shapes(config), is_leaf=lambda w: isinstance(w, Weight)
    )


def test_program_does_not_grow_with_depth():
    counts = []
    for pairs in (2, 20):
        layers = dict(layer_types=(HCA, CSA) * pairs, moe_types=(LEARNED,) * 2 * pairs)
        config = one_layer(WINDOW, **layers)
        params = {"params": shapes_of_params(config)}
        traced = jax.make_jaxpr(Transformer(config).apply)(params, random_tokens())
        counts.append(sum(1 for _ in equations(traced.jaxpr)))
    assert counts[0] == counts[1]


# Precision and memory


SMALL = one_layer(CSA)


@functools.cache
def value_and_gradients(**runtime):
    """Return the gradients of a random sum of logits, and (logits, streams)."""
    trainable, frozen = split_trainable(random_params(SMALL))
    weights = np.random.default_rng(3).standard_normal((ROWS, LENGTH, SMALL.vocab_size))
    transformer = Transformer(SMALL, Runtime(**runtime))

    def weighted_sum(trainable):
        params = {"params": merge(trainable, frozen)}
        features = transformer.apply(params, random_tokens(), method="features")
        return jnp.vdot(weights, features.logits), (features.logits, features.streams)

    return quick_jit(jax.grad(weighted_sum, has_aux=True))(trainable)


def test_recomputing_blocks_gives_the_same_gradients():
    expected, (logits, _) = value_and_gradients()
    actual, (recomputed, _) = value_and_gradients(remat=True)
    assert_close(recomputed, logits)
    largest = max(np.linalg.norm(g) for g in jax.tree.leaves(expected))
    for path, gradient in flatten_dict(expected, sep="/").items():
        error = np.linalg.norm(flatten_dict(actual, sep="/")[path] - gradient)
        assert error <= SAME_SUMS * largest, path


def test_bfloat16_is_close_to_float32():
    gradients, (logits, streams) = value_and_gradients(dtype="bfloat16")
    expected_gradients, (expected, _) = value_and_gradients()
    assert streams.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    error = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(error) <= BFLOAT16  # a few tokens choose another expert or entry
    leaves, expected_leaves = jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in leaves)
    ours, wanted = (np.concatenate([g.reshape(-1) for g in x]) for x in (leaves, expected_leaves))
    assert np.vdot(ours, wanted) > 0.8 * np.linalg.norm(ours) * np.linalg.norm(wanted)


def test_every_trained_weight_but_the_indexers_has_a_gradient():
    """The choice of entries has none, and mixing the first layer's equal streams next to none."""
    gradients = flatten_dict(value_and_gradients()[0], sep="/")
    norms = {path: np.linalg.norm(gradient) for path, gradient in gradients.items()}
    for path, norm in norms.items():
        if "/indexer/" in path:
            assert norm == 0, path
        elif "/attention_mix/" not in path:
            assert norm > 1e-6 * max(norms.values()), path


def test_frozen_parts_are_split_off_and_joined_again():
    params = random_params(FULL)
    trainable, frozen = split_trainable(params)
    names = {path[-1] for path in flatten_dict(frozen)}
    assert names == {"selection_bias", "hash_table"}
    assert len(flatten_dict(frozen)) == 4  # one each: prelude, two of a pair, prediction
    assert not {path[-1] for path in flatten_dict(trainable)} & names
    joined = merge(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(joined), jax.tree.leaves(params)))


LONG = 2048
LONG_ENTRIES = LONG // 4


def largest_intermediate(kind: str) -> int:
    """Return the elements of the largest array in a forward and backward pass over a long row."""
    config = one_layer(kind, hca_ratio=4, csa_ratio=4, sliding_window=16, index_topk=16)
    trainable, frozen = split_trainable(shapes_of_params(config))
    tokens = jax.ShapeDtypeStruct((1, LONG), jnp.int32)

    def loss(trainable, frozen, tokens, segment_ids):
        params = {"params": merge(trainable, frozen)}
        return jnp.sum(Transformer(config).apply(params, tokens, segment_ids) ** 2)

    traced = jax.make_jaxpr(jax.grad(loss))(trainable, frozen, tokens, tokens)
    arrays = (out.aval for equation in equations(traced.jaxpr) for out in equation.outvars)
    return max(math.prod(array.shape) for array in arrays)


@pytest.mark.parametrize("kind", [WINDOW, HCA, CSA])
def test_no_array_has_tokens_squared_or_tokens_times_entries(kind):
    assert largest_intermediate(kind) <= LONG * LONG_ENTRIES // 2


def test_the_largest_intermediate_is_found(monkeypatch):
    """Without chunks, the scores of all entries are one array."""
    monkeypatch.setattr(core, "CAUSAL_STRETCHES", 1)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", dict.fromkeys(chunks.CHUNK_ELEMENTS, 2**60))
    assert largest_intermediate(CSA) >= LONG * LONG_ENTRIES
