"""A run learns, can be cut off at any point and goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import training_command
from fake_wandb import FakeWandb
from faults import small_files_only
from jax.experimental.compilation_cache import compilation_cache

from dsv4_jax.errors import InputError
from dsv4_jax.log import RunLog
from dsv4_jax.pace import SPEED
from dsv4_jax.params import path_name, split_trainable
from dsv4_jax.run_config import RunConfig
from dsv4_jax.train import train
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step

STEPS, CHECKPOINT_EVERY, CUT_OFF = 12, 4, 7
# The same sum in two halves rounds differently: a few float32 units in the last place.
TOLERANCE = 1e-5
# Gradients this small beside the largest are sums that cancel, at worst to rounding errors.
CANCELLED = 1e-4
LOSS_FALL = 1.0  # nats, of 5.7: twelve steps learn at least which bytes occur

MODEL = training_command.MODEL | {
    "layer_types": ["csa", "window"], "moe_types": ["hash", "learned"],
}


def sections_of(source, **train_keys) -> dict:
    plan = {
        "steps": STEPS, "eval_every": 6, "checkpoint_every": CHECKPOINT_EVERY, "sample_tokens": 8,
    }
    return {**training_command.sections_of(source, **(plan | train_keys)), "model": MODEL}


class Run:
    """One run of the shared config: what it printed, wrote and returned."""

    def __init__(self, config: RunConfig, workdir: Path):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.state = train(config, workdir)
        self.lines = printed.getvalue().splitlines()
        self.workdir = workdir

    def line(self, start: str) -> str:
        (found,) = [line for line in self.lines if line.startswith(start)]
        return found


def metrics_of(workdir: Path) -> list[dict]:
    return list(training_command.metrics_of(workdir))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Let equal programs, also of other processes, be compiled once for all tests here."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in options.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return training_command.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def config(source):
    return RunConfig.from_config_dict(sections_of(source))


@pytest.fixture(scope="module")
def straight(config, compiled_once, tmp_path_factory):
    """A run without interruption."""
    return Run(config, tmp_path_factory.mktemp("straight"))


def run_command(
    sections: dict, workdir: Path, environment: dict[str, str], *, largest_file: int | None = None
) -> subprocess.CompletedProcess:
    """Run the training command, which may write files of at most so many bytes."""
    compiled = Path(environment["JAX_COMPILATION_CACHE_DIR"])
    limit = contextlib.nullcontext() if largest_file is None else small_files_only(largest_file)
    with limit:  # a process inherits its parent's
        # On as many devices as here: programs for another number are others.
        process = training_command.start(
            sections, workdir, compiled, XLA_FLAGS=os.environ["XLA_FLAGS"]
        )
        out, errors = training_command.complete(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture(scope="module")
def resumed(config, compiled_once, tmp_path_factory):
    """A run that broke after some steps and was started again by the command.

    Returns its metrics when it broke, the finished command, the workdir, and how many programs
    for a step all runs until then compiled.
    """
    folder = tmp_path_factory.mktemp("resumed")
    record = RunLog.metrics

    def break_off(self, step, values):
        record(self, step, values)
        if step == CUT_OFF:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "metrics", break_off)
        Run(config, folder / "run")
    cut_off = metrics_of(folder / "run")
    done = run_command(sections_of(config.data.source), folder / "run", compiled_once)
    compiled = Path(compiled_once["JAX_COMPILATION_CACHE_DIR"]).glob("jit_step-*")
    return cut_off, done, folder / "run", len(list(compiled))


def test_the_loss_falls_and_is_told_step_by_step(straight):
    steps = [line for line in metrics_of(straight.workdir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - LOSS_FALL
    first = straight.line("step 1/12 ")
    for part in ("loss 5.", "grad norm ", "learning rate 1.50e-02", " tokens/s", "left 0:"):
        assert part in first
    assert straight.line("compiling the training step ... ").endswith(" s")
    assert list((straight.workdir / "tensorboard").glob("events.*"))


def test_held_out_bits_per_byte_stand_beside_gzip_and_xz(straight):
    lines = [line for line in straight.lines if line.startswith("held-out text: ")]
    scores = [line for line in metrics_of(straight.workdir) if "held_out_bits_per_byte" in line]
    assert [line["step"] for line in scores] == [6, 12]
    assert scores[1]["held_out_bits_per_byte"] < scores[0]["held_out_bits_per_byte"] < 8
    for line, score in zip(lines, scores, strict=True):
        assert f"{score['held_out_bits_per_byte']:.3f} bits per byte (gzip -9 " in line
        assert "xz -9 " in line


def test_the_load_of_every_expert_is_logged_at_evaluations(straight):
    lines = metrics_of(straight.workdir)
    loads = [line for line in lines if "load/layer_0" in line]
    assert [line.pop("step") for line in loads] == [6, 12]
    busiest = {line["step"]: line["max_load"] for line in lines if "max_load" in line}
    experts, chosen = MODEL["n_routed_experts"], MODEL["num_experts_per_tok"]
    for step, load in zip((6, 12), loads, strict=True):
        assert load.keys() == {"load/layer_0", "load/layer_1"}
        assert max(max(of_layer) for of_layer in load.values()) == busiest[step]
        for of_layer in load.values():
            assert len(of_layer) == experts and sum(of_layer) == pytest.approx(experts)
            assert max(of_layer) <= experts / chosen  # each token has an expert at most once


def test_the_sample_is_printed_and_kept(straight):
    kept = (straight.workdir / "sample.txt").read_text()
    assert kept.startswith("def ") and len(kept) > len("def ")
    assert "\n".join(straight.lines).endswith("sample:\n" + "\n".join(kept.splitlines()))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("\udcff", "expected characters with a UTF-8 form"),
        (40 * "xyz", "train.sample_prompt: expected at most 120 tokens, .* got 121"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_training(
    source, tmp_path, prompt, message
):
    config = RunConfig.from_config_dict(sections_of(source, sample_prompt=prompt))
    with pytest.raises(InputError, match=message):
        train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_is_frozen_stays_and_the_rest_moves(straight, config):
    before = {
        path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(init_state(config).params)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(straight.state.params):
        name = path_name(path)
        frozen = "indexer" in name or name.endswith("hash_table")
        assert np.array_equal(leaf, before[name]) == frozen, name
        if name.endswith("selection_bias"):
            moved = np.asarray(leaf) / config.train.bias_update_rate
            np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)
            assert np.abs(moved).max() <= STEPS


def test_a_resumed_run_is_bit_identical_and_logs_no_step_twice(straight, resumed):
    cut_off, done, workdir, _ = resumed
    assert done.returncode == 0
    assert f"resumed from the checkpoint of step {CHECKPOINT_EVERY}" in done.stdout
    assert max(line["step"] for line in cut_off) == CUT_OFF
    assert metrics_of(workdir) == metrics_of(straight.workdir)
    assert (workdir / "sample.txt").read_text() == (straight.workdir / "sample.txt").read_text()


def test_time_and_memory_are_logged_over_both_processes(resumed):
    _, _, workdir, _ = resumed
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if "loss" in line]
    for before, after in zip(lines, lines[1:], strict=False):
        for name in ("productive_seconds", "elapsed_seconds"):
            assert after[f"{SPEED}{name}"] > before[f"{SPEED}{name}"]
    assert 0 < lines[-1][f"{SPEED}goodput"] < 1
    # The process that was cut off is counted: its compiling took longer than all the steps.
    assert lines[-1][f"{SPEED}elapsed_seconds"] > 2 * lines[-1][f"{SPEED}productive_seconds"]
    assert lines[-1][f"{SPEED}teraflops_per_device"] > 0


def test_steps_are_traced_and_metrics_sent_if_asked_for(
    config, compiled_once, tmp_path, monkeypatch
):
    wandb, printed = FakeWandb(), io.StringIO()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with contextlib.redirect_stdout(printed):
        train(config, tmp_path, profile_steps=(2, 3), wandb_project="project")
    assert "trace of steps 2 to 3: " in printed.getvalue()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(step, [*values]) for step, values in wandb.logged] == [
        (line["step"], [name for name in line if name not in ("step", "time")])
        for line in map(json.loads, lines)
    ]
    assert wandb.opened[0]["config"] == config.to_dict() and wandb.finished == 1


def test_the_command_prints_nothing_but_its_own_lines(resumed):
    _, done, _, _ = resumed
    assert done.stderr == ""
    assert done.stdout.startswith("model: ")


def test_a_full_disk_ends_the_command_in_one_line(straight, config, compiled_once, tmp_path):
    """The first checkpoint, of step 4, fails; one of the next steps says so."""
    sections = sections_of(config.data.source)
    done = run_command(sections, tmp_path / "run", compiled_once, largest_file=100_000)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write a checkpoint to " in done.stderr and "File too large" in done.stderr
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert CHECKPOINT_EVERY <= steps[-1] <= 2 * CHECKPOINT_EVERY


def test_going_on_compiles_nothing_new(straight, resumed):
    *_, programs = resumed
    assert programs == 1


def test_a_complete_run_only_evaluates_and_samples_again(straight, config, compiled_once):
    before = (straight.workdir / "metrics.jsonl").read_bytes()
    again = Run(config, straight.workdir)
    assert again.line("the run is complete") == "the run is complete: 12 of 12 steps"
    assert again.line("held-out text: ") == straight.lines[-3:][0]
    assert not [line for line in again.lines if line.startswith(("step ", "compiling"))]
    assert (straight.workdir / "metrics.jsonl").read_bytes() == before
    for found, expected in zip(
        jax.tree.leaves(again.state), jax.tree.leaves(straight.state), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("section", "key", "value"), [
    ("model", "rope_theta", 5000.0), ("data", "seed", 1), ("optimizer", "name", "adamw"),
])
def test_a_workdir_of_another_run_is_refused_untouched(
    straight, source, section, key, value
):
    files = [path for path in straight.workdir.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    sections = sections_of(source)
    sections[section] = {**sections[section], key: value}
    other = RunConfig.from_config_dict(sections)
    with pytest.raises(InputError, match=rf"config\.{section}\.{key}: expected .*, as in the"):
        Run(other, straight.workdir)
    assert {path: path.read_bytes() for path in files} == before


def test_changed_text_is_refused_on_resume(straight, source, tmp_path):
    text = source.read_text()
    source.write_text(text.replace("experts", "exports"))
    try:
        with pytest.raises(InputError, match="as in the checkpoint"):
            Run(RunConfig.from_config_dict(sections_of(source)), straight.workdir)
    finally:
        source.write_text(text)


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(source, compiled_once):
    """AdamW's mean of gradients after one step is a tenth of the gradient."""
    choose = np.random.default_rng(0)
    segment_ids = np.repeat([[1] * 9 + [2] * 20 + [0] * 3, [1] * 32], 2, axis=0).astype(np.int32)
    tokens = choose.integers(0, MODEL["vocab_size"], segment_ids.shape).astype(np.int32)
    moments, measured = [], []
    for parts in (1, 2):
        sections = sections_of(source)
        sections["stages"]["stage1"]["accumulation"] = parts
        sections["optimizer"] |= {"name": "adamw", "clip_norm": 1e9}
        sections["model"] = {
            **MODEL, "layer_types": ["window"], "moe_types": ["learned"],
            "num_nextn_predict_layers": 1, "hc_gate_init": 1.0,
        }
        config = RunConfig.from_config_dict(sections)
        step = jax.jit(make_train_step(config, config.stages[0]))
        state, metrics = step(init_state(config), {"tokens": tokens, "segment_ids": segment_ids})
        leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
        moments.append({path_name(p): np.asarray(x) for p, x in leaves if "/mu/" in path_name(p)})
        measured.append(metrics)
    metrics = measured[0]
    assert metrics["sinkhorn_error"] > 1e-3  # far from rounding
    for name in ("loss", "sinkhorn_error"):
        assert measured[1][name] == pytest.approx(float(metrics[name]), rel=TOLERANCE), name
    for name in ("load/layer_0", "load/mtp", "max_load"):
        np.testing.assert_array_equal(measured[1][name], metrics[name], name)
    whole, added = moments
    floor = CANCELLED * max(map(np.linalg.norm, whole.values()))
    assert len(whole) == len(jax.tree.leaves(split_trainable(state.params)[0]))
    for name, leaf in whole.items():
        difference = np.linalg.norm(added[name] - leaf)
        assert difference <= TOLERANCE * max(np.linalg.norm(leaf), floor), name


@pytest.mark.heavy
def test_a_run_on_a_mesh_goes_on_on_another(source, compiled_once, tmp_path):
    """The trainer places states and batches on devices; what they compute, test_sharding says."""
    scores = []
    for steps, mesh in ((1, {"data": 2, "expert": 2}), (1, {"fsdp": 2, "tensor": 2})):
        sections = {**sections_of(source, steps=steps, sample_tokens=1), "mesh": mesh}
        sections["model"] = {**MODEL, "layer_types": ["window"], "moe_types": ["learned"]}
        sections["optimizer"]["name"] = "adamw"
        run = Run(RunConfig.from_config_dict(sections), tmp_path / "run")
        assert " on 4 of 8 " in run.line("model:")
        scores.append(float(run.line("held-out text: ").split()[2]))
    assert run.line("the run is complete")
    assert scores[0] == pytest.approx(scores[1], abs=0.002)  # the last digit printed
