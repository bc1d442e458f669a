"""Metrics go to Weights & Biases when asked for; a stand-in for its package records them."""

from __future__ import annotations

import json
import sys

import pytest
from fake_wandb import FakeWandb

from dsv4_jax.errors import InputError
from dsv4_jax.log import RunLog
from dsv4_jax.wandb_log import WandbLog, check_wandb


@pytest.fixture
def use(monkeypatch):
    def use(wandb: FakeWandb | None) -> FakeWandb | None:
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        return wandb

    return use


def test_the_log_sends_its_metrics_and_ends_the_run(use, tmp_path):
    wandb = use(FakeWandb())
    config = {"data": {"seq_len": 8}}
    log = RunLog(tmp_path, 0, WandbLog("some-project", tmp_path, config))
    log.metrics(1, {"loss": 1.5})
    log.metrics(1, {"load/layer_0": [0.5, 1.5]})
    log.metrics(2, {"loss": 1.25})
    assert wandb.finished == 0
    log.close()
    assert wandb.finished == 1
    (options,) = wandb.opened
    assert options["project"] == "some-project" and options["config"] == config
    assert options["dir"] == tmp_path and options["resume"] == "allow"
    first, (step, load), last = wandb.logged
    assert (first, last) == ((1, {"loss": 1.5}), (2, {"loss": 1.25}))
    assert step == 1 and load["load/layer_0"].values == [0.5, 1.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 1.5


def test_a_run_that_goes_on_is_the_same_one_and_sends_no_step_twice(use, tmp_path):
    first = use(FakeWandb())
    WandbLog("project", tmp_path, {}).close()
    again = use(FakeWandb(step=3))
    log = WandbLog("project", tmp_path, {})
    for step in (2, 3, 4):
        log.metrics(step, {"loss": 1.0})
    assert [step for step, _ in again.logged] == [3, 4]
    assert again.opened[0]["id"] == first.opened[0]["id"]
    (tmp_path / "other").mkdir()
    WandbLog("project", tmp_path / "other", {})
    assert again.opened[1]["id"] != first.opened[0]["id"]


def test_what_cannot_be_logged_to_is_refused_in_one_line(use, tmp_path):
    use(FakeWandb(refusal="No API key configured."))
    with pytest.raises(InputError, match="wandb_project: .* got 'No API key configured'; log in"):
        WandbLog("project", tmp_path, {})
    with pytest.raises(InputError, match="wandb_project: expected the name of a project, got none"):
        check_wandb("")
    check_wandb("project")
    use(None)
    with pytest.raises(InputError, match=r"the package wandb, got none; .*\[wandb\]"):
        check_wandb("project")
