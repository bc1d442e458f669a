"""A run of several stages: each has its program, and borders leave no trace in what goes on."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from training_command import committed_steps, metrics_of, result_of, sections_of, write_text

from dsv4_jax.checkpoint import FIXED_KEYS
from dsv4_jax.manifest import MANIFEST_FILE
from dsv4_jax.run_config import RunConfig
from dsv4_jax.served_model import open_model
from dsv4_jax.train import train

pytestmark = pytest.mark.heavy

STAGES = {
    "stage1": {"tokens": 384, "seq_len": 32, "batch_tokens": 128, "attention": "dense"},
    "stage2": {
        "tokens": 512, "seq_len": 64, "batch_tokens": 256, "attention": "indexer",
        "learning_rate": 1e-2,
    },
    "stage3": {"tokens": 768, "seq_len": 64, "batch_tokens": 256, "accumulation": 2},
}
ENDS = [3, 5, 8]
F4 = "F4: resumed, all batches are those of a stream without an end"


def config_of(source, **train_keys) -> RunConfig:
    sections = sections_of(source, eval_every=100, log_every=1, **train_keys)
    return RunConfig.from_config_dict(sections | {"stages": STAGES})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    return config_of(source, checkpoint_every=1, keep_checkpoints=100)


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """A run that kept all of its checkpoints, and what it printed."""
    workdir, printed = tmp_path_factory.mktemp("straight"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(config, workdir)
    return workdir, printed.getvalue()


def leaves_at(workdir, step: int) -> dict[str, dict]:
    manifest = workdir / "checkpoints" / str(step) / MANIFEST_FILE
    return json.loads(manifest.read_text())["leaves"]


def test_each_stage_is_announced_and_compiled_once(config, straight):
    _, printed = straight
    assert config.stage_ends == ENDS
    assert printed.count("compiling the training step") == len(STAGES)
    for line in (
        "stage1 of 3: steps 1 to 3, 4 rows of 32 tokens, attention dense",
        "stage2 of 3: steps 4 to 5, 4 rows of 64 tokens, attention indexer",
        "stage3 of 3: steps 6 to 8, 4 rows of 64 tokens, attention sparse",
    ):
        assert line in printed.splitlines()


def test_metrics_are_those_of_what_learns(straight):
    logged = [line for line in metrics_of(straight[0]) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, ENDS[-1] + 1))
    for line in logged:
        learns = (line["step"] <= ENDS[0], line["step"] <= ENDS[1]).index(True) if (
            line["step"] <= ENDS[1]
        ) else 2
        assert ("grad_norm" in line) == (learns != 1)
        assert ("index_loss" in line) == (learns != 0)
        assert ("index_recall" in line) == (learns == 1)
    assert [line["learning_rate"] for line in logged[3:5]] == [np.float32(1e-2)] * 2
    scored = [line["step"] for line in metrics_of(straight[0]) if "held_out_bits_per_byte" in line]
    assert scored == ENDS


def test_who_rests_in_a_stage_stays_bit_by_bit(straight):
    workdir, _ = straight
    at = [leaves_at(workdir, step) for step in (1, *ENDS)]
    for before, after, moved in zip(at, at[1:], ("model", "indexer", "both"), strict=False):
        for name, leaf in before.items():
            if not name.startswith("params/") or name.endswith(("hash_table", "selection_bias")):
                continue
            moves = moved == "both" or ("indexer" in name) == (moved == "indexer")
            assert (after[name] != leaf) == moves, name


@pytest.mark.faults
@pytest.mark.parametrize("step", [ENDS[0] - 1, ENDS[0], ENDS[0] + 1, ENDS[1], ENDS[1] + 1])
def test_a_run_goes_on_from_either_side_of_a_border(
    straight, config, step, tmp_path, record_property
):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    for later in committed_steps(workdir):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))
    train(config, workdir)
    assert result_of(workdir) == result_of(straight[0])
    record_property(F4, 1)


def test_a_model_is_used_with_the_attention_of_its_stage(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    assert open_model(workdir).runtime.csa == "sparse"
    for later in (6, 7, 8):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    assert open_model(workdir).runtime.csa == "dense"


def test_stages_are_no_fixed_keys():
    """So that those that have not begun may change; the data's place knows those that have."""
    assert not [key for key in FIXED_KEYS if key.startswith("stages")]
