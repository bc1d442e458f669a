"""A checkpoint gives back, bit by bit, what was saved, and only to the run that saved it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import shutil
import time

import jax
import jax.numpy as jnp
import pytest
from faults import small_files_only
from jax.sharding import NamedSharding, PartitionSpec
from on_mesh import mesh_of
from saved_states import PLACE, assert_same, new_state, shapes_of

from dsv4_jax.checkpoint import FIXED_KEYS, Checkpoints, check_leaves, check_same_run
from dsv4_jax.checksum import fingerprints
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import InputError

# When one file cannot be read or written, Orbax drops TensorStore's answers about the others, which
# are told to nobody, sooner or later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, layer_types=("window", "csa"), moe_types=("hash", "learned"),
    num_attention_heads=8,
)
CONFIG = {
    "model": json.loads(json.dumps(dataclasses.asdict(MODEL))),
    "runtime": {"dtype": "float32"},
    "data": {
        "source": "stdlib", "text_field": "text", "tokenizer": None, "seed": 0,
        "held_out_fraction": 0.1, "held_out_bytes": 100,
    },
    "optimizer": {"name": "muon", "learning_rate": 1e-3},
    "train": {"eval_every": 10},
    "stages": {"stage1": {"tokens": 10}},
    "mesh": {"data": 1},
}
F11 = "F11: a config that is not that of the checkpoint, refused by name"


@pytest.fixture(scope="module", autouse=True)
def _no_late_answers():
    """Collect them here, so that no other module's tests find them."""
    yield
    gc.collect()


def opened(workdir, config=CONFIG) -> Checkpoints:
    return Checkpoints(workdir, keep=2, config=config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir in which steps 1 to 3 were saved."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = opened(workdir)
    assert checkpoints.latest_step is None
    for step in (1, 2, 3):
        checkpoints.save(step, new_state(step), PLACE)
    checkpoints.close()
    return workdir


def test_the_newest_state_and_place_come_back(saved):
    checkpoints, expected = opened(saved), new_state(3)
    assert checkpoints.latest_step == 3
    state, place = checkpoints.restore(shapes_of(expected))
    checkpoints.close()
    assert_same(state, expected)
    assert place == PLACE


def test_old_checkpoints_are_removed(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "3"]


def test_a_state_comes_back_onto_another_mesh(saved):
    mesh, expected = mesh_of(1, 4, 1, 2), new_state(3)
    specs = {"step": (), "weight": ("fsdp", "tensor"), "table": ("fsdp",), "half": ()}
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*axes)) for name, axes in specs.items()
    }
    checkpoints = opened(saved)
    state, _ = checkpoints.restore(shapes_of(expected, shardings))
    checkpoints.close()
    assert_same(state, expected)
    assert state["weight"].addressable_shards[0].data.shape == (64, 128)


def test_steps_taken_while_a_checkpoint_is_written_do_not_change_it(tmp_path):
    """The next step takes the state's buffers for its own (donation) before the write ends."""
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, checkpoints = new_state(1), opened(tmp_path)
    checkpoints.save(1, state, PLACE)
    for _ in range(3):
        state = advance(state)
    checkpoints.close()
    checkpoints = opened(tmp_path)
    found, _ = checkpoints.restore(shapes_of(state))
    checkpoints.close()
    assert_same(found, new_state(1))


def test_a_checkpoint_cut_off_in_writing_does_not_count(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints"
    (folder / "3").rename(folder / "4.orbax-checkpoint-tmp")
    checkpoints = opened(workdir)
    assert checkpoints.latest_step == 2
    state, _ = checkpoints.restore(shapes_of(new_state(2)))
    checkpoints.close()
    assert_same(state, new_state(2))


def check_for_long(checkpoints: Checkpoints) -> None:
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)


@pytest.mark.parametrize("told_by", ["check", "save", "close"])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(told_by, tmp_path):
    checkpoints, told = opened(tmp_path), r"cannot write a checkpoint to .*File too large.*; make"
    checkpoints.save(1, new_state(1), PLACE)
    checkpoints.close()
    checkpoints = opened(tmp_path)
    tell = {
        "check": lambda: check_for_long(checkpoints),
        "save": lambda: checkpoints.save(3, new_state(3), PLACE),
        "close": checkpoints.close,
    }
    with small_files_only(100_000):
        checkpoints.save(2, new_state(2), PLACE)
        with pytest.raises(InputError, match=told) as caught:
            tell[told_by]()
    assert "\n" not in str(caught.value)
    checkpoints.close()
    checkpoints = opened(tmp_path)
    checkpoints.check()  # nothing was written yet
    assert checkpoints.latest_step == 1
    assert_same(checkpoints.restore(shapes_of(new_state(1)))[0], new_state(1))
    checkpoints.save(2, new_state(2), PLACE)
    checkpoints.close()
    checkpoints.check()  # all is well
    assert opened(tmp_path).latest_step == 2


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*checkpoints/.writable: .*; choose"):
        opened(tmp_path)


def test_another_run_is_refused_and_leaves_the_checkpoint(saved):
    other = copy.deepcopy(CONFIG)
    other["data"]["seed"] = 64
    with pytest.raises(InputError, match=r"config\.data\.seed: expected 0, .*got 64; set it"):
        opened(saved, other)
    checkpoints = opened(saved)
    assert checkpoints.latest_step == 3
    checkpoints.close()


@pytest.mark.faults
@pytest.mark.parametrize(
    "key", [*FIXED_KEYS[1:], *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig))]
)
def test_every_key_that_shapes_a_run_is_fixed(key, record_property):
    section, _, name = key.partition(".")
    other = copy.deepcopy(CONFIG)
    other[section][name] = "other"
    with pytest.raises(InputError, match=rf"^config\.{key}: .*got 'other'; set it") as caught:
        check_same_run(CONFIG, other, "here")
    assert "\n" not in str(caught.value)
    record_property(F11, 1)


def test_what_was_saved_before_a_key_was_there_has_its_default():
    assert "format" not in CONFIG["data"]
    other = copy.deepcopy(CONFIG)
    other["data"]["format"] = "text"
    check_same_run(CONFIG, other, "here")
    other["data"]["format"] = "chat"
    with pytest.raises(InputError, match="config.data.format: expected 'text', .*got 'chat'"):
        check_same_run(CONFIG, other, "here")


SAVED = {
    "half": "bfloat16[8, 16]", "weight": "float32[256, 256]", "table": "int32[4, 3]",
    "step": "int32[]",
}
OTHER_LEAVES = [  # name, dtype and shape that a config asks for, or None for no such leaf
    ("weight", "bfloat16", (256, 256)), ("weight", "float16", (256, 256)),
    ("weight", "int32", (256, 256)), ("table", "int16", (4, 3)), ("table", "uint32", (4, 3)),
    ("table", "float32", (4, 3)), ("step", "float32", ()), ("step", "bool", ()),
    ("table", "int32", (3, 4)), ("table", "int32", (12,)), ("table", "int32", (5, 3)),
    ("weight", "float32", (256, 0)), ("weight", "float32", (1, 256, 256)), ("step", "int32", (1,)),
    ("weight", None, None), ("table", None, None), ("step", None, None),
    ("bias", "float32", (256,)), ("a", "int32", ()), ("weights", "float32", (256, 256)),
]


def with_leaf(state: dict, name: str, dtype: str | None, shape: tuple | None) -> dict:
    """Return the shapes of a state in which one leaf is another one, or left out."""
    shapes = shapes_of(state)
    if dtype is None:
        del shapes[name]
        return shapes
    leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=state["step"].sharding)
    return shapes | {name: leaf}


def told_of(name: str, dtype: str | None, shape: tuple | None, where: str) -> str:
    got = "nothing" if dtype is None else f"{dtype}{list(shape)}"
    return (
        f"{name}: expected {SAVED.get(name, 'nothing')}, as in the checkpoint {where}, got {got} "
        "by the config; set it back or choose another --workdir"
    )


@pytest.mark.faults
@pytest.mark.parametrize(("name", "dtype", "shape"), OTHER_LEAVES)
def test_other_leaves_are_refused(name, dtype, shape, record_property):
    state = new_state(3)
    leaves = fingerprints(state)()
    check_leaves(leaves, shapes_of(state), "here")
    with pytest.raises(InputError) as caught:
        check_leaves(leaves, with_leaf(state, name, dtype, shape), "here")
    assert str(caught.value) == told_of(name, dtype, shape, "here")
    record_property(F11, 1)


@pytest.mark.faults
def test_a_leaf_below_others_is_named_by_its_path(record_property):
    state = {"params": {"layers": [new_state(1), new_state(2)]}}
    other = shapes_of(state)
    other["params"]["layers"][1] = with_leaf(new_state(2), "table", "int32", (4, 4))
    with pytest.raises(InputError, match=r"^params/layers/1/table: expected int32\[4, 3\], as"):
        check_leaves(fingerprints(state)(), other, "here")
    record_property(F11, 1)


@pytest.mark.faults
@pytest.mark.parametrize(("name", "dtype", "shape"), [
    ("weight", "bfloat16", (256, 256)), ("table", "int32", (3, 4)), ("weight", None, None),
    ("bias", "float32", (256,)),
])
def test_other_leaves_are_not_restored(name, dtype, shape, saved, record_property):
    """Orbax alone would cast the first."""
    expected, checkpoints = new_state(3), opened(saved)
    with pytest.raises(InputError) as caught:
        checkpoints.restore(with_leaf(expected, name, dtype, shape))
    assert str(caught.value) == told_of(name, dtype, shape, str(saved / "checkpoints" / "3"))
    state, _ = checkpoints.restore(shapes_of(expected))  # nothing is lost by the attempt
    checkpoints.close()
    assert_same(state, expected)
    record_property(F11, 1)


@pytest.mark.parametrize("key", [
    "train.eval_every", "stages.stage1", "runtime.dtype", "optimizer.learning_rate", "mesh.data",
    "data.held_out_bytes",
])
def test_other_keys_may_change(key):
    section, _, name = key.partition(".")
    other = copy.deepcopy(CONFIG)
    other[section][name] = 7
    check_same_run(CONFIG, other, "here")


def test_a_key_that_one_side_lacks_is_a_difference():
    other = copy.deepcopy(CONFIG)
    other["model"]["new_key"] = 1
    with pytest.raises(InputError, match=r"config\.model\.new_key: expected None, .* got 1"):
        check_same_run(CONFIG, other, "here")
