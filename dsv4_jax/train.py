"""Run a training: data, steps, log, evaluation, checkpoints and a final sample."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.compiler import check_deterministic, compiler_options
from dsv4_jax.data import (
    Batch,
    TrainIterator,
    held_out_batches,
    make_train_iterator,
)
from dsv4_jax.encoding import render_messages
from dsv4_jax.encoding_texts import THINKING
from dsv4_jax.errors import InputError
from dsv4_jax.feed import Ahead, Experts, Feed
from dsv4_jax.files import check_writable, closing, write_atomically
from dsv4_jax.flops import count_flops, flops_of
from dsv4_jax.infer import generate
from dsv4_jax.init_from import adopt_model, load_weights
from dsv4_jax.log import RunLog
from dsv4_jax.model import param_shapes
from dsv4_jax.pace import DATA, EVALUATION, SAVING, SPEED, STEP, Pace
from dsv4_jax.profile import Profiler
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.run_config import CHAT, RunConfig, StageConfig, stage_name
from dsv4_jax.served_model import ModelFolder
from dsv4_jax.sharding import MESH_AXES, batch_sharding, make_mesh, replicated, shardings_of
from dsv4_jax.sizes import count_params
from dsv4_jax.spikes import Spike, SpikeGuard
from dsv4_jax.stop import StopRequest
from dsv4_jax.terminal import duration, say, timed
from dsv4_jax.tokenized import TokenizedCorpus, baseline_bits_per_byte, prepare_corpus
from dsv4_jax.train_step import (
    HELD_OUT,
    MODEL_INPUTS,
    Skips,
    TrainState,
    abstract_state,
    init_state,
    make_evaluation,
    make_routing,
    make_train_step,
    optimizer_flops,
    state_shardings,
    transformer_of,
)
from dsv4_jax.wandb_log import WandbLog, check_wandb

ANTICIPATORY = "anticipatory_routing"  # name of a metric: whether a step had it
GUARD, ROUTED = "guard", "routed_batches"  # in what a checkpoint has beside the state


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all parts of a run share."""

    config: RunConfig
    workdir: Path
    mesh: Mesh | None  # None on one device
    corpus: TokenizedCorpus
    started: float  # when, by time.time()
    profile_steps: tuple[int, int] | None
    wandb_project: str | None
    init_from: ModelFolder | None

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """What general compressors need for the held-out text, in bits per byte."""
        return baseline_bits_per_byte(self.corpus.held_out_text)

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """Put this host's part of a batch on its devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = batch_sharding(self.mesh, len(batch["tokens"]) * jax.process_count())
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in batch.items()
        }


@dataclasses.dataclass(frozen=True)
class _Tools:
    """What steps are taken with, from the first stage to the last."""

    batches: TrainIterator
    checkpoints: Checkpoints
    log: RunLog
    pace: Pace
    skips: _SkipWatch
    guard: SpikeGuard
    stop: StopRequest


def train(
    config: RunConfig, workdir: str | Path, *, profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None, init_from: ModelFolder | None = None,
) -> TrainState:
    """Train to the end of the run, going on from the newest undamaged checkpoint of the workdir.

    The workdir receives the config, the tokenizer and the encoded text, checkpoints, metrics as
    JSON lines and for TensorBoard, and the final sample.

    SIGTERM and SIGINT end the run after the step that is being taken, with a checkpoint of it.

    Args:
      profile_steps: the first and the last step of which a trace is written to `profile/`.
      wandb_project: of Weights & Biases, where the metrics go, too.
      init_from: the model whose weights and tokenizer a run without a checkpoint starts with, as
        `served_model.check_model` returns it; None: weights are drawn.
    Raises:
      InputError: the config, the data, the workdir or its checkpoint cannot be used; too many
        batches in a row had a loss or gradient that is not finite, or too many loss spikes
        followed each other.
    """
    workdir, mesh, started = Path(workdir), _mesh_of(config), time.time()
    if wandb_project is not None:
        check_wandb(wandb_project)
    check_writable(workdir)
    _announce_model(config, mesh)
    # Opened first: a run that may not go on here is refused before it writes anything else.
    checkpoints = Checkpoints(
        workdir, keep=config.train.keep_checkpoints, config=config.to_dict(),
        patience=config.train.checkpoint_patience,
    )
    with closing(checkpoints):
        if init_from is not None:
            adopt_model(init_from, config, workdir)
        corpus = _read_corpus(config, workdir)
        run = _Run(config, workdir, mesh, corpus, started, profile_steps, wandb_project, init_from)
        with StopRequest() as stop:
            state = _train(run, checkpoints, stop)
    if stop:
        say(f"ended by {stop.signal} after step {state.step}; the same command goes on from there")
    return state


def _train(run: _Run, checkpoints: Checkpoints, stop: StopRequest) -> TrainState:
    config = run.config
    prompt = _sample_prompt(run)  # first: what cannot be sampled from is refused before training
    batches = make_train_iterator(
        run.corpus, config.data, config.stages,
        shard_index=jax.process_index(), shard_count=jax.process_count(),
    )
    first, state, place = _first_state(run, checkpoints, batches)
    described = json.dumps(config.to_dict(), indent=1)
    write_atomically(run.workdir / "config.json", described.encode())
    with closing(RunLog(run.workdir, first, _wandb_log(run))) as log:
        if first >= config.steps:
            say(f"the run is complete: {first} of {config.steps} steps")
        # A complete run tells its score again; a signal may have kept another from it.
        due = first > 0 and _is_due(config, first, config.train.eval_every)
        if first >= config.steps or due and not _has_score(log, first):
            _Evaluation(run, _stage_of(config, first), log, stop).report(first, state.params)
        skips = _SkipWatch(config.train.most_skips, int(state.skips.total))
        tools = _Tools(
            batches, checkpoints, log, Pace(log, started=run.started), skips,
            SpikeGuard(config.spikes, place.get(GUARD)), stop,
        )
        routed = _restore_routed(run, checkpoints, state, first, place.get(ROUTED, 0))
        while first < config.steps and not stop:
            first, state = _run_stage(run, tools, state, first, routed)
            routed = []  # no batch is routed in the stage before its own
    if not stop:
        _write_sample(run, state, prompt)
    return state


def _wandb_log(run: _Run) -> WandbLog | None:
    if run.wandb_project is None:
        return None
    return WandbLog(run.wandb_project, run.workdir, run.config.to_dict())


def _first_state(
    run: _Run, checkpoints: Checkpoints, batches: TrainIterator
) -> tuple[int, TrainState, dict]:
    """Return the steps taken, their state and what was saved with it; batches at their place."""
    step = checkpoints.latest_step
    if step is None:
        params = None
        if run.init_from is not None:
            params = load_weights(run.init_from, run.mesh)
        with timed("drawing the initial weights" if params is None else "making the state"):
            return 0, jax.block_until_ready(init_state(run.config, run.mesh, params)), {}
    state, place = checkpoints.restore(abstract_state(run.config, run.mesh))
    batches.set_state(place)
    say(f"resumed from the checkpoint of step {step}")
    return step, state, place


def _stage_of(config: RunConfig, step: int) -> StageConfig:
    return config.stages[config.stage_at(step)]


def _is_due(config: RunConfig, step: int, every: int) -> bool:
    """Say whether what is done every so many steps is due; at the end of a stage it always is."""
    return step % every == 0 or step in config.stage_ends


def _run_stage(
    run: _Run, tools: _Tools, state: TrainState, first: int, routed: list[Experts]
) -> tuple[int, TrainState]:
    """Take the steps after `first` to the end of their stage; log, evaluate and save when due.

    Returns the last step and the state after it. It is an earlier one if a signal came.

    Args:
      routed: experts of the first batches, chosen before the run was cut off.
    """
    config, plan, pace, guard = run.config, run.config.train, tools.pace, tools.guard
    index = config.stage_at(first + 1)
    stage, last = config.stages[index], config.stage_ends[index]
    _announce_stage(config, first + 1)
    evaluation = _Evaluation(run, stage, tools.log, tools.stop)
    guard.begin_stage(index)
    feed = Feed(
        tools.batches, first + 1, last, place=run.place, route=_routing_of(run, stage),
        lag=config.spikes.lag, routed=routed,
    )
    feed.read(state.params, first, guard.until)
    programs = _Programs(run, stage, pace)
    with closing(Profiler(run.workdir / "profile", run.profile_steps)) as profiler:
        for step in range(first + 1, last + 1):
            ahead = feed.take()
            program = programs.of(state, ahead)
            profiler.before(step)
            with pace.phase(STEP):
                state, metrics = program(state, ahead.inputs)
            # While the devices work: the next batches.
            with pace.phase(DATA):
                feed.read(state.params, step, guard.until)
            with pace.phase(STEP):
                tools.skips.look(step, metrics)
                spike = guard.look(step, metrics)
            pace.step()
            profiler.after(step, metrics)
            if _is_due(config, step, plan.log_every):
                with pace.phase(STEP):
                    values = {name: float(x) for name, x in metrics.items() if not x.ndim}
                values |= {ANTICIPATORY: float(ahead.experts is not None)}
                values |= pace.values(stage.batch_tokens)
                say(_step_line(step, config.steps, values))
                tools.log.metrics(step, values)
            went_back = spike is not None and tools.checkpoints.go_back(
                spike.step - config.spikes.margin
            )
            if went_back:
                state = _state_of_before(run, tools, spike, step)
                feed.drop_experts()
                feed.read(state.params, step, guard.until)
            if _is_due(config, step, plan.eval_every):
                with pace.phase(EVALUATION):
                    arrays = {name: x.tolist() for name, x in metrics.items() if x.ndim}
                    tools.log.metrics(step, arrays)
                    evaluation.report(step, state.params)
            ending = bool(tools.stop)
            if _is_due(config, step, plan.checkpoint_every) or ending or went_back:
                # After the log: what a checkpoint covers is neither lost nor logged twice.
                with pace.phase(SAVING):
                    place = ahead.place | {GUARD: guard.state(), ROUTED: len(feed.routed)}
                    tools.checkpoints.save(step, state, place, feed.routed)
            tools.checkpoints.check()
            if ending:
                break
    return step, state


def _routing_of(run: _Run, stage: StageConfig) -> Callable:
    return jax.jit(
        make_routing(run.config, stage, run.mesh), compiler_options=_options_of(run.config)
    )


def _restore_routed(
    run: _Run, checkpoints: Checkpoints, state: TrainState, first: int, count: int
) -> list[Experts]:
    """Return the experts of batches ahead that the checkpoint of the state has."""
    if not count:
        return []
    stage, sharding = _stage_of(run.config, first + 1), SingleDeviceSharding(jax.devices()[0])
    if run.mesh is not None:
        sharding = batch_sharding(run.mesh, stage.rows)
    tokens = jax.ShapeDtypeStruct((stage.rows, stage.seq_len), jnp.int32)
    batch = dict.fromkeys(MODEL_INPUTS, tokens)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(_routing_of(run, stage), state.params, batch),
    )
    return checkpoints.restore_routed([like] * count)


def _state_of_before(run: _Run, tools: _Tools, spike: Spike, step: int) -> TrainState:
    """Return the state to go back to; all batches that were seen since count as skipped."""
    say(str(spike))
    tools.guard.went_back(spike, step)
    state, _ = tools.checkpoints.restore(abstract_state(run.config, run.mesh))
    back, until = int(state.step), tools.guard.until
    skipped = int(state.skips.total) + step - back
    tools.skips.expect(skipped)
    seen, total, in_row = (
        jax.device_put(jnp.int32(x), state.step.sharding) for x in (step, skipped, 0)
    )
    say(
        f"back to the checkpoint of step {back}"
        + (f"; anticipatory routing up to step {until}" if until > step else "")
    )
    return state._replace(step=seen, skips=Skips(total, in_row))


class _Programs:
    """The compiled step of a stage: as usual, and for batches with the experts to use."""

    def __init__(self, run: _Run, stage: StageConfig, pace: Pace):
        self._run, self._stage, self._pace = run, stage, pace
        self._compiled = {}

    def of(self, state: TrainState, ahead: Ahead) -> Callable:
        """Return the program for a batch; the first of its kind is waited for."""
        kind = ahead.experts is not None
        if kind not in self._compiled:
            self._compiled[kind] = _compile_step(self._run, self._stage, state, ahead.inputs)
            self._pace.restart()
        program, self._pace.flops = self._compiled[kind]
        return program


def _announce_stage(config: RunConfig, step: int) -> None:
    index = config.stage_at(step)
    stage = config.stages[index]
    say(
        f"{stage_name(index)} of {len(config.stages)}: steps {step} to {config.stage_ends[index]}, "
        f"{stage.rows} rows of {stage.seq_len} tokens, attention {stage.attention}"
    )


class _SkipWatch:
    """Tell of batches that were skipped, and end a run that does nothing else.

    Each step's numbers are looked at when the next one has been given to the devices, which so
    never wait for it.
    """

    def __init__(self, most: int, total: int):
        self._most, self._total, self._before = most, total, None

    def expect(self, total: int) -> None:
        """Take this for the batches that were skipped, when a run has gone back."""
        self._total, self._before = total, None

    def look(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take a step's numbers, and look at those of the step before.

        Raises:
          InputError: too many batches in a row were skipped.
        """
        before, self._before = self._before, metrics
        if before is None or int(before["skipped"]) == self._total:
            return
        self._total, in_row = int(before["skipped"]), int(before["skipped_in_row"])
        say(f"step {step - 1}: the loss or gradient is not finite, its batch is skipped")
        if in_row >= self._most:
            raise InputError(
                f"step {step - 1}: expected a finite loss and gradient, got none in the last "
                f"{in_row} steps; start again from the checkpoint before, with a lower "
                "optimizer.learning_rate if it happens again"
            )


# Of a step's metrics, those that its line shows, where there are.
_SHOWN = {
    "loss": "loss {:.4f}", "index_loss": "index loss {:.4f}", "index_recall": "recall {:.3f}",
    "grad_norm": "grad norm {:.3f}", "learning_rate": "learning rate {:.2e}",
    f"{SPEED}tokens_per_second": "{:,.0f} tokens/s",
}


def _step_line(step: int, steps: int, values: dict[str, float]) -> str:
    shown = [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
    seconds_left = values[f"{SPEED}seconds_per_step"] * (steps - step)
    return "  ".join([f"step {step}/{steps}", *shown, f"left {duration(seconds_left)}"])


def _compile_step(
    run: _Run, stage: StageConfig, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, int]:
    """Compile a stage's step for arguments placed as these are; count the operations of products.

    From their description: a fresh state and a restored one differ in what JAX may still move, so
    that they themselves would make two programs, and a run that goes on would compile again.
    """
    outputs = None
    if run.mesh is not None:
        # Whole metrics on each device: this host can read them.
        outputs = state_shardings(run.config, run.mesh), replicated(run.mesh)
    step = jax.jit(
        make_train_step(run.config, stage, run.mesh), donate_argnums=0, out_shardings=outputs,
        compiler_options=_options_of(run.config),
    )
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    with timed("compiling the training step"):
        traced = step.trace(*described)
        if run.config.runtime.remat:
            # What is computed again is no progress.
            stored = dataclasses.replace(run.config.runtime, remat=False)
            config = dataclasses.replace(run.config, runtime=stored)
            flops = count_flops(make_train_step(config, stage, run.mesh), *described)
        else:
            flops = flops_of(traced.jaxpr)
        compiled = traced.lower().compile()
    if run.config.train.deterministic and jax.default_backend() == "gpu":
        check_deterministic(compiled.as_text())
    share = optimizer_flops(run.config, stage) / flops.matmul
    say(f"a step: {flops.matmul / 1e9:,.4g} GFLOP in matrix products, {share:.1%} of them Muon's")
    return compiled, flops.matmul


def _options_of(config: RunConfig) -> dict[str, str | bool] | None:
    return compiler_options(deterministic=config.train.deterministic)


class _Evaluation:
    """Score the held-out text in bits per byte, beside what general compressors need for it.

    In rows of the stage, whose attention it has.
    """

    def __init__(self, run: _Run, stage: StageConfig, log: RunLog, stop: StopRequest):
        self._run, self._log, self._stop = run, log, stop
        # Rows of one micro-batch: what fits for training fits here.
        self._batches = held_out_batches(
            run.corpus, run.config.data,
            seq_len=stage.seq_len, rows=stage.rows // stage.accumulation,
            shard_index=jax.process_index(), shard_count=jax.process_count(),
        )
        self._nats = jax.jit(
            make_evaluation(run.config, stage, run.mesh),
            compiler_options=_options_of(run.config),
        )

    def report(self, step: int, params: dict) -> None:
        """Print and log the bits per byte of the held-out text, unless the run is to end."""
        nats = 0.0
        for batch in self._batches:
            if self._stop:
                return
            nats += float(self._nats(params, self._run.place(batch)))
        bits = nats / math.log(2) / len(self._run.corpus.held_out_text)
        baselines = ", ".join(f"{name} -9 {b:.3f}" for name, b in self._run.baselines.items())
        say(f"held-out text: {bits:.3f} bits per byte ({baselines})")
        if not _has_score(self._log, step):
            self._log.metrics(step, {HELD_OUT: bits})


def _has_score(log: RunLog, step: int) -> bool:
    """Say whether the log has the held-out score of a step that the run goes on from."""
    last = log.last(HELD_OUT)
    return last is not None and last["step"] == step


def _sample_prompt(run: _Run) -> np.ndarray:
    """Return the token ids that the final sample continues, or answers."""
    plan, tokenizer, data = run.config.train, run.corpus.tokenizer, run.config.data
    if data.format == CHAT:
        mode, effort = THINKING[data.thinking]
        question = [{"role": "user", "content": plan.sample_prompt}]
        prompt = tokenizer.encode_segments(
            render_messages(question, thinking_mode=mode, reasoning_effort=effort)
        )
    else:
        prompt = np.array([tokenizer.bos_id, *tokenizer.encode(plan.sample_prompt)], np.int32)
    room = run.config.model.max_position_embeddings - plan.sample_tokens
    if len(prompt) > room:
        raise InputError(
            f"train.sample_prompt: expected at most {room} tokens, which leave room for "
            f"sample_tokens={plan.sample_tokens} in max_position_embeddings, got {len(prompt)}; "
            "shorten it"
        )
    return prompt


def _write_sample(run: _Run, state: TrainState, prompt: np.ndarray) -> None:
    """Print the prompt and what the model makes of it, and keep both in the workdir."""
    plan, tokenizer = run.config.train, run.corpus.tokenizer
    params = round_weights(state.params, run.config.model, run.config.runtime.linears)
    new = generate(
        run.config.model, params, prompt, max_new_tokens=plan.sample_tokens,
        temperature=plan.sample_temperature, top_p=plan.sample_top_p, seed=plan.seed,
        stop=tokenizer.eos_id, runtime=transformer_of(run.config, run.config.stages[-1]).runtime,
    )
    between = "\n\n" if run.config.data.format == CHAT else ""
    text = plan.sample_prompt + between + tokenizer.decode(new.tokens[0])
    write_atomically(run.workdir / "sample.txt", text.encode())
    say(f"sample:\n{text}")


def _read_corpus(config: RunConfig, workdir: Path) -> TokenizedCorpus:
    with timed("reading, tokenizing and encoding the text"):
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, workdir=workdir)
    say(
        f"data: {len(corpus.train.tokens):,} tokens in {len(corpus.train):,} documents to train "
        f"on, {len(corpus.held_out_text):,} bytes held out"
    )
    return corpus


def _mesh_of(config: RunConfig) -> Mesh | None:
    """Return the mesh of a run; a run on one device needs none."""
    sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    if math.prod(sizes) == 1:
        return None
    mesh = make_mesh(sizes)
    # The rows of a micro-batch and every axis of the model must fall into equal parts.
    for stage in config.stages:
        batch_sharding(mesh, stage.rows // stage.accumulation)
    shardings_of(param_shapes(config.model), mesh)
    return mesh


def _announce_model(config: RunConfig, mesh: Mesh | None) -> None:
    size = count_params(config.model)
    used = 1 if mesh is None else mesh.size
    say(
        f"model: {size.total:,} parameters, {size.active:,} active per token, {size.mtp:,} more "
        f"for multi-token prediction; on {used} of {len(jax.devices())} "
        f"{jax.default_backend()} devices"
    )
