"""Measure what the formats of the cache change: predictions and chosen entries.

    python benchmarks/cache_formats.py --checkpoint=runs/tiny [--text=PATH]

Rows of held-out text are read through a cache of each format, with CSA over the entries that the
indexer chooses, and compared with the cache in float32. Recall is the share of a query's best k
entries that are among its best k with rotated keys and queries in FP4 and scores in bfloat16; it
is measured on the same activations, and counts queries that see more than k entries.
"""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from dsv4_jax import ModelConfig, Runtime, Transformer, cli
from dsv4_jax.attention.indexer import Indexer, IndexQueries, index_scores
from dsv4_jax.cache import init_cache
from dsv4_jax.cache_format import (
    decode_index_key,
    encode_index_key,
    round_index,
    round_scores,
)
from dsv4_jax.config import CACHE_FORMATS, SERVED
from dsv4_jax.evaluate import Settings, read_texts
from dsv4_jax.served_model import check_model

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A folder that launch/evaluate.py reads.")
TEXT = flags.DEFINE_string("text", None, "As that of launch/evaluate.py.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a row.", lower_bound=2)
ROWS = flags.DEFINE_integer("rows", 8, "Rows.", lower_bound=1)


def read(
    config: ModelConfig, runtime: Runtime, params: dict, tokens: np.ndarray
) -> np.ndarray:
    """Return the log-probabilities of all ids after each token, read through a cache."""
    make = functools.partial(init_cache, config, runtime, rows=1, max_length=tokens.shape[1])

    @jax.jit
    def row(params, tokens):
        count, model = jnp.full(1, tokens.shape[1]), Transformer(config, runtime)
        features, _ = model.apply({"params": params}, tokens, count, make(), method="extend")
        return jax.nn.log_softmax(features.logits[0])

    return np.stack([row(params, tokens[i : i + 1]) for i in range(len(tokens))])


def recall(config: ModelConfig, runtime: Runtime, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Return the recall of each query that has a choice, of all CSA layers."""
    found: list[np.ndarray] = []

    def look(next_function, arguments, options, context):
        out = next_function(*arguments, **options)
        if isinstance(context.module, Indexer) and context.method_name == "__call__":
            share = _recall_of(out[0], config)
            jax.debug.callback(lambda share: found.append(np.asarray(share)), share)
        return out

    with nn.intercept_methods(look):
        apply = jax.jit(Transformer(config, runtime).apply)
        for i in range(len(tokens)):
            jax.block_until_ready(apply({"params": params}, tokens[i : i + 1]))
    jax.effects_barrier()
    share = np.concatenate(found)
    return share[~np.isnan(share)]


def _recall_of(asked: IndexQueries, config: ModelConfig) -> jax.Array:
    """Return the recall of each query of a row; NaN where all visible entries are chosen."""
    width, k, ratio = config.index_head_dim, config.index_topk, config.csa_ratio
    keys = decode_index_key(encode_index_key(asked.keys, SERVED), width, SERVED, jnp.float32)
    exact = _scores(asked.queries, asked.head_weights, asked.keys)
    rounded = _scores(round_index(asked.queries, SERVED), asked.head_weights, keys)
    visible = (jnp.arange(exact.shape[0]) + 1) // ratio
    seen = jnp.arange(exact.shape[1]) < visible[:, None]

    def best(scores):
        return jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), k)[1]

    same = best(exact)[:, :, None] == best(round_scores(rounded, SERVED))[:, None, :]
    return jnp.where(visible > k, same.any(-1).mean(-1), jnp.nan)


def _scores(queries, head_weights, keys):
    return index_scores(queries[:, None], head_weights[:, None], keys)[0, 0]


def main() -> None:
    cli.require(CHECKPOINT)
    settings = Settings(text=TEXT.value)
    folder = check_model(CHECKPOINT.value, skip_mtp=True)
    tokens = np.concatenate(folder.tokenizer.encode_documents(read_texts(folder, settings)))
    needed = ROWS.value * LENGTH.value
    if len(tokens) < needed:
        sys.exit(f"expected a text of {needed} tokens, got {len(tokens)}")
    tokens = tokens[:needed].reshape(ROWS.value, LENGTH.value)
    model = folder.load()
    runtime = dataclasses.replace(model.runtime, csa="sparse", dtype="float32")
    print("| cache | nats per token | KL to float32, nats | largest | same likeliest |")
    print("|---|---|---|---|---|")
    exact = None
    for form in CACHE_FORMATS:
        found = read(model.config, dataclasses.replace(runtime, cache=form), model.params, tokens)
        exact = found if exact is None else exact
        nats = -np.take_along_axis(found[:, :-1], tokens[:, 1:, None], axis=-1)
        divergence = (np.exp(exact) * (exact - found)).sum(-1)
        same = (found.argmax(-1) == exact.argmax(-1)).mean()
        print(f"| {form} | {nats.mean():.4f} | {divergence.mean():.2e} | {divergence.max():.2e} "
              f"| {same:.2%} |", flush=True)
    share = recall(model.config, runtime, model.params, tokens)
    print(f"\nrecall of the best {model.config.index_topk} entries in FP4: mean "
          f"{share.mean():.2%}, lowest hundredth {np.quantile(share, 0.01):.2%}, of "
          f"{share.size:,} queries")


if __name__ == "__main__":
    cli.run(main)
