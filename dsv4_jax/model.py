"""The DeepSeek-V4 transformer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dsv4_jax.attention import Places
from dsv4_jax.attention.layout import (
    block_starts,
    document_offsets,
    entry_layout,
    number_documents,
    span_layout,
    tokens_ahead,
)
from dsv4_jax.block import Batch, block_class
from dsv4_jax.cache import Cache, LayerCache, Span, StackedCache
from dsv4_jax.config import LEARNED, WINDOW, ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.layer_stats import LayerStats
from dsv4_jax.layers import rms_norm
from dsv4_jax.mhc import Residual, StreamHead, before_scan, finish, start
from dsv4_jax.mtp import MultiTokenPrediction
from dsv4_jax.params import draw, key_of, param, shardings_of
from dsv4_jax.rope import frequencies, rotation
from dsv4_jax.schedule import MTP_BLOCK, factor_schedule
from dsv4_jax.shapes import Array, Bool, Float, Hidden, Int, Logits, Streams, Tokens
from dsv4_jax.sharding import POD
from dsv4_jax.token_ids import check_token_ids


class Features(NamedTuple):
    """What one forward pass yields for losses, balancing and inspection."""

    streams: Streams  # after the last layer
    hidden: Hidden  # normalised; the head makes the next token's logits of it
    mtp_hidden: Hidden | None  # the same for the token after the next
    logits: Logits  # float32
    mtp_logits: Logits | None  # float32
    head: Float[Array, "d v"]  # the weight that makes logits of hidden vectors
    layers: dict[str, LayerStats]  # by the path of the layer's block; scanned layers stacked


class Pair(nn.Module):
    """Two layers of different attention kinds, the unit that is scanned over depth."""

    config: ModelConfig
    runtime: Runtime
    layer: int  # index of the first pair's first layer

    @nn.compact
    def __call__(
        self, carry: tuple[Residual, dict[str, LayerCache] | None], pair: Int[Array, ""],
        experts: dict[str, Int[Array, "b t a"]], batch: Batch,
    ) -> tuple[tuple[Residual, dict[str, LayerCache] | None], dict[str, LayerStats]]:
        """Run pair number `pair` on the streams and on its layers of the caches, by their kind."""
        (residual, caches), stats = carry, {}
        for layer in (self.layer, self.layer + 1):
            kind = self.config.layer_types[layer]
            block = block_class(self.runtime)(
                self.config, self.runtime, kind, LEARNED, layer, name=kind
            )
            cache = None if caches is None else StackedCache(caches[kind], pair)
            own = batch._replace(experts=experts.get(kind))
            residual, stats[kind], kept = block(residual, own, cache)
            caches = None if caches is None else caches | {kind: kept}
        return (residual, caches), stats


class Transformer(nn.Module):
    """DeepSeek-V4: embedding, layers on residual streams, head, multi-token prediction.

    `apply({"params": params}, tokens, segment_ids=None, positions=None)` returns float32 logits
    [b, t, v]; `method="features"` returns `Features`. `method="extend"` reads tokens after those
    that a cache has read.

    Args of the first two:
      tokens: ids in [0, vocab_size). Values are checked where there are any: not under `jit`,
        where looking up another id gives some row or NaN; see `check_token_ids`.
      segment_ids: 0 is padding; documents are contiguous runs of one id above 0. None: each row
        is one document.
      positions: of each token in its document, for the rotary embedding; None counts them.

    Raises:
      InputError: a token id outside the vocabulary; segment ids or positions of another shape.

    Source: report 2; fact sheet 2.1.
    """

    config: ModelConfig
    runtime: Runtime = Runtime()

    def __call__(
        self, tokens: Tokens, segment_ids: Tokens | None = None, positions: Tokens | None = None
    ) -> Logits:
        return self.features(tokens, segment_ids, positions, mtp=self.is_initializing()).logits

    def features(
        self,
        tokens: Tokens,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        mtp: bool = True,
        experts: Mapping[str, Int[Array, "*z b t a"]] | None = None,
    ) -> Features:
        """Return all that one forward pass yields.

        Args:
          mtp: run the prediction block, too.
          experts: that tokens are to use, by the path of the layer's block and stacked as in
            `LayerStats`; the layers that are not named choose.
        """
        _check_inputs(self.config, tokens, segment_ids, positions)
        batch = describe_documents(self.config, tokens, segment_ids, positions)
        ahead = None
        if mtp and self.config.num_nextn_predict_layers:
            ahead = tokens_ahead(tokens, segment_ids, 1)
        return self._run(batch, ahead, None, experts or {})[0]

    def extend(
        self, tokens: Tokens, count: Int[Array, " b"], cache: Cache
    ) -> tuple[Features, Cache]:
        """Read tokens after those that the cache has read; each row is one document.

        Args:
          tokens: ids in [0, vocab_size), not checked.
          count: how many of each row are tokens, from the first; the rest is padding, for which
            the features mean nothing. Length and count together must not exceed what the cache
            has been made for: what lies beyond is not stored.
        """
        span = Span(cache.length, count)
        batch = describe_span(self.config, tokens, span)
        features, layers = self._run(batch, None, cache.layers, {})
        return features, cache._replace(length=span.start + span.count, layers=layers)

    @nn.compact
    def _run(
        self, batch: Batch, ahead: tuple[Tokens, Bool[Array, "b t"]] | None,
        caches: dict[str, LayerCache] | None, experts: Mapping[str, Array],
    ) -> tuple[Features, dict[str, LayerCache] | None]:
        """Run the model; the prediction block, too, where the tokens ahead are given."""
        c, dtype = self.config, self.runtime.compute_dtype
        table = param(self, "embedding", "vocab -> width", (c.vocab_size, c.hidden_size))
        head = param(self, "head", "width -> vocab", (c.hidden_size, c.vocab_size)).astype(dtype)
        final_norm = param(self, "final_norm", "width", (c.hidden_size,), nn.initializers.ones)

        x = table[batch.tokens].astype(dtype)
        streams = jnp.broadcast_to(x[:, :, None], (*batch.tokens.shape, c.hc_mult, c.hidden_size))
        streams, layers, caches = self._layers(streams, batch, caches, experts)
        x = StreamHead(c, self.runtime, name="head_mix")(streams)
        hidden = rms_norm(x, final_norm, eps=c.rms_norm_eps)
        mtp_hidden = mtp_logits = None
        if ahead is not None:
            after, exists = ahead
            embedded = jnp.where(exists[..., None], table[after], 0).astype(dtype)
            block = MultiTokenPrediction(c, self.runtime, name="mtp")
            # A document's last token has nothing to predict here: its expert load is not counted.
            mtp_batch = batch._replace(
                tokens=after, valid=exists, experts=experts.get(MTP_BLOCK)
            )
            mtp_hidden, layers[MTP_BLOCK], _ = block(streams, embedded, mtp_batch)
            mtp_logits = self._logits(mtp_hidden, head)
        logits = self._logits(hidden, head)
        return Features(streams, hidden, mtp_hidden, logits, mtp_logits, head, layers), caches

    def _layers(
        self, streams: Streams, batch: Batch, caches: dict[str, LayerCache] | None,
        experts: Mapping[str, Array],
    ) -> tuple[Streams, dict[str, LayerStats], dict[str, LayerCache] | None]:
        c, runtime = self.config, self.runtime
        prelude, pairs = factor_schedule(c)
        residual, layers, kept = start(streams, c, runtime), {}, {}
        for layer in range(prelude):
            name = f"layers_{layer}"
            kinds = c.layer_types[layer], c.moe_types[layer]
            block = block_class(runtime)(c, runtime, *kinds, layer, name=name)
            cache = None if caches is None else StackedCache(caches[name], jnp.int32(0))
            own = batch._replace(experts=experts.get(name))
            residual, layers[name], kept[name] = block(residual, own, cache)
        if pairs:
            scan = nn.scan(
                Pair, length=pairs, unroll=runtime.scan_unroll, in_axes=(0, 0, nn.broadcast),
                variable_axes={"params": 0}, split_rngs={"params": True},
                metadata_params={},
            )
            kinds = c.layer_types[-2:]
            paths = {kind: f"pairs/{kind}" for kind in kinds}
            chosen = {kind: experts[path] for kind, path in paths.items() if path in experts}
            of_pairs = None if caches is None else {kind: caches[f"pairs/{kind}"] for kind in kinds}
            (residual, of_pairs), stats = scan(c, runtime, prelude, name="pairs")(
                (before_scan(residual, c, runtime), of_pairs), jnp.arange(pairs), chosen, batch
            )
            layers |= {f"pairs/{kind}": stat for kind, stat in stats.items()}
            kept |= {f"pairs/{kind}": cache for kind, cache in (of_pairs or {}).items()}
        return finish(residual, c, runtime), layers, None if caches is None else kept

    def _logits(self, hidden: Hidden, head) -> Logits:
        """Sum in float32; factors are of the compute dtype, as those of the released head are."""
        return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def init_params(
    config: ModelConfig, key: jax.Array, mesh: Mesh | None = None, layout: str = POD
) -> dict:
    """Draw fresh parameters; on a mesh each device makes only its own parts."""
    boxed = param_shapes(config)
    placed = flatten_dict({} if mesh is None else shardings_of(boxed, mesh, layout))
    return unflatten_dict({
        path: draw(key_of(key, path), weight.init, weight.value.shape, placed.get(path))
        for path, weight in flatten_dict(boxed).items()
    })


@functools.lru_cache(maxsize=8)  # tracing takes a second, and whoever places parameters asks
def param_shapes(config: ModelConfig) -> dict:
    """Return the tree of `params.Weight`s with shapes for values; nothing is computed."""

    def init():  # whatever it makes, it makes none on a device
        tokens = jnp.zeros((1, 1), jnp.int32)
        return Transformer(config).init(jax.random.key(0), tokens)["params"]

    return jax.eval_shape(init)


def _check_inputs(
    config: ModelConfig, tokens: Tokens, segment_ids: Tokens | None, positions: Tokens | None
) -> None:
    if not isinstance(tokens, jax.core.Tracer):
        check_token_ids(tokens, config.vocab_size)
    for name, given in (("segment_ids", segment_ids), ("positions", positions)):
        if given is not None and given.shape != tokens.shape:
            raise InputError(
                f"{name}: expected the shape of tokens, {tokens.shape}, got {given.shape}; give "
                "one integer per token"
            )


def describe_documents(
    config: ModelConfig, tokens: Tokens, segment_ids: Tokens | None, positions: Tokens | None
) -> Batch:
    """Work out, once for all layers, where tokens and compressed entries stand."""
    offsets = None
    if segment_ids is not None:
        offsets, segment_ids = document_offsets(segment_ids), number_documents(segment_ids)
    if positions is None:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = index if offsets is None else offsets
    places = {}
    for kind in _kinds(config):
        freqs = frequencies(config, kind)
        at_query = rotation(positions, freqs)
        if kind == WINDOW:
            places[kind] = Places(at_query, None, None, segment_ids)
            continue
        ratio = config.ratio(kind)
        layout = entry_layout(tokens.shape, ratio, segment_ids, offsets)
        at_entry = rotation(block_starts(positions, layout, ratio), freqs)
        places[kind] = Places(at_query, at_entry, layout, segment_ids)
    valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
    return Batch(tokens, valid, places)


def describe_span(config: ModelConfig, tokens: Tokens, span: Span) -> Batch:
    """Work out the same for tokens that follow those that a cache has read."""
    t = tokens.shape[1]
    positions = span.start[:, None] + jnp.arange(t)
    places = {}
    for kind in _kinds(config):
        freqs = frequencies(config, kind)
        layout = at_entry = None
        if kind != WINDOW:
            layout = span_layout(span, t, config.ratio(kind))
            at_entry = rotation(layout.start, freqs)
        places[kind] = Places(rotation(positions, freqs), at_entry, layout, None, span)
    return Batch(tokens, jnp.arange(t) < span.count[:, None], places)


def _kinds(config: ModelConfig) -> list[str]:
    """Return the attention kinds of all layers, that of the prediction block among them."""
    return sorted({*config.layer_types, *(WINDOW,) * config.num_nextn_predict_layers})
