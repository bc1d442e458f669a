"""A loss spike is noticed at once, and the run goes back and routes by older parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from fault_cases import cases
from training_command import MODEL, committed_steps, metrics_of, result_of, sections_of, write_text

from dsv4_jax import gradient, programs
from dsv4_jax.errors import InputError
from dsv4_jax.feed import Feed
from dsv4_jax.run_config import RunConfig, SpikeConfig
from dsv4_jax.spikes import SpikeGuard
from dsv4_jax.stage_model import make_routing
from dsv4_jax.train import train
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import LOAD, make_train_step

F13 = "F13: a loss spike, found within three steps, the end within 1 % of a run without"
RESUMED = "F13: a run with a spike, cut off and resumed, the same bits"
CONFIG = SpikeConfig(window=32, steps=10, most_rollbacks=2)


def noisy(count: int, seed: int = 0) -> list[dict[str, float]]:
    """Return the metrics of a run that learns: a falling loss, gradient norms with a long tail."""
    choose = np.random.default_rng(seed)
    return [
        {
            "loss": 3 + 5 * math.exp(-step / 50) + 0.05 * choose.normal(),
            "grad_norm": math.exp(0.5 * choose.normal()),
        }
        for step in range(count)
    ]


def spikes_of(guard: SpikeGuard, steps: list[dict[str, float]], first: int = 1) -> list:
    return [guard.look(step, metrics) for step, metrics in enumerate(steps, first)]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_without_a_spike_is_left_alone(seed):
    assert not any(spikes_of(SpikeGuard(CONFIG), noisy(1000, seed)))


@pytest.mark.parametrize(("metric", "value"), [("loss", 4.5), ("grad_norm", 100.0)])
def test_a_spike_is_told_one_step_later(metric, value):
    steps = noisy(200)
    steps[150][metric] = value
    found = spikes_of(SpikeGuard(CONFIG), steps)
    assert [step for step, spike in enumerate(found, 1) if spike] == [152]
    assert (found[151].step, found[151].metric, found[151].value) == (151, metric, value)
    assert f"step 151: a spike, {metric} {value:.4g} where " in str(found[151])


def test_spikes_do_not_become_usual():
    steps = noisy(200)
    for number in range(150, 170):
        steps[number]["loss"] = 6.0
    found = spikes_of(SpikeGuard(CONFIG), steps)
    assert [step for step, spike in enumerate(found, 1) if spike] == [*range(152, 172)]


def test_what_is_not_finite_has_been_skipped_already():
    steps = noisy(200)
    steps[150] = {"loss": math.nan, "grad_norm": math.inf}
    assert not any(spikes_of(SpikeGuard(CONFIG), steps))


def test_nothing_is_a_spike_before_the_usual_is_known():
    steps = noisy(CONFIG.window // 2)
    steps[-1]["loss"] = 100.0
    assert not any(spikes_of(SpikeGuard(CONFIG), [*steps[:-2], steps[-1]]))
    guard = SpikeGuard(CONFIG)
    spikes_of(guard, noisy(100))
    guard.begin_stage(1)  # other rows, other losses
    assert not any(spikes_of(guard, [{"loss": 9.0, "grad_norm": 50.0}] * 10))


def test_a_guard_that_is_off_or_has_no_numbers_sees_nothing():
    steps = [*noisy(100), {"loss": 99.0, "grad_norm": 1.0}, {"loss": 99.0, "grad_norm": 1.0}]
    assert not any(spikes_of(SpikeGuard(dataclasses.replace(CONFIG, guard=False)), steps))
    assert not any(spikes_of(SpikeGuard(CONFIG), [{"loss": 3.0}] * 100))


@pytest.mark.parametrize("cut", [0, 1, 31, 100, 150, 151, 152, 199])
def test_a_guard_goes_on_where_it_was(cut):
    steps = noisy(200)
    steps[150]["loss"] = 7.0
    straight, broken = SpikeGuard(CONFIG), SpikeGuard(CONFIG)
    expected = spikes_of(straight, steps)
    found = spikes_of(broken, steps[:cut])
    again = SpikeGuard(CONFIG, json.loads(json.dumps(broken.state())))
    assert found + spikes_of(again, steps[cut:], cut + 1) == expected
    assert again.state() == straight.state()


def test_too_many_rollbacks_end_the_run_in_one_line():
    guard, steps = SpikeGuard(CONFIG), noisy(100)
    spikes_of(guard, steps)

    def spike(step: int):
        (_, found) = spikes_of(guard, [{"loss": 9.0, "grad_norm": 1.0}, steps[-1]], step)
        guard.went_back(found, step + 1)

    spike(101)
    assert guard.until == 102 + CONFIG.steps
    spike(103)
    calm = spikes_of(guard, noisy(120)[100:], 200)
    assert not any(calm)
    spike(220)
    spike(222)
    with pytest.raises(InputError, match=r"^step 224: a spike, loss 9 .*; expected at most 2") as e:
        spike(224)
    assert "\n" not in str(e.value)


class Numbers:
    """Batches that are their numbers."""

    def __init__(self):
        self.read = 0

    def __next__(self):
        self.read += 1
        return {"tokens": self.read}

    def get_state(self):
        return {"read": self.read}


def feed_of(lag: int, first: int = 1, last: int = 50, routed=()) -> Feed:
    batches = Numbers()
    batches.read = first - 1
    return Feed(
        batches, first, last, place=lambda batch: batch, routed=routed, lag=lag,
        route=lambda params, batch: {"by": params, "of": batch["tokens"]},
    )


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_experts_are_chosen_by_the_parameters_of_some_steps_before(lag):
    """Parameters are here the number of the step that made them."""
    feed, began, until = feed_of(lag), 10, 30
    feed.read(0, 0, 0)
    for step in range(1, 51):
        ahead = feed.take()
        assert (ahead.step, ahead.batch["tokens"], ahead.place) == (step, step, {"read": step})
        if began < step <= until:
            # Step t begins with the parameters of step t - 1; those of t - d are d steps older.
            assert ahead.experts == {"by": max(began, step - 1 - lag), "of": step}
        else:
            assert ahead.experts is None
        feed.read(step, step, until if step >= began else 0)


def test_a_feed_goes_on_with_the_experts_that_were_saved():
    feed = feed_of(3)
    feed.read(0, 0, 20)
    for step in range(1, 8):
        feed.take()
        feed.read(step, step, 20)
    again = feed_of(3, first=8, routed=feed.routed)
    again.read(7, 7, 20)
    for step in range(8, 30):
        assert again.take() == feed.take()
        again.read(step, step, 20)
        feed.read(step, step, 20)


def test_a_feed_reads_nothing_of_the_next_stage():
    feed = feed_of(8, last=5)
    feed.read(0, 0, 100)
    assert [feed.take().step for _ in range(5)] == [1, 2, 3, 4, 5]
    feed.read(5, 5, 100)
    assert not feed.routed


LAYERS = {
    "layer_types": ["csa", "window"] * 2 + ["csa"], "moe_types": ["hash"] + ["learned"] * 4,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.heavy
def test_a_step_uses_the_experts_that_it_is_given(tmp_path):
    """With those of its own parameters it is the usual step; weights are of today's scores."""
    sections = sections_of(tmp_path) | {"model": MODEL | LAYERS}
    config = RunConfig.from_config_dict(sections)
    stage, choose = config.stages[0], np.random.default_rng(0)
    tokens = choose.integers(0, 300, (4, 32)).astype(np.int32)
    state, batch = init_state(config), {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    route = quick_jit(make_routing(config, stage))
    own = route(state.params, batch)
    assert set(own) == {"pairs/csa", "pairs/window", "mtp/block"}  # hash layers need none
    assert own["pairs/csa"].shape == (4, 2, 32, 2)
    step = quick_jit(make_train_step(config, stage))
    usual, routed = step(state, batch), step(state, batch | {"experts": own})
    for found, expected in zip(jax.tree.leaves(routed), jax.tree.leaves(usual), strict=True):
        # Another program rounds unlike, and Muon divides by the gradient's norm.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    given = {path: jnp.zeros_like(experts).at[..., 1].set(3) for path, experts in own.items()}
    _, metrics = step(state, batch | {"experts": given})
    np.testing.assert_array_equal(metrics[f"{LOAD}layer_2"], [2, 0, 0, 2])
    np.testing.assert_array_equal(metrics[f"{LOAD}layer_0"], usual[1][f"{LOAD}layer_0"])
    assert metrics["loss"] != usual[1]["loss"]


STEPS, EVERY, ROUTED = 70, 5, 12
RANDOM, SCALED, FAST = "random tokens", "scaled batch", "high learning rate"
HIGH = 3.0  # learning rate, a hundred times the usual


class Form(NamedTuple):
    """A way to break steps of a run."""

    by: tuple[str, ...]
    first: int
    last: int

    @property
    def harms(self) -> bool:
        """Whether a run is worse for it in the end, unless it goes back."""
        return FAST in self.by

    def __str__(self):
        return f"{' and '.join(self.by)}, steps {self.first} to {self.last}"


FORMS = [
    Form(by, first, last)
    for first, last in ((41, 42), (38, 40), (40, 43), (44, 46), (36, 37))
    for by in ((RANDOM, FAST), (FAST,), (RANDOM,), (SCALED,))
]


class Disturbed:
    """Compile steps of which some are broken; equal programs are compiled once for all runs."""

    original, programs = staticmethod(programs.compile_step), {}

    def __init__(self, form: Form):
        self._form = form

    def __call__(self, run, stage, state, batch):
        program, flops = self._program(run, stage, state, batch, ())
        steps = range(self._form.first, self._form.last + 1)

        def take(state, batch):
            if int(state.step) + 1 not in steps:
                return program(state, batch)
            rough, _ = self._program(run, stage, state, batch, self._form.by)
            if RANDOM in self._form.by:
                tokens = jax.random.randint(jax.random.key(0), batch["tokens"].shape, 0, 300)
                batch = batch | {"tokens": tokens}
            return rough(state, batch)

        return take, flops

    def _program(self, run, stage, state, batch, by):
        key = FAST in by, SCALED in by, "experts" in batch
        if key not in self.programs:
            if FAST in by:
                stage = dataclasses.replace(stage, learning_rate=HIGH)
            scale = 1e4 if SCALED in by else 1.0
            with pytest.MonkeyPatch.context() as patch:
                total = gradient.total
                patch.setattr(gradient, "total", lambda *sums: scale * total(*sums))
                self.programs[key] = self.original(run, stage, state, batch)
        return self.programs[key]


def train_quietly(config: RunConfig, workdir: Path, form: Form | None = None) -> str:
    """Train, with steps that are broken in this form; return what is printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        if form is not None:
            patch.setattr(programs, "compile_step", Disturbed(form))
        train(config, workdir)
    return printed.getvalue()


def logged_of(workdir: Path) -> dict[int, dict]:
    """Return the metrics of each step of a complete run."""
    logged = {line["step"]: line for line in metrics_of(workdir) if "loss" in line}
    assert sorted(logged) == [*range(1, STEPS + 1)]
    return logged


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    """A run that keeps all of its checkpoints."""
    source = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    sections = sections_of(
        source, steps=STEPS, checkpoint_every=EVERY, keep_checkpoints=100, eval_every=1000
    )
    sections["spikes"] = {"window": 32, "lag": 3, "steps": ROUTED}
    return RunConfig.from_config_dict(sections)


def loss_at_the_end(workdir: Path) -> float:
    logged = logged_of(workdir)
    return statistics.mean(logged[step]["loss"] for step in range(STEPS - 9, STEPS + 1))


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    train_quietly(config, folder)
    return folder


@pytest.fixture(scope="module")
def disturbed(config, tmp_path_factory) -> tuple[Path, str]:
    """The workdir and output of a run that goes back."""
    workdir = tmp_path_factory.mktemp("disturbed") / "run"
    return workdir, train_quietly(config, workdir, FORMS[0])


@pytest.mark.heavy
@pytest.mark.faults
def test_a_rollback_is_told_counted_and_followed_by_anticipatory_routing(disturbed):
    workdir, printed = disturbed
    first = FORMS[0].first
    found = first + 1  # one step behind
    assert f"step {first}: a spike, loss " in printed
    assert (
        f"back to the checkpoint of step 35; anticipatory routing up to step {found + ROUTED}"
        in printed
    )
    logged = logged_of(workdir)
    active = [step for step, line in logged.items() if line["anticipatory_routing"]]
    assert active == [*range(found + 1, found + 1 + ROUTED)]
    assert logged[found]["skipped"] == 0 and logged[found + 1]["skipped"] == found - 35
    # The schedule goes on from where the state is.
    assert logged[found + 1]["learning_rate"] == logged[36]["learning_rate"]


@pytest.mark.heavy
@pytest.mark.faults
@pytest.mark.parametrize("form", FORMS[: cases(2, len(FORMS))], ids=str)
def test_a_run_comes_back_from_a_spike(form, config, calm, tmp_path, record_property):
    printed = train_quietly(config, tmp_path / "run", form)
    spikes = [int(step) for step in re.findall(r"step (\d+): a spike", printed)]
    assert form.first <= spikes[0] <= form.first + 2  # told a step later
    logged, undisturbed = logged_of(tmp_path / "run"), logged_of(calm)
    assert all(logged[step]["loss"] == undisturbed[step]["loss"] for step in range(1, form.first))
    unguarded = dataclasses.replace(config, spikes=dataclasses.replace(config.spikes, guard=False))
    train_quietly(unguarded, tmp_path / "unguarded", form)
    usual = loss_at_the_end(calm)
    ends = loss_at_the_end(tmp_path / "run"), loss_at_the_end(tmp_path / "unguarded")
    assert ends[0] < 1.01 * usual
    assert (ends[1] > 1.01 * usual) == form.harms
    record_property(F13, 1)


@pytest.mark.heavy
@pytest.mark.faults
@pytest.mark.parametrize("step", [40, 42, 50, 55])
def test_a_run_goes_on_bit_by_bit_before_in_and_after_a_spike(
    step, config, disturbed, tmp_path, record_property
):
    """42 is the checkpoint of the rollback; 50 has the experts of batches ahead."""
    straight, _ = disturbed
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for later in committed_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    train_quietly(config, workdir, FORMS[0])
    assert result_of(workdir) == result_of(straight)
    record_property(RESUMED, 1)
