"""How much of the attention an indexer's choice keeps, before and after its warm-up.

    python benchmarks/indexer.py [--tokens=1600000] [--warmup_tokens=120000]

Trains configs/tiny.py with dense attention, then its indexers, and measures on the held-out text
what share of the attention to compressed entries goes to the k that are chosen, averaged over CSA
layers and the queries that see more than k. Beside the indexer's choice stand the k most attended
entries (no choice keeps more), the k latest and k at random.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from dsv4_jax import train as training
from dsv4_jax.attention import csa
from dsv4_jax.attention.indexer import top_mask
from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.cli import read_config_file
from dsv4_jax.data import held_out_batches
from dsv4_jax.run_config import RunConfig
from dsv4_jax.stage_model import transformer_of
from dsv4_jax.tokenized import prepare_corpus

TOKENS = flags.DEFINE_integer("tokens", 1_600_000, "Of the dense stage, in rows of 256.")
LONG_TOKENS = flags.DEFINE_integer("long_tokens", 200_000, "Of dense attention at 1,024.")
WARMUP = flags.DEFINE_integer("warmup_tokens", 120_000, "Of the indexers' warm-up.")
RATE = flags.DEFINE_float("learning_rate", 3e-3, "Of the warm-up.")
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
CHOICES = ("the indexer", "the most attended", "the latest", "at random")


def run_config() -> RunConfig:
    sections = read_config_file(str(TINY)).to_dict()
    stages = sections["stages"]
    del stages["stage4"]
    for stage, tokens in zip(stages.values(), (TOKENS, LONG_TOKENS, WARMUP), strict=True):
        stage["tokens"] = tokens.value
    stages["stage3"]["learning_rate"] = RATE.value
    sections["optimizer"]["decay_fraction"] = 0.0
    sections["train"] |= {"eval_every": 10**6, "checkpoint_every": 10**6, "sample_tokens": 1}
    return RunConfig.from_config_dict(sections)


def shares(config: RunConfig, params: dict, batches) -> dict[str, float]:
    """Return the share of the attention that each way to choose keeps."""
    model = transformer_of(config, config.stages[-1], index_learns=True)
    found = {}
    original = csa.lesson_of
    for name in CHOICES:
        def lesson(scores, mask, mass, topk, name=name):
            order = {
                "the indexer": scores, "the most attended": mass,
                "the latest": jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape),
                "at random": jax.random.uniform(jax.random.key(0), scores.shape),
            }[name].astype(jnp.float32)
            share = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)
            kept = jnp.sum(jnp.where(top_mask(order, mask, topk), share, 0), axis=-1)
            chooses = (jnp.sum(mask, axis=-1) > topk).astype(jnp.float32)
            return Lesson(kept * 0, kept * chooses, chooses)

        csa.lesson_of = lesson

        @jax.jit
        def sums(params, batch):
            features = model.apply({"params": params}, **batch, mtp=False, method="features")
            lessons = [s.lesson for s in features.layers.values() if s.lesson is not None]
            return [sum(jnp.sum(x) for x in part) for part in list(zip(*lessons, strict=True))[1:]]

        kept, chosen = np.sum([sums(params, batch) for batch in batches], axis=0)
        found[name] = float(kept / chosen)
    csa.lesson_of = original
    return found


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    config, rows = run_config(), {}
    record = training._run_stage
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        def observed(*args):
            last, state = record(*args)
            if last in config.stage_ends[1:]:
                rows[last] = jax.tree.map(np.asarray, state.params)
            return last, state

        training._run_stage = observed
        with contextlib.redirect_stdout(nowhere):
            training.train(config, folder)
            corpus = prepare_corpus(
                config.data, vocab_size=config.model.vocab_size, workdir=folder
            )
    batches = held_out_batches(corpus, config.data, seq_len=config.stages[-1].seq_len, rows=4)
    print(f"{jax.default_backend()}, k = {config.model.index_topk} of up to "
          f"{config.stages[-1].seq_len // config.model.csa_ratio} entries\n\n"
          f"| choice | {' | '.join(CHOICES)} |\n|---|{'---|' * len(CHOICES)}")
    for name, params in zip(("before", "after"), rows.values(), strict=True):
        kept = shares(config, params, batches)
        print(f"| {name} | {' | '.join(f'{kept[choice]:.3f}' for choice in CHOICES)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
