"""Run a training: data, steps, log, evaluation, checkpoints and a final sample."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.compiler import compiler_options
from dsv4_jax.data import (
    Batch,
    TokenizedCorpus,
    TrainIterator,
    baseline_bits_per_byte,
    held_out_batches,
    make_train_iterator,
    prepare_corpus,
)
from dsv4_jax.errors import InputError
from dsv4_jax.files import check_writable, closing, write_atomically
from dsv4_jax.flops import count_flops, flops_of
from dsv4_jax.infer import generate
from dsv4_jax.log import RunLog
from dsv4_jax.model import param_shapes
from dsv4_jax.pace import DATA, EVALUATION, SAVING, SPEED, STEP, Pace
from dsv4_jax.profile import Profiler
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.run_config import RunConfig
from dsv4_jax.sharding import MESH_AXES, batch_sharding, make_mesh, shardings_of
from dsv4_jax.sizes import count_params
from dsv4_jax.stop import StopRequest
from dsv4_jax.terminal import duration, say, timed
from dsv4_jax.train_step import (
    TrainState,
    abstract_state,
    init_state,
    make_evaluation,
    make_train_step,
    state_shardings,
)

HELD_OUT = "held_out_bits_per_byte"  # name of the metric


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all parts of a run share."""

    config: RunConfig
    workdir: Path
    mesh: Mesh | None  # None on one device
    corpus: TokenizedCorpus
    started: float  # when, by time.time()
    profile_steps: tuple[int, int] | None

    def place(self, batch: Batch, rows: int) -> dict[str, jax.Array]:
        """Put this host's part of a batch of so many rows on its devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = batch_sharding(self.mesh, rows)
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in batch.items()
        }


def train(
    config: RunConfig, workdir: str | Path, *, profile_steps: tuple[int, int] | None = None
) -> TrainState:
    """Train to the end of the run, going on from the newest undamaged checkpoint of the workdir.

    The workdir receives the config, the tokenizer and the encoded text, checkpoints, metrics as
    JSON lines and for TensorBoard, and the final sample.

    SIGTERM and SIGINT end the run after the step that is being taken, with a checkpoint of it.

    Args:
      profile_steps: the first and the last step of which a trace is written to `profile/`.
    Raises:
      InputError: the config, the data, the workdir or its checkpoint cannot be used; too many
        batches in a row had a loss or gradient that is not finite.
    """
    workdir, mesh, started = Path(workdir), _mesh_of(config), time.time()
    check_writable(workdir)
    _announce_model(config, mesh)
    # Opened first: a run that may not go on here is refused before it writes anything else.
    checkpoints = Checkpoints(
        workdir, keep=config.train.keep_checkpoints, config=config.to_dict(),
        patience=config.train.checkpoint_patience,
    )
    with closing(checkpoints):
        corpus = _read_corpus(config, workdir)
        run = _Run(config, workdir, mesh, corpus, started, profile_steps)
        with StopRequest() as stop:
            state = _train(run, checkpoints, stop)
    if stop:
        say(f"ended by {stop.signal} after step {state.step}; the same command goes on from there")
    return state


def _train(run: _Run, checkpoints: Checkpoints, stop: StopRequest) -> TrainState:
    config = run.config
    prompt = _sample_prompt(run)  # first: what cannot be sampled from is refused before training
    batches = make_train_iterator(
        run.corpus, config.data, shard_index=jax.process_index(), shard_count=jax.process_count()
    )
    first, state = _first_state(run, checkpoints, batches)
    described = json.dumps(config.to_dict(), indent=1)
    write_atomically(run.workdir / "config.json", described.encode())
    with closing(RunLog(run.workdir, first)) as log:
        evaluation = _Evaluation(run, log, stop)
        complete = first >= config.train.steps
        if complete:
            say(f"the run is complete: {first} of {config.train.steps} steps")
        due = first > 0 and first % config.train.eval_every == 0
        if complete or due and not evaluation.has(first):  # a signal ended the run before it
            evaluation.report(first, state.params)
        if not complete:
            state = _take_steps(run, state, first, batches, evaluation, checkpoints, log, stop)
    if not stop:
        _write_sample(run, state, prompt)
    return state


def _first_state(
    run: _Run, checkpoints: Checkpoints, batches: TrainIterator
) -> tuple[int, TrainState]:
    """Return the steps taken and their state, with the batches at their place."""
    step = checkpoints.latest_step
    if step is None:
        with timed("drawing the initial weights"):
            return 0, jax.block_until_ready(init_state(run.config, run.mesh))
    state, place = checkpoints.restore(abstract_state(run.config, run.mesh))
    batches.set_state(place)
    say(f"resumed from the checkpoint of step {step}")
    return step, state


def _take_steps(
    run: _Run, state: TrainState, first: int, batches: TrainIterator, evaluation: _Evaluation,
    checkpoints: Checkpoints, log: RunLog, stop: StopRequest,
) -> TrainState:
    """Take the steps after `first`; log, evaluate and save when due, and at the end."""
    plan, rows = run.config.train, run.config.data.batch_size

    def due(every: int) -> bool:
        return step % every == 0 or step == plan.steps

    batch = run.place(next(batches), rows)
    step_fn, flops = _compile_step(run, state, batch)
    skips = _SkipWatch(plan.most_skips, int(state.skips.total))
    pace = Pace(log, flops=flops, started=run.started)
    with closing(Profiler(run.workdir / "profile", run.profile_steps)) as profiler:
        for step in range(first + 1, plan.steps + 1):
            profiler.before(step)
            with pace.phase(STEP):
                state, metrics = step_fn(state, batch)
            # While the devices work: where a resumed run goes on, and its first batch.
            with pace.phase(DATA):
                place, batch = batches.get_state(), run.place(next(batches), rows)
            with pace.phase(STEP):
                skips.look(step, metrics)
            pace.step()
            profiler.after(step, metrics)
            if due(plan.log_every):
                with pace.phase(STEP):
                    values = {name: float(value) for name, value in metrics.items()}
                values |= pace.values(batch["tokens"].size)
                say(_step_line(step, plan.steps, values))
                log.metrics(step, values)
            if due(plan.eval_every):
                with pace.phase(EVALUATION):
                    evaluation.report(step, state.params)
            ending = bool(stop)
            if due(plan.checkpoint_every) or ending:
                # After the log: what a checkpoint covers is neither lost nor logged twice.
                with pace.phase(SAVING):
                    checkpoints.save(step, state, place)
            checkpoints.check()
            if ending:
                break
    return state


class _SkipWatch:
    """Tell of batches that were skipped, and end a run that does nothing else.

    Each step's numbers are looked at when the next one has been given to the devices, which so
    never wait for it.
    """

    def __init__(self, most: int, total: int):
        self._most, self._total, self._before = most, total, None

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


def _step_line(step: int, steps: int, values: dict[str, float]) -> str:
    seconds_left = values[f"{SPEED}seconds_per_step"] * (steps - step)
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
        f"learning rate {values['learning_rate']:.2e}  "
        f"{values[f'{SPEED}tokens_per_second']:,.0f} tokens/s"
        f"  left {duration(seconds_left)}"
    )


def _compile_step(
    run: _Run, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, int]:
    """Compile the step for arguments placed as these are; count its matrix products' operations.

    From their description: a fresh state and a restored one differ in what JAX may still move, so
    that they themselves would make two programs, and a run that goes on would compile again.
    """
    outputs = None if run.mesh is None else (state_shardings(run.config, run.mesh), None)
    step = jax.jit(
        make_train_step(run.config, run.mesh), donate_argnums=0, out_shardings=outputs,
        compiler_options=compiler_options(),
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
            flops = count_flops(make_train_step(config, run.mesh), *described)
        else:
            flops = flops_of(traced.jaxpr)
        return traced.lower().compile(), flops.matmul


class _Evaluation:
    """Score the held-out text in bits per byte, beside what general compressors need for it."""

    def __init__(self, run: _Run, log: RunLog, stop: StopRequest):
        self._log, self._stop = log, stop
        # Rows of one micro-batch: what fits for training fits here.
        rows = run.config.data.batch_size // run.config.train.accumulation
        self._batches = held_out_batches(
            run.corpus, run.config.data, rows=rows,
            shard_index=jax.process_index(), shard_count=jax.process_count(),
        )
        self._place = partial(run.place, rows=rows)
        self._nats = jax.jit(
            make_evaluation(run.config, run.mesh), compiler_options=compiler_options()
        )
        self._bytes = len(run.corpus.held_out_text)
        self._baselines = baseline_bits_per_byte(run.corpus.held_out_text)

    def has(self, step: int) -> bool:
        """Say whether the log has the score of a step that the run goes on from."""
        last = self._log.last(HELD_OUT)
        return last is not None and last["step"] == step

    def report(self, step: int, params: dict) -> None:
        """Print and log the bits per byte of the held-out text, unless the run is to end."""
        nats = 0.0
        for batch in self._batches:
            if self._stop:
                return
            nats += float(self._nats(params, self._place(batch)))
        bits = nats / math.log(2) / self._bytes
        baselines = ", ".join(f"{name} -9 {b:.3f}" for name, b in self._baselines.items())
        say(f"held-out text: {bits:.3f} bits per byte ({baselines})")
        if not self.has(step):
            self._log.metrics(step, {HELD_OUT: bits})


def _sample_prompt(run: _Run) -> np.ndarray:
    """Return the token ids that the final sample continues."""
    plan, tokenizer = run.config.train, run.corpus.tokenizer
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
    """Print a text that the model continues from the prompt, and keep it in the workdir."""
    plan, tokenizer = run.config.train, run.corpus.tokenizer
    params = round_weights(state.params, run.config.model, run.config.runtime.linears)
    new = generate(
        run.config.model, params, prompt, max_new_tokens=plan.sample_tokens,
        temperature=plan.sample_temperature, top_p=plan.sample_top_p, seed=plan.seed,
        stop=tokenizer.eos_id, runtime=run.config.runtime,
    )
    text = plan.sample_prompt + tokenizer.decode(new.tokens[0])
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
    batch_sharding(mesh, config.data.batch_size // config.train.accumulation)
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
