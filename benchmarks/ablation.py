"""What parts of DeepSeek-V4 are worth at a small scale: each beside what it replaces.

    python benchmarks/ablation.py --parts=optimizer,residual,attention --steps=300

- optimizer: Muon beside AdamW, each at the best of several learning rates.
- residual: manifold-constrained hyper-connections (mHC) beside unconstrained ones and beside a
  plain residual, in a deep model at high learning rates.
- attention: the hybrid of windows, CSA and HCA, dense and brought to sparse as V4 does it, beside
  full attention with as many parameters.

All runs of a part see the same batches of the standard library; the learning rate is constant
after its warm-up, so that a run's loss at a step does not depend on where it ends. Steps that are
not finite are not skipped. Each part writes its curves to `ablation_PART.png` in --output and
prints a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from dsv4_jax import block, mhc, model
from dsv4_jax.cli import read_config_file, run
from dsv4_jax.compiler import compiler_options
from dsv4_jax.data import held_out_batches, make_train_iterator
from dsv4_jax.errors import InputError
from dsv4_jax.figures import check_figure, write_figure
from dsv4_jax.params import constant, param
from dsv4_jax.run_config import RunConfig
from dsv4_jax.sizes import count_params
from dsv4_jax.stage_model import MODEL_INPUTS, abstract_inputs, make_evaluation
from dsv4_jax.tokenized import TokenizedCorpus, prepare_corpus
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step, step_flops

PARTS = flags.DEFINE_list("parts", ["optimizer", "residual", "attention"], "Which to run.")
STEPS = flags.DEFINE_integer("steps", 300, "Optimizer steps of each run.", lower_bound=20)
OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder for the figures.")
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
EVALUATIONS = 20  # of each run
BLOWN_UP = 0.1  # bits per byte at the end above a run's best, or a NaN

MUON_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
ADAMW_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RESIDUAL_RATES = (6e-3, 3e-2, 1e-1)
ATTENTION_RATES = (3e-3, 6e-3)
DEEP = 16  # layers


class Curve(NamedTuple):
    """How a run went."""

    name: str
    steps: np.ndarray  # of the evaluations
    bits: np.ndarray  # per byte of the held-out text, at each
    losses: np.ndarray  # nats per token of the training batches, of every step
    norms: np.ndarray  # of the model's gradient, of every step in which it learns
    seconds: float  # of a step of the last stage, median
    gflop: float  # of such a step's products
    gain: float | None = None  # see `composite_gain`

    @property
    def best(self) -> float:
        """The fewest bits per byte."""
        return float(np.nanmin(self.bits))

    @property
    def blew_up(self) -> bool:
        """Whether the run has left its best state for good."""
        return not self.bits[-1] <= self.best + BLOWN_UP

    def steps_to(self, bits: float) -> float | None:
        """Return the step at which the held-out text first needed so little; None: never."""
        below = np.flatnonzero(self.bits <= bits)
        if not len(below):
            return None
        at = below[0]
        if at == 0:
            return float(self.steps[0])
        ratio = (self.bits[at - 1] - bits) / (self.bits[at - 1] - self.bits[at])
        return float(self.steps[at - 1] + ratio * (self.steps[at] - self.steps[at - 1]))


def config_of(changes: dict, *, rate: float, optimizer: str = "muon", seq_len: int = 256
              ) -> RunConfig:
    """Return a run of configs/tiny.py, smaller, with these changes of the model."""
    sections = read_config_file(str(TINY)).to_dict()
    sections["model"] |= {
        "vocab_size": 2048, "hidden_size": 96, "moe_intermediate_size": 96, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "num_nextn_predict_layers": 0,
    }
    sections["model"] |= changes
    layers = len(sections["model"]["layer_types"])
    sections["model"]["moe_types"] = ("hash",) + ("learned",) * (layers - 1)
    sections["optimizer"] |= {
        "name": optimizer, "learning_rate": rate, "end_learning_rate": 0.0, "decay_fraction": 0.0,
    }
    sections["train"]["skip_non_finite"] = False
    sections["data"]["held_out_bytes"] = 65_536
    stage = sections["stages"]["stage1"]
    stage |= {"tokens": 2048 * STEPS.value, "batch_tokens": 2048, "seq_len": seq_len}
    sections["stages"] = {"stage1": stage}
    return RunConfig.from_config_dict(sections)


def brought_to_sparse(config: RunConfig) -> RunConfig:
    """Return the run in three stages: dense, the indexers' warm-up, sparse."""
    (stage,) = config.stages
    warm_up, sparse = STEPS.value // 10, STEPS.value * 2 // 5
    steps = {"dense": STEPS.value - warm_up - sparse, "indexer": warm_up, "sparse": sparse}
    stages = (
        dataclasses.replace(stage, attention=attention, tokens=count * stage.batch_tokens)
        for attention, count in steps.items()
    )
    return dataclasses.replace(config, stages=tuple(stages))


@functools.cache
def corpus_of(vocab_size: int) -> TokenizedCorpus:
    config = config_of({"vocab_size": vocab_size}, rate=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        return prepare_corpus(config.data, vocab_size=vocab_size, workdir=folder)


def train(name: str, config: RunConfig) -> Curve:
    """Take all steps of a run and evaluate it now and then."""
    corpus, taken = corpus_of(config.model.vocab_size), 0
    batches = make_train_iterator(corpus, config.data, config.stages)
    state, every = init_state(config), max(1, STEPS.value // EVALUATIONS)
    evaluated, losses, norms = [], [], []
    for stage in config.stages:
        step, seconds = make_train_step(config, stage), []
        gflop = step_flops(config, stage, state, abstract_inputs(stage)).matmul / 1e9
        step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
        nats = jax.jit(make_evaluation(config, stage), compiler_options=compiler_options())
        held_out = held_out_batches(corpus, config.data, seq_len=stage.seq_len, rows=stage.rows)
        for _ in range(stage.steps):
            batch, began = next(batches), time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
            if "grad_norm" in metrics:
                norms.append(float(metrics["grad_norm"]))
            taken += 1
            if taken % every == 0 or taken == STEPS.value:
                total = sum(float(nats(state.params, rows)) for rows in held_out)
                evaluated.append((taken, total / math.log(2) / len(corpus.held_out_text)))
    steps, bits = map(np.array, zip(*evaluated, strict=True))
    curve = Curve(
        name, steps, bits, np.array(losses), np.array(norms), float(np.median(seconds)), gflop
    )
    if config.model.hc_mult > 1 and len(config.model.layer_types) == DEEP:
        curve = curve._replace(gain=composite_gain(config, state.params, batch))
    print(f"{name}: {bits[-1]:.3f} bits per byte", file=sys.stderr, flush=True)
    return curve


def composite_gain(config: RunConfig, params: dict, batch: dict) -> float:
    """Return how much all mixing matrices of the residual streams together amplify at most.

    That is the largest sum of magnitudes in a row or a column of their product, over tokens; of
    doubly stochastic matrices it is 1.
    """
    found, plain = [], mhc.expand

    def expand(streams, y, post, comb):
        jax.debug.callback(lambda x: found.append(np.asarray(x, np.float64)), comb, ordered=True)
        return plain(streams, y, post, comb)

    mhc.expand = expand
    try:
        inputs = {key: batch[key][:1] for key in MODEL_INPUTS}
        apply = model.Transformer(config.model, config.runtime).apply
        jax.block_until_ready(
            jax.jit(functools.partial(apply, method="features"))({"params": params}, **inputs)
        )
        jax.effects_barrier()
    finally:
        mhc.expand = plain
    product = functools.reduce(lambda a, b: np.einsum("nkbt,kmbt->nmbt", a, b), found)
    return float(max(np.abs(product).sum(axis).max() for axis in (0, 1)))


class UnconstrainedMix(nn.Module):
    """Hyper-connections as first published: gates of tanh, a mixing matrix of any sums.

    Each stream, normalised by itself, moves its own gates. Their static parts are kept as
    differences from where they start: they are not to decay, and so do not decay towards zero.

    Source: Zhu et al., arXiv:2409.19606.
    """

    config: object
    runtime: object
    own_stream: int

    @nn.compact
    def __call__(self, residual):
        streams = mhc.finish(residual, self.config, self.runtime)
        c, n, d = self.config, self.config.hc_mult, streams.shape[-1]
        zeros = nn.initializers.zeros
        fn_pre = param(self, "fn_pre", "width -> gate", (d, 1), zeros)
        fn_post = param(self, "fn_post", "width -> gate", (d, 1), zeros)
        fn_comb = param(self, "fn_comb", "width -> mix", (d, n), zeros)
        base_pre = param(self, "base_pre", "mix", (n,), zeros)
        base_post = param(self, "base_post", "mix", (n,), zeros)
        base_comb = param(self, "base_comb", "mix mix_in", (n, n), zeros)
        scale = param(self, "scale", "gate", (2,), constant(c.hc_gate_init))
        wide = streams.astype(jnp.float32)
        squares = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(squares + c.rms_norm_eps)
        fn = jnp.concatenate([fn_pre, fn_post, fn_comb], axis=-1)
        moves = jnp.tanh(jnp.einsum("btnd,dx->xnbt", normed, fn))
        own = jnp.arange(n) == self.own_stream % n
        pre = (own + base_pre)[:, None, None] + scale[0] * moves[0]
        post = (1 + base_post)[:, None, None] + scale[1] * moves[1]
        comb = (jnp.eye(n) + base_comb)[:, :, None, None]
        comb = comb + scale[0] * jnp.swapaxes(moves[2:], 0, 1)
        return streams, mhc.collapse(streams, pre), post, comb


class SumHead(nn.Module):
    """The sum of the streams."""

    config: object
    runtime: object

    def __call__(self, streams):
        return jnp.sum(streams, axis=2)


class PlainMix(nn.Module):
    """A residual connection: a sublayer reads the one stream and adds to it."""

    config: object
    runtime: object
    own_stream: int

    def __call__(self, residual):
        streams = mhc.finish(residual, self.config, self.runtime)
        ones = jnp.ones((1, *streams.shape[:2]))
        return streams, streams[:, :, 0], ones, ones[None]


@contextlib.contextmanager
def residual(name: str) -> Iterator[None]:
    """Build models with another kind of residual connection."""
    before = block.StreamMix, model.StreamHead
    kinds = {
        "mHC": before, "unconstrained": (UnconstrainedMix, SumHead), "plain": (PlainMix, SumHead),
    }
    block.StreamMix, model.StreamHead = kinds[name]
    try:
        yield
    finally:
        block.StreamMix, model.StreamHead = before


def run_optimizer() -> list[Curve]:
    """Print Muon beside AdamW and return the curves."""
    curves = {
        optimizer: [
            train(f"{optimizer} {rate:g}", config_of({}, rate=rate, optimizer=optimizer))
            for rate in rates
        ]
        for optimizer, rates in (("muon", MUON_RATES), ("adamw", ADAMW_RATES))
    }
    print("| optimizer | learning rate | held-out bits per byte | ms a step |\n|---|---|---|---|")
    for curve in [*curves["muon"], *curves["adamw"]]:
        name, rate = curve.name.split()
        print(f"| {name} | {rate} | {curve.bits[-1]:.3f} | {curve.seconds * 1e3:.0f} |")
    muon, adamw = (min(curves[name], key=lambda c: c.best) for name in ("muon", "adamw"))
    target = adamw.best
    needed, usual = muon.steps_to(target), adamw.steps_to(target)
    print(
        f"\nAdamW at its best ({adamw.name}) needs {usual:.0f} steps to {target:.3f} bits per "
        f"byte, Muon ({muon.name}) " + (
            "does not reach it" if needed is None else f"{needed:.0f}, {needed / usual:.2f} of them"
        ) + "\n", flush=True,
    )
    return [*curves["muon"], *curves["adamw"]]


def run_residual() -> list[Curve]:
    """Print mHC beside other residual connections and return the curves."""
    pattern = ("window", "hca") * (DEEP // 2)
    curves = []
    for rate in RESIDUAL_RATES:
        for name in ("mHC", "unconstrained", "plain"):
            changes = {"layer_types": pattern, "hc_mult": 1 if name == "plain" else 4}
            with residual(name):
                curves.append(train(f"{name} {rate:g}", config_of(changes, rate=rate)))
    print("| residual | learning rate | held-out bits per byte, best | at the end | largest "
          "gradient norm | gain of all layers | blew up | ms a step |\n"
          f"|{'---|' * 8}")
    for curve in curves:
        name, rate = curve.name.split()
        gain = "" if curve.gain is None else f"{curve.gain:.3g}"
        print(
            f"| {name} | {rate} | {curve.best:.3f} | {curve.bits[-1]:.3f} | "
            f"{curve.norms[STEPS.value // 10:].max():.3g} | "
            f"{gain} | {'yes' if curve.blew_up else 'no'} | {curve.seconds * 1e3:.0f} |"
        )
    print(flush=True)
    return curves


def run_attention() -> list[Curve]:
    """Print the hybrid beside full attention and return the curves."""

    def at(rate: float, **changes) -> RunConfig:
        return config_of(changes, rate=rate, seq_len=1024)

    def parameters(**changes) -> int:
        return count_params(at(ATTENTION_RATES[0], **changes).model).total

    wanted, layers = parameters(), len(at(ATTENTION_RATES[0]).model.layer_types)
    full = {"layer_types": ("window",) * layers, "sliding_window": 1024}
    full["moe_intermediate_size"] = min(
        range(96, 160, 2),
        key=lambda width: abs(parameters(**full, moe_intermediate_size=width) - wanted),
    )
    sizes = {
        "full": parameters(**full), "hybrid, dense": wanted, "hybrid, to sparse": wanted,
    }
    curves = {}
    for name, changes in (("full", full), ("hybrid, dense", {})):
        for rate in ATTENTION_RATES:
            curves[name, rate] = train(f"{name}, {rate:g}", at(rate, **changes))
    rate = min(ATTENTION_RATES, key=lambda rate: curves["hybrid, dense", rate].best)
    curves["hybrid, to sparse", rate] = train(
        f"hybrid, to sparse, {rate:g}", brought_to_sparse(at(rate))
    )
    target = min(curves["full", rate].best for rate in ATTENTION_RATES)
    print("| attention | learning rate | parameters | held-out bits per byte | steps to full "
          "attention's best | GFLOP a step at the end | ms |\n|---|---|---|---|---|---|---|")
    for (name, rate), curve in curves.items():
        needed = curve.steps_to(target)
        print(
            f"| {name} | {rate:g} | {sizes[name]:,} | "
            f"{curve.bits[-1]:.3f} | {'never' if needed is None else f'{needed:.0f}'} | "
            f"{curve.gflop:.1f} | {curve.seconds * 1e3:.0f} |"
        )
    print(flush=True)
    return [*curves.values()]


def draw(curves: list[Curve], path: Path) -> None:
    """Draw the curves of a part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    held_out, training = figure.subplots(1, 2)
    for curve in curves:
        held_out.plot(curve.steps, curve.bits, label=curve.name)
        training.plot(np.arange(1, len(curve.losses) + 1), curve.losses, linewidth=0.7)
    for axes, name in ((held_out, "held-out bits per byte"), (training, "training loss, nats")):
        axes.set(xlabel="step", ylabel=name)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, min(top, 1.5 * axes.lines[0].get_ydata()[0]))  # blow-ups leave it
    held_out.legend(fontsize="small")
    write_figure(figure, str(path), "output")


def main():
    runs = {"optimizer": run_optimizer, "residual": run_residual, "attention": run_attention}
    for part in PARTS.value:
        if part not in runs:
            raise InputError(f"--parts: expected some of {', '.join(runs)}, got {part!r}")
        check_figure(str(Path(OUTPUT.value, f"ablation_{part}.png")), "output")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {STEPS.value} steps of 2,048 "
          "tokens\n")
    for part in PARTS.value:
        print(f"## {part}\n", flush=True)
        draw(runs[part](), Path(OUTPUT.value, f"ablation_{part}.png"))


if __name__ == "__main__":
    run(main)
