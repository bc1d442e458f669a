"""What parts of DeepSeek-V4 are worth at a small scale: each beside what it replaces.

    python benchmarks/ablation.py --parts=optimizer,residual,attention --steps=300

- optimizer: Muon beside AdamW, each at the best of several learning rates.
- residual: manifold-constrained hyper-connections (mHC) beside unconstrained ones and beside a
  plain residual, in a deep model at high learning rates.
- attention: the hybrid of windows, CSA and HCA beside full attention with as many parameters.

All runs of a part see the same batches of the standard library; the learning rate is constant
after its warm-up, so that a run's loss at a step does not depend on where it ends. Each part writes
its curves to `ablation_PART.png` in --output and prints a table.
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
from absl import app, flags, logging
from flax import linen as nn

from dsv4_jax import block, mhc, model
from dsv4_jax.cli import read_config_file
from dsv4_jax.compiler import compiler_options
from dsv4_jax.data import held_out_batches, make_train_iterator
from dsv4_jax.figures import check_figure, write_figure
from dsv4_jax.flops import count_flops
from dsv4_jax.params import constant, param
from dsv4_jax.run_config import RunConfig
from dsv4_jax.sizes import count_params
from dsv4_jax.tokenized import TokenizedCorpus, prepare_corpus
from dsv4_jax.train_step import MODEL_INPUTS, init_state, make_evaluation, make_train_step

PARTS = flags.DEFINE_list("parts", ["optimizer", "residual", "attention"], "Which to run.")
STEPS = flags.DEFINE_integer("steps", 300, "Optimizer steps of each run.", lower_bound=20)
OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder for the figures.")
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
EVALUATIONS = 20  # of each run
DIVERGED = 1.0  # nats above the lowest loss of a run, or a NaN: it has blown up

MUON_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
ADAMW_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RESIDUAL_RATES = (6e-3, 3e-2, 1e-1)
DEEP = 16  # layers


class Curve(NamedTuple):
    """How a run went."""

    name: str
    steps: np.ndarray  # of the evaluations
    bits: np.ndarray  # per byte of the held-out text, at each
    losses: np.ndarray  # nats per token of the training batches, of every step
    norms: np.ndarray  # of the gradient, of every step
    seconds: float  # of a step, median
    gflop: float  # of a step's products
    gain: float | None = None  # see `composite_gain`

    @property
    def blew_up(self) -> bool:
        """Whether the loss left its lowest value for good."""
        last = self.losses[-max(1, len(self.losses) // 20):]
        return not np.isfinite(last).all() or last.mean() > np.nanmin(self.losses) + DIVERGED

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
    sections["data"]["held_out_bytes"] = 65_536
    stage = sections["stages"]["stage1"]
    stage |= {"tokens": 2048 * STEPS.value, "batch_tokens": 2048, "seq_len": seq_len}
    sections["stages"] = {"stage1": stage}
    return RunConfig.from_config_dict(sections)


@functools.cache
def corpus_of(vocab_size: int) -> TokenizedCorpus:
    config = config_of({"vocab_size": vocab_size}, rate=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        return prepare_corpus(config.data, vocab_size=vocab_size, workdir=folder)


def train(name: str, config: RunConfig) -> Curve:
    """Take all steps of a run and evaluate it now and then."""
    stage, corpus = config.stages[0], corpus_of(config.model.vocab_size)
    batches = make_train_iterator(corpus, config.data, config.stages)
    held_out = held_out_batches(corpus, config.data, seq_len=stage.seq_len, rows=stage.rows)
    state, step = init_state(config), make_train_step(config, stage)
    gflop = count_flops(step, state, next(batches)).matmul / 1e9
    batches = make_train_iterator(corpus, config.data, config.stages)
    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    nats = jax.jit(make_evaluation(config, stage), compiler_options=compiler_options())
    every, evaluated, logged, seconds = max(1, STEPS.value // EVALUATIONS), [], [], []
    for number in range(1, STEPS.value + 1):
        began = time.perf_counter()
        state, metrics = step(state, next(batches))
        logged.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        seconds.append(time.perf_counter() - began)
        if number % every == 0 or number == STEPS.value:
            total = sum(float(nats(state.params, batch)) for batch in held_out)
            evaluated.append((number, total / math.log(2) / len(corpus.held_out_text)))
    steps, bits = map(np.array, zip(*evaluated, strict=True))
    losses, norms = np.array(logged).T
    curve = Curve(name, steps, bits, losses, norms, float(np.median(seconds)), gflop)
    if config.model.hc_mult > 1 and len(config.model.layer_types) == DEEP:
        curve = curve._replace(gain=composite_gain(config, state.params, next(batches)))
    print(f"{name}: {bits[-1]:.3f} bits per byte", file=sys.stderr, flush=True)
    return curve


def composite_gain(config: RunConfig, params: dict, batch: dict) -> float:
    """Return how much all mixing matrices of the residual streams together amplify at most.

    That is the largest sum of magnitudes in a row or a column of their product, over tokens; of
    doubly stochastic matrices it is 1.
    """
    found, plain = [], block.expand

    def expand(streams, y, post, comb):
        jax.debug.callback(lambda x: found.append(np.asarray(x, np.float64)), comb, ordered=True)
        return plain(streams, y, post, comb)

    block.expand = expand
    try:
        inputs = {key: batch[key][:1] for key in MODEL_INPUTS}
        apply = model.Transformer(config.model, config.runtime).apply
        jax.block_until_ready(
            jax.jit(functools.partial(apply, method="features"))({"params": params}, **inputs)
        )
        jax.effects_barrier()
    finally:
        block.expand = plain
    product = functools.reduce(lambda a, b: np.einsum("nkbt,kmbt->nmbt", a, b), found)
    return float(max(np.abs(product).sum(axis).max() for axis in (0, 1)))


class UnconstrainedMix(mhc.StreamMix):
    """Hyper-connections as first published: gates of tanh, a mixing matrix of any sums.

    Source: Zhu et al., arXiv:2409.19606. It starts at the same static gates as our mHC, with the
    identity as mixing matrix.
    """

    @nn.compact
    def __call__(self, streams):
        c, n, d = self.config, self.config.hc_mult, streams.shape[-1]
        fn = [
            param(self, f"fn_{name}", "width streams -> " + axes, (d, n, *sizes))
            for name, axes, sizes in (
                ("pre", "mix", (n,)), ("post", "mix", (n,)), ("comb", "mix mix_in", (n, n)),
            )
        ]
        own = mhc.own_stream_init(self.own_stream % n)

        def read(key, shape, dtype):
            return jax.nn.sigmoid(own(key, shape, dtype))

        base_pre = param(self, "base_pre", "mix", (n,), read)
        base_post = param(
            self, "base_post", "mix", (n,), lambda *args: 2 * read(*args)
        )
        base_comb = param(
            self, "base_comb", "mix mix_in", (n, n),
            lambda key, shape, dtype: jnp.eye(shape[-1], dtype=dtype),
        )
        scale = param(self, "scale", "gate", (3,), constant(c.hc_gate_init))
        flat = jnp.concatenate([fn[0], fn[1], fn[2].reshape(d, n, n * n)], axis=-1)
        moves = jnp.tanh(mhc.mix_logits(streams, flat, c.rms_norm_eps, self.runtime))
        comb = moves[2 * n :].reshape(n, n, *moves.shape[1:])
        return (
            base_pre[:, None, None] + scale[0] * moves[:n],
            base_post[:, None, None] + scale[1] * moves[n : 2 * n],
            base_comb[:, :, None, None] + scale[2] * comb,
        )


class PlainMix(nn.Module):
    """A residual connection: a sublayer reads the one stream and adds to it."""

    config: object
    runtime: object
    own_stream: int

    def __call__(self, streams):
        ones = jnp.ones((1, *streams.shape[:2]))
        return ones, ones, ones[None]


class PlainHead(nn.Module):
    """The one stream, as it is."""

    config: object
    runtime: object

    def __call__(self, streams):
        return streams[:, :, 0]


@contextlib.contextmanager
def residual(name: str) -> Iterator[None]:
    """Build models with another kind of residual connection."""
    kinds = {"mHC": (block.StreamMix, model.StreamHead), "plain": (PlainMix, PlainHead)}
    kinds["unconstrained"] = UnconstrainedMix, model.StreamHead
    before = block.StreamMix, model.StreamHead
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
    muon, adamw = (min(curves[name], key=lambda c: c.bits[-1]) for name in ("muon", "adamw"))
    target = adamw.bits[-1]
    needed = muon.steps_to(target)
    print(
        f"\nAdamW at its best ({adamw.name}) needs {STEPS.value} steps to {target:.3f} bits per "
        f"byte, Muon ({muon.name}) " + (
            "does not reach it" if needed is None else
            f"{needed:.0f}, {needed / STEPS.value:.2f} of them, "
            f"{needed * muon.seconds / (STEPS.value * adamw.seconds):.2f} of the time"
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
    print("| residual | learning rate | held-out bits per byte | lowest training loss | at the end "
          "| largest gradient norm | gain of all layers | blew up | ms a step |\n"
          f"|{'---|' * 9}")
    for curve in curves:
        name, rate = curve.name.split()
        gain = "" if curve.gain is None else f"{curve.gain:.3g}"
        print(
            f"| {name} | {rate} | {curve.bits[-1]:.3f} | {np.nanmin(curve.losses):.3f} | "
            f"{curve.losses[-5:].mean():.3f} | {curve.norms[STEPS.value // 10:].max():.3g} | "
            f"{gain} | {'yes' if curve.blew_up else 'no'} | {curve.seconds * 1e3:.0f} |"
        )
    print(flush=True)
    return curves


def run_attention() -> list[Curve]:
    """Print the hybrid beside full attention and return the curves."""
    hybrid = config_of({}, rate=6e-3, seq_len=1024)
    layers = len(hybrid.model.layer_types)
    changes = {"layer_types": ("window",) * layers, "sliding_window": 1024}
    wanted = count_params(hybrid.model).total

    def full_of(width: int) -> RunConfig:
        return config_of(changes | {"moe_intermediate_size": width}, rate=6e-3, seq_len=1024)

    full = min(
        map(full_of, range(96, 160, 2)),
        key=lambda config: abs(count_params(config.model).total - wanted),
    )
    sparse = dataclasses.replace(hybrid.stages[0], attention="sparse")
    configs = {
        "hybrid, dense CSA": hybrid,
        "hybrid, sparse CSA": dataclasses.replace(hybrid, stages=(sparse,)),
        "full attention": full,
    }
    curves = [train(name, config) for name, config in configs.items()]
    print("| attention | parameters | held-out bits per byte | steps to full attention's | GFLOP a "
          "step | ms a step |\n|---|---|---|---|---|---|")
    for curve, config in zip(curves, configs.values(), strict=True):
        needed = curve.steps_to(curves[-1].bits[-1])
        print(
            f"| {curve.name} | {count_params(config.model).total:,} | {curve.bits[-1]:.3f} | "
            f"{'never' if needed is None else f'{needed:.0f}'} | {curve.gflop:.1f} | "
            f"{curve.seconds * 1e3:.0f} |"
        )
    print(flush=True)
    return curves


def draw(curves: list[Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    held_out, training = figure.subplots(1, 2)
    for curve in curves:
        held_out.plot(curve.steps, curve.bits, label=curve.name)
        training.plot(np.arange(1, len(curve.losses) + 1), curve.losses, linewidth=0.7)
    held_out.set(xlabel="step", ylabel="held-out bits per byte", yscale="log")
    training.set(xlabel="step", ylabel="training loss, nats per token")
    held_out.legend(fontsize="small")
    write_figure(figure, str(path), "output")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    runs = {"optimizer": run_optimizer, "residual": run_residual, "attention": run_attention}
    for part in PARTS.value:
        if part not in runs:
            sys.exit(f"--parts: expected some of {', '.join(runs)}, got {part!r}")
        check_figure(str(Path(OUTPUT.value, f"ablation_{part}.png")), "output")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {STEPS.value} steps of 2,048 "
          "tokens\n")
    for part in PARTS.value:
        print(f"## {part}\n", flush=True)
        draw(runs[part](), Path(OUTPUT.value, f"ablation_{part}.png"))


if __name__ == "__main__":
    app.run(main)
