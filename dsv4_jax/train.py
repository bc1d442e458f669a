"""Run a training: data, steps, log, evaluation, checkpoints and a final sample."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.data import (
    Batch, TokenizedCorpus, baseline_bits_per_byte, held_out_batches, make_train_iterator,
    prepare_corpus,
)
from dsv4_jax.errors import InputError
from dsv4_jax.infer import generate
from dsv4_jax.log import RunLog, duration, say, timed
from dsv4_jax.run_config import RunConfig
from dsv4_jax.sharding import MESH_AXES, batch_sharding, make_mesh
from dsv4_jax.sizes import count_params
from dsv4_jax.tokenizer import write_atomically
from dsv4_jax.train_step import (
    TrainState, abstract_state, init_state, make_evaluation, make_train_step, state_shardings,
    transformer_of,
)


def train(config: RunConfig, workdir: str | Path) -> TrainState:
    """Train to the end of the run, going on from the newest checkpoint of the workdir.

    The workdir receives the config, the tokenizer and the encoded text, checkpoints, metrics as
    JSON lines and for TensorBoard, and the final sample.

    Raises:
      InputError: the config, the data, the workdir or its checkpoint cannot be used.
    """
    workdir = _make_workdir(Path(workdir))
    mesh = _mesh_of(config)
    _announce_model(config, mesh)
    with timed("reading, tokenizing and encoding the text"):
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, workdir=workdir)
    say(
        f"data: {len(corpus.train.tokens):,} tokens in {len(corpus.train):,} documents to train "
        f"on, {len(corpus.held_out_text):,} bytes held out"
    )
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    try:
        return _run(config, workdir, mesh, corpus, checkpoints)
    finally:
        checkpoints.close()


def _run(
    config: RunConfig, workdir: Path, mesh: Mesh | None, corpus: TokenizedCorpus,
    checkpoints: Checkpoints,
) -> TrainState:
    batches = make_train_iterator(
        corpus, config.data, shard_index=jax.process_index(), shard_count=jax.process_count()
    )
    first = checkpoints.latest_step()
    if first is None:
        first, state = 0, init_state(config, mesh)
    else:
        state = checkpoints.restore(first, abstract_state(config, mesh), batches, config.to_dict())
        say(f"resumed from the checkpoint of step {first}")
    write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=1).encode())
    evaluation = _Evaluation(config, mesh, corpus)
    log, last = RunLog(workdir, first), config.train.steps
    try:
        if first < last:
            state = _steps(config, mesh, state, first, batches, checkpoints, evaluation, log)
        else:
            say(f"the run is complete: {first} of {last} steps")
            evaluation.report(state.params)
    finally:
        log.close()
    _sample(config, mesh, corpus, state, workdir)
    return state


def _steps(config, mesh, state, first, batches, checkpoints, evaluation, log) -> TrainState:
    """Take the remaining steps; evaluate and save when due, and at the end."""
    plan, rows = config.train, config.data.batch_size
    batch = _place(next(batches), mesh, rows)
    step_fn = _compile_step(config, mesh, state, batch)
    start = time.perf_counter()
    for step in range(first + 1, plan.steps + 1):
        state, metrics = step_fn(state, batch)
        due = step == plan.steps
        if due or step % plan.checkpoint_every == 0:
            # Before the next batch is taken: a resumed run takes that one first.
            checkpoints.save(step, state, batches, config.to_dict())
        if not due:
            batch = _place(next(batches), mesh, rows)
        if due or step % plan.log_every == 0:
            values = {name: float(value) for name, value in metrics.items()}
            elapsed, start = time.perf_counter() - start, time.perf_counter()
            values["tokens_per_second"] = (
                plan.log_every * rows * config.data.seq_len / elapsed
            )
            left = (plan.steps - step) * elapsed / plan.log_every
            say(_step_line(step, plan.steps, values, left))
            log.metrics(step, values)
        if due or step % plan.eval_every == 0:
            log.metrics(step, {"held_out_bits_per_byte": evaluation.report(state.params)})
            start = time.perf_counter()
    return state


def _step_line(step: int, steps: int, values: dict[str, float], seconds_left: float) -> str:
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
        f"learning rate {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tokens/s"
        f"  left {duration(seconds_left)}"
    )


def _compile_step(config: RunConfig, mesh: Mesh | None, state: TrainState, batch: Batch):
    outputs = None if mesh is None else (state_shardings(config, mesh), None)
    step = jax.jit(make_train_step(config, mesh), donate_argnums=0, out_shardings=outputs)
    with timed("compiling the training step"):
        return step.lower(state, batch).compile()


class _Evaluation:
    """Score the held-out text in bits per byte, beside what general compressors need for it."""

    def __init__(self, config: RunConfig, mesh: Mesh | None, corpus: TokenizedCorpus):
        # Rows of one micro-batch: what fits for training fits here.
        rows = config.data.batch_size // config.train.accumulation
        self._batches = held_out_batches(
            corpus, config.data, rows=rows,
            shard_index=jax.process_index(), shard_count=jax.process_count(),
        )
        self._place = lambda batch: _place(batch, mesh, rows)
        self._nats = jax.jit(make_evaluation(config, mesh))
        self._bytes = len(corpus.held_out_text)
        self._baselines = baseline_bits_per_byte(corpus.held_out_text)

    def report(self, params: dict) -> float:
        """Print and return the bits per byte of the held-out text."""
        nats = sum(float(self._nats(params, self._place(batch))) for batch in self._batches)
        bits = nats / math.log(2) / self._bytes
        baselines = ", ".join(f"{name} -9 {b:.3f}" for name, b in self._baselines.items())
        say(f"held-out text: {bits:.3f} bits per byte ({baselines})")
        return bits


def _sample(
    config: RunConfig, mesh: Mesh | None, corpus: TokenizedCorpus, state: TrainState,
    workdir: Path,
) -> None:
    """Print a text that the model continues from the prompt, and keep it in the workdir."""
    plan, tokenizer = config.train, corpus.tokenizer
    prompt = np.array([tokenizer.bos_id, *tokenizer.encode(plan.sample_prompt)], np.int32)
    new = generate(
        transformer_of(config, None), state.params, prompt, max_new_tokens=plan.sample_tokens,
        temperature=plan.sample_temperature, top_p=plan.sample_top_p, seed=plan.seed,
        stop_id=tokenizer.eos_id,
    )
    text = plan.sample_prompt + tokenizer.decode(new)
    write_atomically(workdir / "sample.txt", text.encode())
    say(f"sample:\n{text}")


def _place(batch: Batch, mesh: Mesh | None, rows: int) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on its devices."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = batch_sharding(mesh, rows)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def _mesh_of(config: RunConfig) -> Mesh | None:
    """Return the mesh of a run; a run on one device needs none."""
    sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    if math.prod(sizes) == 1:
        return None
    mesh = make_mesh(sizes)
    batch_sharding(mesh, config.data.batch_size // config.train.accumulation)
    return mesh


def _announce_model(config: RunConfig, mesh: Mesh | None) -> None:
    size = count_params(config.model)
    used = 1 if mesh is None else mesh.size
    say(
        f"model: {size.total:,} parameters, {size.active:,} active per token, {size.mtp:,} more "
        f"for multi-token prediction; on {used} of {len(jax.devices())} "
        f"{jax.default_backend()} devices"
    )


def _make_workdir(workdir: Path) -> Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / ".writable", b"")
        (workdir / ".writable").unlink()
    except OSError as error:
        raise InputError(
            f"workdir: expected a folder that can be written to, got {workdir} "
            f"({error.strerror}); choose another --workdir"
        ) from error
    return workdir
