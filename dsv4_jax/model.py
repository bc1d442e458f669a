"""The DeepSeek-V4 transformer."""

from __future__ import annotations

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
    tokens_ahead,
)
from dsv4_jax.block import Batch, block_class
from dsv4_jax.config import LEARNED, WINDOW, ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.layers import rms_norm
from dsv4_jax.mhc import StreamHead
from dsv4_jax.mtp import MultiTokenPrediction
from dsv4_jax.params import draw, key_of, param
from dsv4_jax.rope import frequencies, rotation
from dsv4_jax.router import RouterStats
from dsv4_jax.shapes import Hidden, Logits, Streams, Tokens
from dsv4_jax.sharding import constrain, shardings_of
from dsv4_jax.token_ids import check_token_ids


class Features(NamedTuple):
    """What one forward pass yields for losses, balancing and inspection."""

    streams: Streams  # after the last layer
    hidden: Hidden  # normalised; the head makes the next token's logits of it
    mtp_hidden: Hidden | None  # the same for the token after the next
    logits: Logits  # float32
    mtp_logits: Logits | None  # float32
    router: dict[str, RouterStats]  # by the path of the layer's block; scanned layers stacked


def factor_schedule(config: ModelConfig) -> tuple[int, int]:
    """Split the layers into a prelude and repeated pairs: return (prelude layers, pairs).

    A pair is two layers of different attention kinds with learned routers; at least two equal
    pairs must end the schedule, else every layer belongs to the prelude.
    """
    kinds = list(zip(config.layer_types, config.moe_types, strict=True))
    first, second = kinds[-2:] if len(kinds) > 1 else (None, None)
    if len(kinds) < 4 or first[0] == second[0] or {first[1], second[1]} != {LEARNED}:
        return len(kinds), 0
    pairs = 0
    while kinds[len(kinds) - 2 * (pairs + 1) :][:2] == [first, second]:
        pairs += 1
        if 2 * (pairs + 1) > len(kinds):
            break
    return (len(kinds) - 2 * pairs, pairs) if pairs > 1 else (len(kinds), 0)


class Pair(nn.Module):
    """Two layers of different attention kinds, the unit that is scanned over depth."""

    config: ModelConfig
    runtime: Runtime
    layer: int  # index of the first pair's first layer

    @nn.compact
    def __call__(self, streams: Streams, batch: Batch) -> tuple[Streams, dict[str, RouterStats]]:
        stats = {}
        for layer in (self.layer, self.layer + 1):
            kind = self.config.layer_types[layer]
            block = block_class(self.runtime, scanned=True)(
                self.config, self.runtime, kind, LEARNED, layer, name=kind
            )
            streams, stats[kind] = block(streams, batch)
        return streams, stats


class Transformer(nn.Module):
    """DeepSeek-V4: embedding, layers on residual streams, head, multi-token prediction.

    `apply({"params": params}, tokens, segment_ids=None, positions=None)` returns float32 logits
    [b, t, v]; `method="features"` returns `Features`.

    Args of both:
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

    @nn.compact
    def features(
        self,
        tokens: Tokens,
        segment_ids: Tokens | None = None,
        positions: Tokens | None = None,
        mtp: bool = True,
    ) -> Features:
        c, dtype = self.config, self.runtime.compute_dtype
        _check_inputs(c, tokens, segment_ids, positions)
        table = param(self, "embedding", "vocab -> width", (c.vocab_size, c.hidden_size))
        head = param(self, "head", "width -> vocab", (c.hidden_size, c.vocab_size)).astype(dtype)
        final_norm = param(self, "final_norm", "width", (c.hidden_size,), nn.initializers.ones)

        batch = _describe(c, tokens, segment_ids, positions)
        x = self._constrain(table[tokens].astype(dtype))
        streams = jnp.broadcast_to(x[:, :, None], (*tokens.shape, c.hc_mult, c.hidden_size))
        streams, router = self._layers(streams, batch)
        hidden = rms_norm(StreamHead(c, name="head_mix")(streams), final_norm, eps=c.rms_norm_eps)
        mtp_hidden = mtp_logits = None
        if mtp and c.num_nextn_predict_layers:
            after, exists = tokens_ahead(tokens, segment_ids, 1)
            embedded = jnp.where(exists[..., None], table[after], 0).astype(dtype)
            block = MultiTokenPrediction(c, self.runtime, name="mtp")
            # A document's last token has nothing to predict here: its expert load is not counted.
            mtp_batch = batch._replace(tokens=after, valid=exists)
            mtp_hidden, router["mtp/block"] = block(streams, embedded, mtp_batch)
            mtp_logits = self._logits(mtp_hidden, head)
        logits = self._logits(hidden, head)
        return Features(streams, hidden, mtp_hidden, logits, mtp_logits, router)

    def _layers(self, streams: Streams, batch: Batch) -> tuple[Streams, dict[str, RouterStats]]:
        c, runtime = self.config, self.runtime
        prelude, pairs = factor_schedule(c)
        router = {}
        for layer in range(prelude):
            name = f"layers_{layer}"
            kinds = c.layer_types[layer], c.moe_types[layer]
            block = block_class(runtime)(c, runtime, *kinds, layer, name=name)
            streams, router[name] = block(streams, batch)
            streams = self._constrain(streams)
        if pairs:
            scan = nn.scan(
                Pair, length=pairs, unroll=runtime.scan_unroll, in_axes=nn.broadcast,
                variable_axes={"params": 0}, split_rngs={"params": True},
                metadata_params={},
            )
            streams, stats = scan(c, runtime, prelude, name="pairs")(streams, batch)
            router |= {f"pairs/{kind}": stat for kind, stat in stats.items()}
        return streams, router

    def _logits(self, hidden: Hidden, head) -> Logits:
        """Sum in float32; factors are of the compute dtype, as those of the released head are."""
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return constrain(logits, "batch token vocab", self.runtime.mesh)

    def _constrain(self, x):
        return constrain(x, "batch", self.runtime.mesh)


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None = None) -> dict:
    """Draw fresh parameters; on a mesh each device makes only its own parts."""
    boxed = param_shapes(config)
    placed = flatten_dict({} if mesh is None else shardings_of(boxed, mesh))
    return unflatten_dict({
        path: draw(key_of(key, path), weight.init, weight.value.shape, placed.get(path))
        for path, weight in flatten_dict(boxed).items()
    })


def param_shapes(config: ModelConfig) -> dict:
    """Return the tree of `params.Weight`s with shapes for values; nothing is computed."""
    model, tokens = Transformer(config), jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda key: model.init(key, tokens)["params"], jax.random.key(0))


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


def _describe(
    config: ModelConfig, tokens: Tokens, segment_ids: Tokens | None, positions: Tokens | None
) -> Batch:
    """Work out, once for all layers, where tokens and compressed entries stand."""
    offsets = None
    if segment_ids is not None:
        offsets, segment_ids = document_offsets(segment_ids), number_documents(segment_ids)
    if positions is None:
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        positions = index if offsets is None else offsets
    kinds = config.layer_types + (WINDOW,) * config.num_nextn_predict_layers
    places = {}
    for kind in sorted(set(kinds)):
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
