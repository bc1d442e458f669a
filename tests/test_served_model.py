"""A model's folder yields its weights, its tokenizer and how it is computed, or one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import TEXT, TOKENIZER, VOCAB_SIZE, write_saved, write_workdir

from dsv4_jax import InputError, Runtime
from dsv4_jax.served_model import check_model, open_model
from dsv4_jax.tokenizer import train_tokenizer
from dsv4_jax.train_state import init_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_workdir(folder / "run")
    write_saved(folder / "float32", "float32")
    write_saved(folder / "bfloat16", "bfloat16")
    return folder


@pytest.fixture
def run(folders, tmp_path) -> Path:
    """A workdir that may be changed."""
    return Path(shutil.copytree(folders / "run", tmp_path / "run"))


def test_a_workdir_is_computed_as_its_run_does(folders):
    model, folder = open_model(folders / "run"), check_model(folders / "run")
    assert model.runtime == Runtime(csa="dense")  # of its stage
    assert folder.stage == folder.run.stages[0] and folder.stage.attention == "dense"
    assert model.config == folder.run.model
    assert model.tokenizer.specification == TOKENIZER.specification
    same = jax.tree.map(jnp.array_equal, model.params, init_state(folder.run, None).params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
def test_the_dtype_is_the_stored_one_or_what_is_asked_for(folders, stored, wanted):
    model = open_model(folders / stored, dtype=wanted)
    assert model.runtime == Runtime(dtype=wanted or stored)
    assert model.params["head"].dtype == (wanted or stored)


def test_a_named_tokenizer_comes_before_the_folders(folders, tmp_path):
    other = train_tokenizer([TEXT], vocab_size=VOCAB_SIZE - 10)
    (tmp_path / "other.json").write_text(other.specification)
    found = check_model(folders / "float32", tmp_path / "other.json").tokenizer
    assert found.specification == other.specification


def test_a_run_that_was_given_a_tokenizer_uses_it(run, tmp_path):
    sections = json.loads((run / "config.json").read_text())
    moved = (run / "tokenizer.json").rename(tmp_path / "given.json")
    sections["data"]["tokenizer"] = str(moved)
    (run / "config.json").write_text(json.dumps(sections))
    assert check_model(run).tokenizer.vocab_size == TOKENIZER.vocab_size
    moved.unlink()
    with pytest.raises(InputError, match="given.json', which is no file; add --tokenizer=FILE"):
        check_model(run)


def test_the_prediction_block_can_be_left_out(folders):
    whole, part = (open_model(folders / "float32", skip_mtp=skip) for skip in (False, True))
    assert part.config == dataclasses.replace(whole.config, num_nextn_predict_layers=0)
    assert whole.params.keys() - part.params.keys() == {"mtp"}


def test_what_cannot_be_used_is_refused_in_one_line(folders, run, tmp_path):
    (run / "tokenizer.json").unlink()
    large = train_tokenizer(["".join(map(chr, range(1000))) * 3], vocab_size=VOCAB_SIZE + 99)
    (tmp_path / "large.json").write_text(large.specification)
    for arguments, message in (
        ((run,), r"expected a tokenizer.json, got none; copy the file .* add --tokenizer=FILE"),
        ((run, tmp_path / "no.json"), r"tokenizer: expected .* got .*no.json', which is no file"),
        ((run, tmp_path / "large.json"), r"expected at most 300 token ids .* got 399"),
        ((tmp_path / "none",), "checkpoint: expected the folder of a model, got '.*none'"),
        ((folders / "float32", None, "float8"), "dtype: expected one of float32, bfloat16"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_model(*arguments)
        assert "\n" not in str(caught.value)
