"""The score of the held-out text."""

from __future__ import annotations

import math

import jax

from dsv4_jax.data import held_out_batches
from dsv4_jax.log import RunLog
from dsv4_jax.programs import options_of
from dsv4_jax.run import Run
from dsv4_jax.run_config import StageConfig
from dsv4_jax.stage_model import make_evaluation
from dsv4_jax.stop import StopRequest
from dsv4_jax.terminal import say
from dsv4_jax.train_step import HELD_OUT


class HeldOut:
    """Score the held-out text in bits per byte, beside what general compressors need for it.

    In rows of the stage, whose attention it has.
    """

    def __init__(self, run: Run, stage: StageConfig, log: RunLog, stop: StopRequest):
        self._run, self._log, self._stop = run, log, stop
        # Rows of one micro-batch: what fits for training fits here.
        self._batches = held_out_batches(
            run.corpus, run.config.data,
            seq_len=stage.seq_len, rows=stage.rows // stage.accumulation,
            shard_index=jax.process_index(), shard_count=jax.process_count(),
        )
        self._nats = jax.jit(
            make_evaluation(run.config, stage, run.mesh),
            compiler_options=options_of(run.config, run.mesh),
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
        if not has_score(self._log, step):
            self._log.metrics(step, {HELD_OUT: bits})


def has_score(log: RunLog, step: int) -> bool:
    """Say whether the log has the held-out score of a step that the run goes on from."""
    last = log.last(HELD_OUT)
    return last is not None and last["step"] == step
