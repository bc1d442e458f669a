"""Run a training: data, steps, log, evaluation, checkpoints and a final sample."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.data import TrainIterator, fitting, make_train_iterator
from dsv4_jax.feed import Experts, Feed
from dsv4_jax.files import check_writable, closing, write_atomically
from dsv4_jax.held_out import HeldOut, has_score
from dsv4_jax.init_from import adopt_model, load_weights
from dsv4_jax.log import RunLog
from dsv4_jax.pace import DATA, EVALUATION, SAVING, SPEED, STEP, Pace
from dsv4_jax.profile import Profiler
from dsv4_jax.programs import Programs, routing_of
from dsv4_jax.run import Run, announce_model, corpus_of, mesh_of
from dsv4_jax.run_config import RunConfig, StageConfig, stage_name
from dsv4_jax.sample import sample_prompt, write_sample
from dsv4_jax.sharding import batch_sharding
from dsv4_jax.skips import SkipWatch
from dsv4_jax.spikes import Spike, SpikeGuard
from dsv4_jax.stage_model import abstract_inputs
from dsv4_jax.stop import StopRequest
from dsv4_jax.terminal import duration, say, timed
from dsv4_jax.train_state import Skips, TrainState, abstract_state, init_state
from dsv4_jax.wandb_log import WandbLog, check_wandb

ANTICIPATORY = "anticipatory_routing"  # name of a metric: whether a step had it
GUARD, ROUTED = "guard", "routed_batches"  # in what a checkpoint has beside the state


@dataclasses.dataclass(frozen=True)
class _Tools:
    """What steps are taken with, from the first stage to the last."""

    batches: TrainIterator
    checkpoints: Checkpoints
    log: RunLog
    held_out: Callable[[StageConfig], HeldOut]
    pace: Pace
    skips: SkipWatch
    guard: SpikeGuard
    stop: StopRequest


def train(
    config: RunConfig, workdir: str | Path, *, profile_steps: tuple[int, int] | None = None,
    wandb_project: str | None = None, init_from: str | Path | None = None,
) -> TrainState:
    """Train to the end of the run, going on from the newest undamaged checkpoint of the workdir.

    The workdir receives the config, the tokenizer and the encoded text, checkpoints, metrics as
    JSON lines and for TensorBoard, and the final sample.

    SIGTERM and SIGINT end the run after the step that is being taken, with a checkpoint of it.

    Args:
      profile_steps: the first and the last step of which a trace is written to `profile/`.
      wandb_project: of Weights & Biases, where the metrics go, too.
      init_from: the folder of a model, whose weights and tokenizer a run without a checkpoint
        starts with; None: weights are drawn.
    Raises:
      InputError: the config, the data, the workdir or its checkpoint cannot be used; too many
        batches in a row had a loss or gradient that is not finite, or too many loss spikes
        followed each other.
    """
    workdir, mesh, started = Path(workdir), mesh_of(config), time.time()
    if wandb_project is not None:
        check_wandb(wandb_project)
    check_writable(workdir)
    announce_model(config, mesh)
    # Opened first: a run that may not go on here is refused before it writes anything else.
    checkpoints = Checkpoints(
        workdir, keep=config.train.keep_checkpoints, config=config.to_dict(),
        patience=config.train.checkpoint_patience,
    )
    with closing(checkpoints):
        origin = None
        if init_from is not None and checkpoints.latest_step is None:
            origin = adopt_model(init_from, config, workdir)
        corpus = corpus_of(config, workdir)
        run = Run(config, workdir, mesh, corpus, started, profile_steps, wandb_project, origin)
        with StopRequest() as stop:
            state = _train(run, checkpoints, stop)
    if stop:
        say(f"ended by {stop.signal} after step {state.step}; the same command goes on from there")
    return state


def _train(run: Run, checkpoints: Checkpoints, stop: StopRequest) -> TrainState:
    config = run.config
    prompt = sample_prompt(run)  # first: what cannot be sampled from is refused before training
    batches = make_train_iterator(
        run.corpus, config.data, config.stages,
        shard_index=jax.process_index(), shard_count=jax.process_count(),
    )
    first, state, place = _first_state(run, checkpoints, batches)
    described = json.dumps(config.to_dict(), indent=1)
    write_atomically(run.workdir / "config.json", described.encode())
    # Without a checkpoint nothing is kept of an earlier try, which may have had another model.
    logged = -1 if checkpoints.latest_step is None else first
    with closing(RunLog(run.workdir, logged, _wandb_log(run))) as log:
        if first >= config.steps:
            say(f"the run is complete: {first} of {config.steps} steps")
        # A complete run tells its score again; a signal may have kept another from it. A trained
        # model's is told before it is trained on.
        due = first > 0 and _is_due(config, first, config.train.eval_every)
        due = due or run.origin is not None
        # One evaluation at a time is kept: the first stage has that of the score told here.
        held_out = functools.lru_cache(maxsize=1)(lambda stage: HeldOut(run, stage, log, stop))
        if first >= config.steps or due and not has_score(log, first):
            held_out(_stage_of(config, first)).report(first, state.params)
        skips = SkipWatch(config.train.most_skips, int(state.skips.total))
        tools = _Tools(
            batches, checkpoints, log, held_out, Pace(log, started=run.started), skips,
            SpikeGuard(config.spikes, place.get(GUARD)), stop,
        )
        routed = _restore_routed(run, checkpoints, state, first, place.get(ROUTED, 0))
        while first < config.steps and not stop:
            first, state = _run_stage(run, tools, state, first, routed)
            routed = []  # no batch is routed in the stage before its own
    if not stop:
        write_sample(run, state, prompt)
    return state


def _wandb_log(run: Run) -> WandbLog | None:
    if run.wandb_project is None:
        return None
    return WandbLog(run.wandb_project, run.workdir, run.config.to_dict())


def _first_state(
    run: Run, checkpoints: Checkpoints, batches: TrainIterator
) -> tuple[int, TrainState, dict]:
    """Return the steps taken, their state and what was saved with it; batches at their place."""
    step = checkpoints.latest_step
    if step is None:
        params = None
        if run.origin is not None:
            params = load_weights(run.origin, run.mesh, run.config.mesh.layout)
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
    run: Run, tools: _Tools, state: TrainState, first: int, routed: list[Experts]
) -> tuple[int, TrainState]:
    """Take the steps after `first` to the end of their stage; log, evaluate and save when due.

    Returns the last step and the state after it. It is an earlier one if a signal came.

    Args:
      routed: experts of the first batches, chosen before the run was cut off.
    """
    config, plan, pace, guard = run.config, run.config.train, tools.pace, tools.guard
    index = config.stage_at(first + 1)
    stage, last = config.stages[index], config.stage_ends[index]
    _announce_stage(run, first + 1)
    evaluation = tools.held_out(stage)
    guard.begin_stage(index)
    feed = Feed(
        tools.batches, first + 1, last, place=run.place, route=routing_of(run, stage),
        lag=config.spikes.lag, routed=routed,
    )
    feed.read(state.params, first, guard.until)
    programs = Programs(run, stage, pace)
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


def _restore_routed(
    run: Run, checkpoints: Checkpoints, state: TrainState, first: int, count: int
) -> list[Experts]:
    """Return the experts of batches ahead that the checkpoint of the state has."""
    if not count:
        return []
    stage, sharding = _stage_of(run.config, first + 1), SingleDeviceSharding(jax.devices()[0])
    if run.mesh is not None:
        sharding = batch_sharding(run.mesh, stage.rows)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(routing_of(run, stage), state.params, abstract_inputs(stage)),
    )
    return checkpoints.restore_routed([like] * count)


def _state_of_before(run: Run, tools: _Tools, spike: Spike, step: int) -> TrainState:
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


def _announce_stage(run: Run, step: int) -> None:
    config = run.config
    index = config.stage_at(step)
    stage = config.stages[index]
    say(
        f"{stage_name(index)} of {len(config.stages)}: steps {step} to {config.stage_ends[index]}, "
        f"{stage.rows} rows of {stage.seq_len} tokens, attention {stage.attention}"
    )
    fits = fitting(run.corpus.train, stage.seq_len)
    if not fits.all():
        say(f"{(~fits).sum():,} of {len(fits):,} examples are longer than a row and left out")


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
