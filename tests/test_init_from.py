"""Runs that start with a trained model: its weights, tokenizer and model, and chats to learn."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import training_command
from flax.traverse_util import flatten_dict
from tiny_models import TOKENIZER, write_saved, write_workdir

from dsv4_jax import InputError, load_pretrained
from dsv4_jax.init_from import adopt_model, load_weights, model_of
from dsv4_jax.log import METRICS_FILE
from dsv4_jax.manifest import MANIFEST_FILE
from dsv4_jax.model import param_shapes
from dsv4_jax.run_config import RunConfig
from dsv4_jax.served_model import check_model, open_model
from dsv4_jax.tokenizer import TOKENIZER_FILE
from dsv4_jax.train import train
from dsv4_jax.train_step import HELD_OUT

STAGE = {"tokens": 128, "seq_len": 64, "batch_tokens": 128}
STAGES = {
    "stage1": STAGE | {"attention": "indexer"},
    "stage2": STAGE | {"attention": "dense", "learning_rate": 1e-2},
    "stage3": STAGE | {"attention": "sparse"},
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(
        json.dumps({"messages": [
            {"role": "user", "content": f"{a} + {b}"},
            {"role": "assistant", "content": str(a + b)},
        ]}) + "\n"
        for a in range(8) for b in range(8)
    ))
    return path


@pytest.fixture(scope="module", params=["workdir", "hf"])
def folder(request, tmp_path_factory):
    """A trained model as a training leaves it, and in the format of transformers."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "workdir":
        write_workdir(path)
        return path
    write_saved(path, "float32")
    return path


def sections_of(source, stages=STAGES, **model) -> dict:
    sections = training_command.sections_of(
        source, eval_every=100, checkpoint_every=1, keep_checkpoints=10
    )
    data = sections["data"] | {"format": "chat"}
    return sections | {"data": data, "stages": stages, "model": model}


def run_of(folder, source, **model) -> RunConfig:
    sections = sections_of(source, **model)
    return RunConfig.from_config_dict(sections, model_of(folder, folder / "absent", sections))


def leaves_at(workdir, step: int) -> dict[str, dict]:
    manifest = workdir / "checkpoints" / str(step) / MANIFEST_FILE
    return json.loads(manifest.read_text())["leaves"]


def test_a_config_takes_from_a_model_what_it_leaves_open(folder, chats):
    model = check_model(folder).config
    assert run_of(folder, chats).model == model
    changed = run_of(folder, chats, index_topk=None, yarn_factor=4.0).model
    assert changed == dataclasses.replace(model, yarn_factor=4.0)


def test_weights_are_those_of_the_folder_in_float32(folder):
    _, params = load_pretrained(folder)
    found = flatten_dict(load_weights(check_model(folder), None), sep="/")
    expected = flatten_dict(params, sep="/")
    shapes = flatten_dict(param_shapes(check_model(folder).config), sep="/")
    assert found.keys() == expected.keys() == shapes.keys()
    for path, leaf in found.items():
        assert leaf.dtype == shapes[path].value.dtype
        np.testing.assert_array_equal(leaf, expected[path].astype(leaf.dtype))


@pytest.mark.heavy
def test_all_stages_go_on_from_a_trained_model(folder, chats, tmp_path):
    """Who rests in the first ones is bit by bit as it was; the end can be used, and goes on."""
    config, printed, workdir = run_of(folder, chats), io.StringIO(), tmp_path / "run"
    workdir.mkdir()
    # Of a try with another model, which ended before it had a checkpoint.
    (workdir / METRICS_FILE).write_text(json.dumps({"step": 0, HELD_OUT: 1.0}) + "\n")
    with contextlib.redirect_stdout(printed):
        train(config, workdir, init_from=folder)
    given = flatten_dict(load_weights(check_model(folder), None), sep="/")
    first, second, last = (leaves_at(workdir, step) for step in (1, 2, 3))
    moved = {
        name for name, (a, b) in {n: (first[n], second[n]) for n in first}.items() if a != b
    }
    assert any(name.startswith("params/") and "indexer" not in name for name in moved)
    assert not any(name.startswith("params/") and "indexer" in name for name in moved)
    assert any("indexer" in name for name in first if first[name] != last[name])
    shutil.copytree(workdir, tmp_path / "first")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "first" / "checkpoints" / str(step))
    _, after = load_pretrained(tmp_path / "first")
    for path, leaf in flatten_dict(after, sep="/").items():
        same = np.array_equal(leaf, given[path])
        assert same == ("indexer" not in path), path
    assert open_model(workdir).tokenizer.specification == TOKENIZER.specification
    # One score of the model before it is trained on, and one at the end of each stage.
    assert printed.getvalue().count("held-out text: ") == 1 + len(STAGES)
    first = json.loads((workdir / METRICS_FILE).read_text().splitlines()[0])
    assert first["step"] == 0 and first[HELD_OUT] != 1.0
    prompt, _, reply = (workdir / "sample.txt").read_text().partition("\n\n")
    assert prompt == config.train.sample_prompt and "\n\n" not in reply
    # It goes on without the weights that it started with, and has a model of its own.
    assert model_of("/no/longer/there", workdir, {}) == config.model
    again = io.StringIO()
    with contextlib.redirect_stdout(again):
        train(config, workdir, init_from="/no/longer/there")
    assert "the run is complete: 3 of 3 steps" in again.getvalue()
    assert "making the state" not in again.getvalue()


def test_changes_of_a_model_are_told_and_other_weights_refused(folder, chats, tmp_path, capsys):
    model = check_model(folder).config
    adopt_model(folder, run_of(folder, chats, yarn_factor=4.0), tmp_path)
    expected = f"model.yarn_factor=4.0 for {model.yarn_factor!r}, unlike {folder}"
    assert capsys.readouterr().out.splitlines() == [expected]
    assert (tmp_path / TOKENIZER_FILE).read_text() == TOKENIZER.specification
    changes = [({"hidden_size": 32}, r"expected the shape \(.*16.*\), as in .*, got the sha.*32")]
    if model.num_nextn_predict_layers == 0:
        changes.append(({"num_nextn_predict_layers": 1}, "expected no such weight, as in"))
    for change, said in changes:
        (name,) = change
        with pytest.raises(InputError, match=said) as caught:
            adopt_model(folder, run_of(folder, chats, **change), tmp_path / "other")
        assert f"take back model.{name}=" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_prediction_block_is_left_out_if_so_wanted(chats, tmp_path):
    folder = tmp_path / "model"
    write_saved(folder, "float32")
    config = run_of(folder, chats, num_nextn_predict_layers=0)
    assert config.model.num_nextn_predict_layers == 0
    assert "mtp" not in load_weights(adopt_model(folder, config, tmp_path), None)


def test_a_named_tokenizer_stays_and_one_left_over_does_not(folder, chats, tmp_path):
    config = run_of(folder, chats)
    named = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=str(folder / TOKENIZER_FILE))
    )
    adopt_model(folder, named, tmp_path)
    assert not (tmp_path / TOKENIZER_FILE).exists()
    (tmp_path / TOKENIZER_FILE).write_text("of an earlier try")
    adopt_model(folder, config, tmp_path)
    assert (tmp_path / TOKENIZER_FILE).read_text() == TOKENIZER.specification


@pytest.mark.parametrize("sections", [{"model": 5}, {"model": {}, "data": {"tokenizer": 5}}, {}])
def test_an_ill_typed_config_is_refused_in_one_line(folder, tmp_path, sections):
    with pytest.raises(InputError) as caught:
        RunConfig.from_config_dict(sections, model_of(folder, tmp_path, sections))
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
def test_the_command_starts_from_a_folder_and_refuses_others(chats, tmp_path):
    folder = tmp_path / "model"
    write_saved(folder, "bfloat16")
    sections = sections_of(chats, {"stage1": STAGE})
    refused = training_command.start(
        sections, tmp_path / "run", tmp_path / "compiled", arguments=["--init_from=/nowhere"]
    )
    _, errors = refused.communicate()
    assert refused.returncode == 2 and errors.count("\n") == 1
    assert "expected the folder of a model, got '/nowhere'" in errors
    alone = training_command.start(sections, tmp_path / "run", tmp_path / "compiled")
    _, errors = alone.communicate()
    assert alone.returncode == 2 and "or name a model by --init_from=DIR" in errors
    sections["model"]["num_nextn_predict_layers"] = 0
    printed = training_command.finish(training_command.start(
        sections, tmp_path / "run", tmp_path / "compiled", arguments=[f"--init_from={folder}"]
    ))
    assert "making the state" in printed and "attention sparse" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["num_nextn_predict_layers"] == 0
    assert jax.tree.leaves(open_model(tmp_path / "run").params)[0].dtype == np.float32
