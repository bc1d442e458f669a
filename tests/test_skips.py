"""A batch whose loss or gradient is not finite moves nothing; a bad state is never saved."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from fault_cases import cases
from saved_states import assert_same
from training_command import committed_steps, result_of, sections_of, write_text

from dsv4_jax import programs, stage_model
from dsv4_jax.checkpoint import check_checkpoint
from dsv4_jax.errors import InputError
from dsv4_jax.run_config import RunConfig
from dsv4_jax.train import train
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step

pytestmark = pytest.mark.faults

# What happens in a batch that has this token as a target; text has none of them.
NAN_LOSS, INFINITE_LOSS, NAN_GRADIENT, INFINITE_GRADIENT = FAULTS = 296, 297, 298, 299


@jax.custom_vjp
def spoil(x, factor):
    """Return x, and multiply its gradient by a factor."""
    return x


spoil.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def poisoned(token_nats):
    """Let a loss go wrong where a batch asks for it."""

    def nats(hidden, head, targets, *rest, **options):
        def has(fault):
            return jnp.any(targets == fault)

        factor = jnp.where(has(NAN_GRADIENT), jnp.nan, 1.0)
        factor = jnp.where(has(INFINITE_GRADIENT), jnp.inf, factor)
        value = spoil(token_nats(hidden, head, targets, *rest, **options), factor)
        value = jnp.where(has(NAN_LOSS), jnp.nan, value)
        return jnp.where(has(INFINITE_LOSS), jnp.inf, value)

    return nats


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    source = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return RunConfig.from_config_dict(sections_of(source, steps=20, most_skips=2))


@pytest.fixture(scope="module")
def step(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_model, "token_nats", poisoned(stage_model.token_nats))
        state = init_state(config)
        batch = {"tokens": np.zeros((4, 32), np.int32)}
        take = make_train_step(config, config.stages[0])
        return quick_jit(take).lower(state, batch).compile()


def test_only_good_batches_move_the_state(config, step, record_property):
    choose, count = random.Random(0), cases(60, 300)
    faults = [choose.choice(FAULTS) for _ in range(count)] + count * [None]
    choose.shuffle(faults)
    state = other = init_state(config)
    total = in_row = 0
    for number, fault in enumerate(faults):
        tokens = np.random.default_rng(number).integers(0, 290, (4, 32)).astype(np.int32)
        bad = tokens.copy()
        if fault is not None:
            bad[choose.randrange(4), choose.randrange(1, 32)] = fault
        total, in_row = (total + 1, in_row + 1) if fault else (total, 0)
        before, (state, metrics) = state, step(state, {"tokens": bad})
        assert int(metrics["skipped"]) == int(state.skips.total) == total
        assert int(metrics["skipped_in_row"]) == int(state.skips.in_row) == in_row
        assert int(state.step) == number + 1
        if fault is None:
            other, expected = step(other, {"tokens": tokens})
            assert float(metrics["learning_rate"]) == float(expected["learning_rate"])
        else:
            assert_same((state.params, state.opt_state), (before.params, before.opt_state))
    assert_same((state.params, state.opt_state), (other.params, other.opt_state))
    record_property("F12: infinite and NaN losses and gradients, skipped and counted", count)


def test_without_the_guard_a_bad_batch_ruins_the_state(config, step):
    """What the guard is for: the same step without it."""
    unguarded = RunConfig.from_config_dict({
        **config.to_dict(), "train": {**config.to_dict()["train"], "skip_non_finite": False},
    })
    tokens = np.full((4, 32), NAN_GRADIENT, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_model, "token_nats", poisoned(stage_model.token_nats))
        take = quick_jit(make_train_step(unguarded, unguarded.stages[0]))
        state, _ = take(init_state(config), {"tokens": tokens})
    assert np.isnan(state.params["head"]).all()


class Spoiler:
    """Put a NaN into the parameters before the step of some number."""

    def __init__(self, step: int, leaf: tuple[str, ...]):
        self.step, self.leaf, self.original = step, leaf, programs.compile_step

    def __call__(self, run, stage, state, batch):
        program, flops = self.original(run, stage, state, batch)

        def take(state, batch):
            if int(state.step) == self.step - 1:
                params = jax.tree.map(lambda x: x, state.params)
                *path, name = self.leaf
                node = params
                for key in path:
                    node = node[key]
                node[name] = node[name].at[(0,) * node[name].ndim].set(jnp.nan)
                state = state._replace(params=params)
            return program(state, batch)

        return take, flops


def assert_finite_checkpoints(workdir: Path) -> None:
    for step in committed_steps(workdir):
        leaves = check_checkpoint(workdir / "checkpoints" / str(step))["leaves"]
        assert not any(leaf["non_finite"] for leaf in leaves.values())


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    train(config, workdir)
    return result_of(workdir)


@pytest.mark.heavy
@pytest.mark.parametrize("leaf, message", [
    (("head",), r"step \d+: expected a finite loss and gradient, got none in the last 2 steps; "),
    # No loss reaches the indexer while CSA is dense, so that only the saving finds it.
    (("layers_0", "attention", "indexer", "w_q"),
     r"state of step 9: expected finite values, .* params/layers_0/attention/indexer/w_q the "),
])
def test_a_bad_state_ends_the_run_unsaved_and_the_next_one_mends_it(
    leaf, message, config, straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(programs, "compile_step", Spoiler(7, leaf))
        with pytest.raises(InputError, match=message) as caught:
            train(config, tmp_path)
    assert "\n" not in str(caught.value)
    assert committed_steps(tmp_path) == [3, 6]
    assert_finite_checkpoints(tmp_path)
    skipped = capsys.readouterr().out.count("is not finite, its batch is skipped")
    assert skipped == (0 if "indexer" in leaf else 2)
    train(config, tmp_path)
    assert result_of(tmp_path) == straight
    assert_finite_checkpoints(tmp_path)
