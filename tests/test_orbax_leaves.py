"""Orbax checkpoints written and read in slices are those that Orbax itself writes and reads."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from faults import small_files_only
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from on_mesh import mesh_of

from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.convert import orbax_leaves
from dsv4_jax.convert.orbax_leaves import LeafPlan, open_leaves, write_leaves
from dsv4_jax.errors import InputError
from dsv4_jax.train_state import Skips, TrainState

# When one file cannot be read, Orbax drops TensorStore's answers about the others, which are told
# to nobody, sooner or later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DTYPES = (ml_dtypes.bfloat16, np.float32, np.float16, np.int32, ml_dtypes.float8_e4m3fn,
          ml_dtypes.float8_e8m0fnu, np.uint8)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _no_late_answers():
    """Collect them here, so that no other module's tests find them."""
    yield
    gc.collect()


def random_array(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return random bits, among them not-a-numbers."""
    dtype = np.dtype(dtype)
    seed = math.prod(shape) + dtype.itemsize
    bits = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(bits, np.uint8).view(dtype).reshape(shape)


def plan_of(array: np.ndarray, slice_axes: int) -> LeafPlan:
    return LeafPlan(array.shape, array.dtype, slice_axes, lambda index: array[index])


def arrays_and_plans() -> tuple[dict[str, np.ndarray], dict[str, LeafPlan]]:
    """Return leaves of all dtypes that come in all ways, and scalars."""
    arrays, plans = {}, {}
    for dtype in DTYPES:
        name = np.dtype(dtype).name
        for axes in (0, 1, 2):
            arrays[f"by_slices/{axes}/{name}"] = random_array((2, 3, 8, 5), dtype)
            plans[f"by_slices/{axes}/{name}"] = plan_of(arrays[f"by_slices/{axes}/{name}"], axes)
        arrays[f"scalar_{name}"] = random_array((), dtype)
        plans[f"scalar_{name}"] = plan_of(arrays[f"scalar_{name}"], 0)
    arrays["rows"] = random_array((6,), np.float32)
    plans["rows"] = plan_of(arrays["rows"], 1)  # slices without axes
    return arrays, plans


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder written in slices, and what is in it."""
    folder = tmp_path_factory.mktemp("written") / "params"
    arrays, plans = arrays_and_plans()
    write_leaves(folder, plans)
    return folder, arrays


def assert_same_bits(found, expected: np.ndarray) -> None:
    found = np.asarray(found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def run_python(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


def test_leaves_come_back_bit_by_bit(written):
    folder, arrays = written
    leaves = open_leaves(folder)
    assert leaves.keys() == arrays.keys()
    for path, expected in arrays.items():
        assert (leaves[path].shape, leaves[path].dtype) == (expected.shape, expected.dtype)
        assert_same_bits(leaves[path][()], expected)


@pytest.mark.parametrize("index", [
    1, -1, np.int64(1), (1, 2), (-2, -3, -8, -5), slice(1, None), (0, slice(0, 2), slice(2, 7)),
    (slice(None), slice(None), slice(-3, None), slice(1, 99, 3)), (0, slice(2, 1)),
    (slice(5, 9), 0), (1, 1, slice(None, -2, 2), 4),
])  # fmt: skip
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_a_part_is_that_of_the_array(axes, index, written):
    folder, arrays = written
    path = f"by_slices/{axes}/bfloat16"
    assert_same_bits(open_leaves(folder)[path][index], np.asarray(arrays[path][index]))


@pytest.mark.parametrize("index", [2, -3, (0, 0, 0, 0, 0), slice(None, None, -1)])
def test_an_index_out_of_bounds_is_an_index_error(index, written):
    with pytest.raises(IndexError):
        open_leaves(written[0])["by_slices/1/bfloat16"][index]


def test_every_slice_is_read_once(tmp_path):
    array, seen = random_array((3, 4, 2), np.float32), []

    def read(index):
        seen.append(index)
        return array[index]

    write_leaves(tmp_path / "params", {"a": LeafPlan(array.shape, array.dtype, 2, read)})
    assert seen == list(np.ndindex(3, 4))


def test_orbax_alone_restores_it_in_another_process(written):
    folder, arrays = written
    code = """
import hashlib, json, sys
import orbax.checkpoint as ocp
restored = ocp.StandardCheckpointer().restore(sys.argv[1])
flat = ocp.tree.to_flat_dict(restored, sep="/")
print(json.dumps({
    path: [list(x.shape), x.dtype.name, hashlib.sha256(x.tobytes()).hexdigest()]
    for path, x in flat.items()
}))
assert not any(name.startswith("dsv4_jax") for name in sys.modules)
"""
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        path: [list(x.shape), x.dtype.name, hashlib.sha256(x.tobytes()).hexdigest()]
        for path, x in arrays.items()
    }


def test_orbax_restores_it_onto_a_mesh(tmp_path):
    arrays = {
        "experts/w": random_array((2, 8, 16, 12), ml_dtypes.bfloat16),
        "embed": random_array((32, 16), np.float32), "step": random_array((), np.int32),
    }  # fmt: skip
    slice_axes = {"experts/w": 2, "embed": 0, "step": 0}
    write_leaves(
        tmp_path / "params", {path: plan_of(x, slice_axes[path]) for path, x in arrays.items()}
    )
    mesh = mesh_of(1, 4, 1, 2)
    specs = {"experts/w": (None, "fsdp", "tensor"), "embed": ("tensor", "fsdp"), "step": ()}
    target = {
        path: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*specs[path]))
        )
        for path, x in arrays.items()
    }
    restored = ocp.StandardCheckpointer().restore(
        tmp_path / "params", unflatten_dict(target, sep="/")
    )
    restored = ocp.tree.to_flat_dict(restored, sep="/")
    for path, expected in arrays.items():
        assert restored[path].sharding == target[path].sharding
        assert_same_bits(restored[path], expected)
    assert restored["experts/w"].addressable_shards[0].data.shape == (2, 2, 8, 12)


def test_a_chunk_is_a_slice_or_part_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_leaves, "CHUNK_BYTES", 1024)
    arrays = {"small": random_array((2, 16, 16), np.uint8),
              "large": random_array((2, 64, 32), np.float32)}  # fmt: skip
    write_leaves(tmp_path / "params", {path: plan_of(x, 1) for path, x in arrays.items()})
    leaves = open_leaves(tmp_path / "params")
    for path, expected in arrays.items():
        assert_same_bits(leaves[path][()], expected)
    described = ocp.StandardCheckpointHandler().metadata(tmp_path / "params")
    assert described["small"].storage.chunk_shape == (1, 16, 16)
    chunk = described["large"].storage.chunk_shape
    assert chunk[0] == 1 and 512 <= math.prod(chunk) * 4 <= 1024


def test_what_orbax_itself_saved_is_opened(tmp_path):
    state = {"a": {"b": random_array((4, 6), np.float32)}, "list": [jnp.arange(3), jnp.ones(2)],
             "count": 7, "rate": 0.5, "none": None, "nothing": {}}  # fmt: skip
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    leaves = open_leaves(tmp_path / "state")
    assert leaves.keys() == {"a/b", "list/0", "list/1", "count", "rate"}
    assert_same_bits(leaves["a/b"][1:, 2], state["a"]["b"][1:, 2])
    assert_same_bits(leaves["list/0"][1:], np.arange(1, 3, dtype=np.int32))
    assert (leaves["count"].shape, leaves["count"][()], leaves["rate"][()]) == ((), 7, 0.5)


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_zarr3": True}])
def test_other_formats_of_orbax_are_opened(options, tmp_path):
    array = random_array((4, 6), np.float32)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "state", args=ocp.args.PyTreeSave({"a": array}))
    assert_same_bits(open_leaves(tmp_path / "state")["a"][2:, 1:3], array[2:, 1:3])


def test_a_training_checkpoint_is_opened(tmp_path):
    mesh = mesh_of(1, 4, 1, 2)
    placed = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    weights = random_array((8, 4), np.int32).astype(np.float32)
    params = {"pairs": {"w": jax.device_put(weights, placed)}, "head": jnp.ones((3, 2))}
    skips = Skips(jnp.array(0), jnp.array(0))
    state = TrainState(jnp.array(5), skips, params, optax.adamw(1e-3).init(params))
    checkpoints = Checkpoints(tmp_path, keep=1, config={"model": {}})
    checkpoints.save(5, state, {})
    checkpoints.close()
    leaves = open_leaves(tmp_path / "checkpoints" / "5" / "state")
    assert leaves.keys() == ocp.tree.to_flat_dict(state, sep="/").keys()
    assert {"step", "params/pairs/w", "params/head"} < leaves.keys()
    assert leaves["step"][()] == 5
    assert_same_bits(leaves["params/pairs/w"][()], weights)
    assert_same_bits(leaves["params/pairs/w"][1:6, 3], weights[1:6, 3])
    assert_same_bits(leaves["opt_state/0/mu/pairs/w"][2], np.zeros(4, np.float32))


def test_memory_does_not_grow_with_the_leaf(tmp_path):
    """A leaf of 1 GB in slices of 4 MB."""
    # The kernel's VmHWM, because getrusage starts from the peak of the process that forked.
    code = """
import sys
from pathlib import Path
import numpy as np
from dsv4_jax.convert.orbax_leaves import LeafPlan, open_leaves, write_leaves

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

folder, before = Path(sys.argv[1]), peak()
noise = np.random.default_rng(0).integers(0, 256, (1024, 4096), np.uint8)
plan = LeafPlan((250, *noise.shape), noise.dtype, 1, lambda index: noise + np.uint8(index[0] % 256))
write_leaves(folder, {"w": plan})
leaf = open_leaves(folder)["w"]
for index in range(0, 250, 4):
    np.testing.assert_array_equal(leaf[index], plan.read((index,)))
print(peak() - before)
"""
    done = run_python(code, tmp_path / "params")
    shutil.rmtree(tmp_path / "params", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6


@pytest.mark.parametrize("error", [InputError("damaged"), OSError("gone"), KeyboardInterrupt()])
def test_what_read_raises_comes_through_and_leaves_nothing(error, tmp_path):
    array = random_array((40, 1000), np.float32)

    def read(index):
        if index == (30,):
            raise error
        return array[index]

    with pytest.raises(type(error)) as caught:
        write_leaves(tmp_path / "params", {"a": LeafPlan(array.shape, array.dtype, 1, read)})
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [
    np.zeros(3, np.float32), np.zeros((), np.float32), np.zeros(4, np.float64),
])  # fmt: skip
def test_a_slice_that_is_not_as_planned_is_an_error_of_the_program(wrong, tmp_path):
    plan = LeafPlan((2, 4), np.dtype(np.float32), 1, lambda index: wrong)
    with pytest.raises(ValueError, match=r"slice \(0,\): expected .*, got") as caught:
        write_leaves(tmp_path / "params", {"a": plan})
    assert not isinstance(caught.value, InputError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_refused(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(InputError, match=r"params: expected no such folder yet, got one; move"):
        write_leaves(tmp_path / "params", {"a": plan_of(np.zeros(3), 0)})
    assert not list((tmp_path / "params").iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    plans = {"a": plan_of(random_array((8, 200_000), np.uint8), 1)}
    with (
        small_files_only(100_000),
        pytest.raises(InputError, match=r"cannot write .*params: .*; make room") as caught,
    ):
        write_leaves(tmp_path / "params", plans)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    write_leaves(tmp_path / "params", plans)


def test_a_file_in_place_of_the_parent_is_refused(tmp_path):
    (tmp_path / "output").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*output/params: .*; make room or choose"):
        write_leaves(tmp_path / "output" / "params", {"a": plan_of(np.zeros(3), 0)})


def test_a_killed_write_leaves_no_folder_and_the_next_succeeds(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dsv4_jax.convert.orbax_leaves import LeafPlan, write_leaves

def read(index):
    if index == (30,):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros(1000, np.float32)

write_leaves(Path(sys.argv[1]), {"a": LeafPlan((40, 1000), np.dtype(np.float32), 1, read)})
"""
    folder = tmp_path / "params"
    assert run_python(code, folder).returncode == -signal.SIGKILL
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1  # what was left
    array = random_array((40, 1000), np.float32)
    write_leaves(folder, {"a": plan_of(array, 1)})
    assert list(tmp_path.iterdir()) == [folder]
    assert_same_bits(open_leaves(folder)["a"][()], array)


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "params")


@pytest.mark.parametrize("data", [b"", b'{"tree_metadata": {"(', b"{}", b"[]", b'{"tree_metadata"'
                                  b': {"a": {}}}'])  # fmt: skip
@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_damaged_description_is_told(name, data, copied):
    (copied / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"cannot read {copied}: .*; expected") as caught:
        open_leaves(copied)
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_told(copied):
    for path in copied.glob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=rf"cannot read {copied}: .*; expected"):
        open_leaves(copied)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"short"), lambda path:
                                    path.unlink()])  # fmt: skip
def test_damaged_data_is_told_when_it_is_read(damage, tmp_path):
    array = random_array((2, 1000), np.float32)  # small ones are kept in the index
    write_leaves(tmp_path / "params", {"a/b": plan_of(array, 1)})
    for path in tmp_path.glob("params/ocdbt.process_*/d/*"):
        damage(path)
    leaf = open_leaves(tmp_path / "params")["a/b"]
    with pytest.raises(InputError, match=r"cannot read a\.b in .*params: .*; expected") as caught:
        leaf[0]
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        with pytest.raises(InputError, match=rf"cannot read .*{name}: .*; expected a whole Orbax"):
            open_leaves(tmp_path / name)
