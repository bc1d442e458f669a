"""Conversions copy bytes, survive being killed, read only what is theirs, and refuse the rest."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import small_files_only
from flax.traverse_util import flatten_dict, unflatten_dict
from on_mesh import mesh_of
from test_hf_parity import FLASH_LIKE
from test_train_step import CONFIG as RUN

from dsv4_jax import (
    InputError,
    ModelConfig,
    Quantized,
    dequantize,
    init_params,
    load_pretrained,
    save_pretrained,
)
from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.convert.convert import convert
from dsv4_jax.convert.leaves import leaves_of, read_leaf
from dsv4_jax.convert.orbax_leaves import open_leaves
from dsv4_jax.convert.output import Output
from dsv4_jax.convert.shards import Item, write_shards
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.table import tensors_of
from dsv4_jax.convert.tensor_files import open_tensors, read_header
from dsv4_jax.sharding import MESH_AXES
from dsv4_jax.train_state import init_state

ROOT = Path(__file__).parent.parent
# Every axis that a mesh splits is even; widths are not multiples of the blocks.
CONFIG = dataclasses.replace(
    FLASH_LIKE, hidden_size=160, moe_intermediate_size=144, q_lora_rank=136, hca_ratio=128,
    num_nextn_predict_layers=1, initializer_range=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def released(params, tmp_path_factory) -> Path:
    """A checkpoint as released: FP4 experts, FP8 matrices, in several files."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    save_pretrained(folder, CONFIG, params, format="deepseek", dtype="fp4", max_shard_bytes=300_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("the card")
    (folder / "run_me.py").write_text("raise SystemExit('never run')")
    return folder


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple, bytes]]:
    """Return dtype, shape and stored bytes of every tensor."""
    return {
        name: (entry.dtype, entry.shape, entry.view().tobytes())
        for name, entry in open_tensors(folder).items()
    }


def assert_trees_equal(found: dict, expected: dict) -> None:
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_released_format_has_all_storages(released):
    dtypes = {entry.dtype for entry in open_tensors(released).values()}
    assert dtypes == {"I8", "F8_E4M3", "F8_E8M0", "BF16", "F32", "I64"}
    assert len(list(released.glob("*.safetensors"))) > 5
    assert (released / "inference/config.json").exists()


def test_loading_gives_bfloat16_and_stored_types(released, params):
    config, loaded = load_pretrained(released)
    assert config == CONFIG
    flat = flatten_dict(loaded, sep="/")
    assert flat["layers_0/moe/experts/w_gate"].dtype == jnp.bfloat16
    assert flat["layers_0/attention_norm"].dtype == jnp.bfloat16
    assert flat["layers_0/attention/sink"].dtype == jnp.float32
    assert flat["layers_0/moe/hash_table"].dtype == jnp.int32
    # E2M1 errs by half of its largest step, of 2 scales, and a scale is below a third of the
    # largest value; E4M3 errs less.
    for path, leaf in flatten_dict(params, sep="/").items():
        bound = float(jnp.max(jnp.abs(leaf))) / 3
        np.testing.assert_allclose(flat[path].astype(leaf.dtype), leaf, atol=bound, err_msg=path)
    for dtype in ("float32", jnp.float16):
        _, cast = load_pretrained(released, dtype=dtype)
        kinds = {leaf.dtype for leaf in jax.tree.leaves(cast)}
        assert kinds == {jnp.dtype(dtype), jnp.dtype("int32")}


def test_requantising_gives_equal_values_and_kept_bytes_stay(released, tmp_path):
    config, loaded = load_pretrained(released)
    save_pretrained(tmp_path / "again", config, loaded, format="deepseek", dtype="fp4")
    assert_trees_equal(load_pretrained(tmp_path / "again")[1], loaded)

    config, kept = load_pretrained(released, keep_quantized=True)
    save_pretrained(tmp_path / "kept", config, kept, format="deepseek")
    assert bytes_of(tmp_path / "kept") == bytes_of(released)
    assert (tmp_path / "kept/config.json").read_bytes() == (released / "config.json").read_bytes()
    is_quantized = [isinstance(leaf, Quantized) for leaf in jax.tree.leaves(
        kept, is_leaf=lambda leaf: isinstance(leaf, Quantized))]  # fmt: skip
    assert any(is_quantized) and not all(is_quantized)
    assert_trees_equal(jax.jit(dequantize)(kept), loaded)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) < 0.6 * sum(
        leaf.nbytes for leaf in jax.tree.leaves(loaded)
    )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 4, 1, 1), (1, 1, 1, 2)])
def test_shards_hold_what_the_whole_holds(released, sizes, keep, monkeypatch):
    """Each device's part is read alone, and equal parts once."""
    _, whole = load_pretrained(released, keep_quantized=keep)
    mesh, read = mesh_of(*sizes), []

    def counted(original):
        def reads(self, tensor, *args):
            found = original(self, tensor, *args)
            read.append((tensor.name, getattr(found, "values", found).nbytes))
            return found

        return reads

    for name in ("read_part", "read_codes"):
        monkeypatch.setattr(FileSource, name, counted(getattr(FileSource, name)))
    _, sharded = load_pretrained(released, mesh=mesh, keep_quantized=keep)
    flat = flatten_dict(sharded, sep="/")
    for path, leaf in flatten_dict(whole, sep="/").items():
        pairs = zip(jax.tree.leaves(flat[path]), jax.tree.leaves(leaf), strict=True)
        for ours, theirs in pairs:
            assert ours.sharding.mesh.axis_names == MESH_AXES
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=path)
    # All devices are of this process: together they hold, and so read, everything exactly once.
    entries = open_tensors(released)
    stored = {name: entry.nbytes for name, entry in entries.items() if not name.endswith(".scale")}
    assert sum(nbytes for _, nbytes in read) == sum(stored.values())
    split = [nbytes for name, nbytes in read if name == "layers.0.ffn.experts.0.w1.weight"]
    # Experts are whole, but for their width.
    assert len(set(split)) == 1 and max(split) * sizes[3] == stored[
        "layers.0.ffn.experts.0.w1.weight"
    ]
    experts = jax.tree.leaves(flat["layers_0/moe/experts/w_gate"])[0]
    held = experts.addressable_shards[0].data.size
    assert held * sizes[1] * sizes[2] * sizes[3] == experts.size


def test_parts_that_cut_a_byte_of_fp4_in_two(released):
    """Odd columns: a byte is read whole, and half of it left out."""
    source = FileSource(released, open_tensors(released), CONFIG)
    leaf = next(
        leaf for leaf in leaves_of(source.config, source.tensors)
        if leaf.path == "layers_0/moe/experts/w_gate"
    )  # fmt: skip
    whole = read_leaf(source, leaf, tuple(map(slice, (0, 0, 0), leaf.shape)), np.dtype("float32"))
    part = (slice(1, 3), slice(3, 8), slice(5, 130))
    np.testing.assert_array_equal(
        read_leaf(source, leaf, part, np.dtype("float32")), whole[part]
    )


@pytest.mark.parametrize("to", ["deepseek", "hf"])
def test_quantised_tensors_are_copied_byte_for_byte(released, to, tmp_path):
    convert(released, tmp_path / "out", to=to, max_shard_bytes=1_000_000)
    found, expected = bytes_of(tmp_path / "out"), bytes_of(released)
    if to == "deepseek":
        assert found == expected
    # Under transformers' names the bytes are the same, tensor by tensor.
    assert sorted(found.values()) == sorted(expected.values())
    assert_trees_equal(load_pretrained(tmp_path / "out")[1], load_pretrained(released)[1])
    assert (tmp_path / "out/README.md").read_text() == "the card"
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/run_me.py").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", ["deepseek", "hf", "orbax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_conversion_and_parameters_agree(released, to, dtype, tmp_path):
    """Tensor by tensor gives what loading, casting and saving gives."""
    convert(released, tmp_path / "out", to=to, dtype=dtype)
    config, found = load_pretrained(tmp_path / "out")
    assert config == CONFIG
    # As in the released checkpoints, some tensors stay float32 beside bfloat16 ones.
    expected = load_pretrained(released, dtype=dtype if dtype == "float32" else None)[1]
    assert_trees_equal(found, expected)


def test_orbax_goes_back_to_pytorch(released, tmp_path):
    convert(released, tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "back", to="deepseek", dtype="fp4")
    assert_trees_equal(load_pretrained(tmp_path / "back")[1], load_pretrained(released)[1])
    config, fewer = load_pretrained(tmp_path / "ours", skip_mtp=True)
    assert config.num_nextn_predict_layers == 0 and "mtp" not in fewer
    mesh = mesh_of(1, 2, 2, 2)
    _, sharded = load_pretrained(tmp_path / "ours", mesh=mesh)
    assert_trees_equal(sharded, load_pretrained(released)[1])


def test_fp4_becomes_fp8_exactly(released, tmp_path):
    convert(released, tmp_path / "fp8", to="deepseek", dtype="fp8")
    entries = open_tensors(tmp_path / "fp8")
    assert entries["layers.1.ffn.experts.0.w1.weight"].dtype == "F8_E4M3"
    assert json.loads((tmp_path / "fp8/config.json").read_text())["expert_dtype"] == "fp8"
    assert_trees_equal(load_pretrained(tmp_path / "fp8")[1], load_pretrained(released)[1])


@pytest.mark.parametrize(("to", "dtype"), [
    ("hf", None), ("deepseek", "fp8"), ("deepseek", "bfloat16"), ("orbax", None),
])  # fmt: skip
def test_dry_run_counts_what_a_conversion_writes(released, to, dtype, tmp_path):
    report = convert(released, None, to=to, dtype=dtype, dry_run=True)
    done = convert(released, tmp_path / "out", to=to, dtype=dtype)
    for name, group in done.groups.items():
        counted = report.groups[name]
        assert (counted.tensors, counted.bytes) == (group.tensors, group.bytes)
    if to != "orbax":
        assert report.bytes == sum(e.nbytes for e in open_tensors(tmp_path / "out").values())


def test_dry_run_counts_and_writes_nothing(released, tmp_path, monkeypatch):
    monkeypatch.setattr(FileSource, "_block", lambda *_: pytest.fail("data was read"))
    report = convert(released, None, to=None, dry_run=True)
    entries = open_tensors(released).values()
    assert sum(group.tensors for group in report.groups.values()) == len(entries)
    assert report.bytes == sum(entry.nbytes for entry in entries)
    assert report.groups["experts"].stored["I8"] == 8 * 3 * 5
    assert not list(tmp_path.iterdir())


def test_report_has_the_statistics_of_each_group(released, params, tmp_path):
    report = convert(released, tmp_path / "out", to="hf", dtype="float32")
    experts = np.concatenate([
        leaf.ravel() for path, leaf in flatten_dict(load_pretrained(released)[1], sep="/").items()
        if "/experts/" in path and "mtp" not in path
    ]).astype(np.float64)  # fmt: skip
    group = report.groups["experts"]
    assert group.count == experts.size  # small tensors are counted whole
    np.testing.assert_allclose(group.total / group.count, experts.mean(), atol=1e-9)
    np.testing.assert_allclose(group.std, experts.std(), rtol=1e-9)
    assert group.absmax == np.abs(experts).max()
    copied = convert(released, tmp_path / "copied", to="deepseek")  # from codes and scales
    assert copied.groups["experts"].absmax == group.absmax
    assert not report.warnings()
    lines = report.lines()
    assert any(line.startswith("experts") and f"{group.bytes:,}" in line for line in lines)
    assert lines[-1].startswith("all") and f"{report.bytes:,}" in lines[-1]


def test_implausible_scales_are_named(params, tmp_path):
    """As when E8M0 bytes are read as integers."""
    flat = flatten_dict(params, sep="/")
    flat["layers_0/moe/experts/w_up"] = flat["layers_0/moe/experts/w_up"].at[2].multiply(127.0)
    flat["layers_0/attention/w_kv"] = flat["layers_0/attention/w_kv"] * 0
    save_pretrained(tmp_path / "in", CONFIG, unflatten_dict(flat, sep="/"))
    warnings = convert(tmp_path / "in", tmp_path / "out", to="deepseek").warnings()
    assert [warning.split(":")[0] for warning in warnings] == [
        "layers.0.attn.wkv.weight", "layers.0.ffn.experts.2.w3.weight"
    ]  # fmt: skip


CONVERT = [sys.executable, str(ROOT / "launch/convert.py")]


def start_conversion(source: Path, output: Path, *flags: str) -> subprocess.Popen:
    command = [*CONVERT, f"--input={source}", f"--output={output}", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_conversion_looks_unfinished_and_goes_on(params, tmp_path):
    """Killed at ever later moments: never a folder that looks complete, and no work done twice."""
    save_pretrained(tmp_path / "in", CONFIG, params, max_shard_bytes=100_000)
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    flags = ("--to=deepseek", "--max_shard_bytes=30000")
    for finished in (2, 20, 60):
        process = start_conversion(tmp_path / "in", output, *flags)
        while len(list(partial.glob("*.safetensors"))) < finished and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not output.exists()
        assert not (partial / "config.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(kept) >= 60
    process = start_conversion(tmp_path / "in", output, *flags)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.count("kept from an earlier run") == len(kept)
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    assert_trees_equal(load_pretrained(output)[1], params)
    assert not partial.exists() and not (output / "conversion.json").exists()


def stop_after(monkeypatch, name: str, count: int) -> None:
    """Let a conversion be killed when it reads its next tensor."""
    original, calls = getattr(FileSource, name), []

    def read(*args):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(FileSource, name, read)


def test_resuming_tells_what_it_kept_and_needs_the_same_input(released, tmp_path, monkeypatch):
    shutil.copytree(released, tmp_path / "in")
    flags = dict(to="hf", dtype="bfloat16", max_shard_bytes=100_000)
    output = tmp_path / "in/out"  # also within the input
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, "read", 60)
        convert(tmp_path / "in", output, **flags)
    (tmp_path / "in/notes.txt").write_text("no part of a checkpoint")
    whole = convert(released, tmp_path / "whole", **flags)
    shards = sorted((tmp_path / "in/.out.partial").glob("*.safetensors"))
    config = tmp_path / "in/config.json"
    times = config.stat().st_atime_ns, config.stat().st_mtime_ns
    os.utime(config)
    with pytest.raises(InputError, match="expected an unfinished conversion of the same input"):
        convert(tmp_path / "in", output, **flags)
    os.utime(config, ns=times)
    report = convert(tmp_path / "in", output, **flags)
    assert len(shards) > 2
    kept = sum(e.nbytes for shard in shards for e in read_header(output / shard.name).values())
    assert report.kept_bytes == kept and report.bytes == whole.bytes
    assert f"{(whole.bytes - kept) / 1e9:.2f} GB in" in report.speed()
    assert "kept, not measured again" in report.speed()
    assert report.groups["experts"].count < whole.groups["experts"].count
    assert bytes_of(output) == bytes_of(tmp_path / "whole")


def test_finished_orbax_parameters_are_kept(released, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Output, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(released, tmp_path / "out", to="orbax")
    assert (tmp_path / ".out.partial/params").is_dir()
    monkeypatch.setattr(FileSource, "read", lambda *_: pytest.fail("read again"))
    report = convert(released, tmp_path / "out", to="orbax")
    assert report.kept_bytes == report.bytes
    monkeypatch.undo()
    assert_trees_equal(load_pretrained(tmp_path / "out")[1], load_pretrained(released)[1])


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_orbax_config_says_what_its_arrays_are(released, dtype, tmp_path):
    convert(released, tmp_path / "out", to="orbax", dtype=dtype)
    document = json.loads((tmp_path / "out/config.json").read_text())
    assert document["dtype"] == (dtype or "bfloat16")
    assert not {"quantization_config", "expert_dtype"} & document.keys()


def test_what_cannot_be_said_is_refused_before_anything_is_written(params, released, tmp_path):
    """Hash layers behind others, which DeepSeek's config.json cannot count; links that lead out."""
    behind = dataclasses.replace(CONFIG, moe_types=CONFIG.moe_types[::-1])
    save_pretrained(tmp_path / "in", behind, init_params(behind, jax.random.key(0)))
    shutil.copytree(released, tmp_path / "linked")
    (tmp_path / "linked/LICENSE").symlink_to("/etc/passwd")
    before = sorted(tmp_path.iterdir())
    for source, expected in (("in", "hash layers only in front"), ("linked", "link out of it")):
        for dry_run in (False, True):
            with pytest.raises(InputError, match=expected):
                convert(tmp_path / source, tmp_path / "out", to="deepseek", dry_run=dry_run)
    with pytest.raises(InputError, match="hash layers only in front"):
        save_pretrained(tmp_path / "out", behind, load_pretrained(tmp_path / "in")[1],
                        format="deepseek")  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


def test_unfinished_conversion_of_something_else_is_not_mixed_in(released, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text("{}")
    with pytest.raises(InputError, match="unfinished conversion of the same input"):
        convert(released, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_files_of_an_unknown_attempt_are_not_taken_for_ours(released, tmp_path):
    """A killed save_pretrained says nowhere what its shards are of."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"of other weights")
    convert(released, tmp_path / "out", to="deepseek")
    assert bytes_of(tmp_path / "out") == bytes_of(released)


def test_formats_that_config_json_cannot_say_are_refused(released, tmp_path):
    """Its keys speak of all experts and of all other matrices at once."""
    config, kept = load_pretrained(released, keep_quantized=True)
    mixed = kept | {"mtp": dequantize(kept["mtp"])}
    with pytest.raises(InputError, match="expected all in one format"):
        save_pretrained(tmp_path / "out", config, mixed)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_left_alone(released, params, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for output in (tmp_path, ".", "thesis.txt", "/"):
        for write in (
            lambda output=output: convert(released, output, to="hf"),
            lambda output=output: save_pretrained(output, CONFIG, params),
        ):
            with pytest.raises(InputError, match="expected a new folder"):
                write()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_full_disk_is_one_line_and_leaves_no_output(released, params, tmp_path):
    with small_files_only(200_000):
        for write in (
            lambda: convert(released, tmp_path / "a", to="hf", dtype="float32"),
            lambda: save_pretrained(tmp_path / "b", CONFIG, params),
        ):
            with pytest.raises(InputError, match="^output: cannot write .*space"):
                write()
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def run_cli(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([*CONVERT, *flags], capture_output=True, text=True, check=False)


def test_command_converts_and_reports(released, tmp_path):
    done = run_cli(f"--input={released}", f"--output={tmp_path / 'out'}", "--to=hf",
                   "--dtype=bfloat16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DeepSeek's original names" in done.stdout and "GB/s" in done.stdout
    assert load_pretrained(tmp_path / "out")[0] == CONFIG
    dry = run_cli(f"--input={tmp_path / 'out'}", "--dry_run")
    assert dry.returncode == 0 and "names of transformers' modules" in dry.stdout


BAD_FLAGS = {
    "no input": ((), "--input: expected a value"),
    "no output": (("--input=x",), "--output: expected a value"),
    "format": (("--input=x", "--output=y", "--to=onnx"), "--to"),
    "dtype": (("--input=x", "--output=y", "--to=hf", "--dtype=int3"), "--dtype"),
    "quantised orbax": (("--input=x", "--output=y", "--to=orbax", "--dtype=fp8"), "or None, got"),
    "dtype of nothing": (("--input=x", "--dry_run", "--dtype=fp8"), "beside a dtype"),
    "shards": (("--input=x", "--output=y", "--to=hf", "--max_shard_bytes=0"), "max_shard_bytes"),
    "nothing there": (("--input=/nonexistent", "--dry_run"), "/nonexistent"),
    "empty folder": (("--input={empty}", "--dry_run"), "config.json"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_end_in_one_line(case, tmp_path):
    flags, expected = BAD_FLAGS[case]
    done = run_cli(*(flag.format(empty=tmp_path) for flag in flags))
    assert done.returncode == 2 and expected in done.stderr
    assert len(done.stderr.splitlines()) <= 3 and "Traceback" not in done.stderr


def test_parameters_of_another_config_are_all_named(params, tmp_path):
    flat = flatten_dict(params, sep="/")
    del flat["final_norm"]
    flat["head"] = flat["head"][:, :5]
    flat["extra"] = flat["layers_0/attention_norm"]
    with pytest.raises(InputError) as caught:
        save_pretrained(tmp_path / "out", CONFIG, unflatten_dict(flat, sep="/"))
    message = str(caught.value)
    assert "final_norm: missing" in message and "'extra': unexpected" in message
    assert "head: expected shape [160, 96], got [160, 5]" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_non_finite_parameters_are_refused_by_name(params, tmp_path):
    flat = flatten_dict(params, sep="/")
    flat["layers_0/attention/w_kv"] = flat["layers_0/attention/w_kv"].at[3, 4].set(jnp.nan)
    with pytest.raises(InputError, match="layers_0/attention/w_kv: expected finite values"):
        save_pretrained(tmp_path / "out", CONFIG, unflatten_dict(flat, sep="/"))
    assert not list(tmp_path.iterdir())


BAD_LEAVES = {
    "float64": (lambda flat: flat.update(head=np.zeros(flat["head"].shape)), "head: expected bfl"),
    "int8": (lambda flat: flat.update(head=flat["head"].astype("int8")), "float32, got int8"),
    "table of floats": (
        lambda flat: flat.update({TABLE: flat[TABLE].astype("float32")}),
        "expected int32 or int64, got float32",
    ),
    "a number": (lambda flat: flat.update(head=1.0), "head: expected bfloat16 or float16 or float"),
    "quantised norm": (
        lambda flat: flat.update(final_norm=flat["layers_0/attention/w_kv"]),
        "final_norm: expected bfloat16 or float16 or float32, got fp8",
    ),
    "codes": (
        lambda flat: flat.update({KV: flat[KV].replace(codes=flat[KV].codes[:-1])}),
        "w_kv: expected codes shape [16, 160], got [15, 160]",
    ),
    "scales": (
        lambda flat: flat.update({KV: flat[KV].replace(scales=flat[KV].scales[:, :1])}),
        "w_kv: expected scales shape [1, 2], got [1, 1]",
    ),
}  # fmt: skip
TABLE, KV = "layers_0/moe/hash_table", "layers_0/attention/w_kv"


@pytest.mark.parametrize("case", BAD_LEAVES)
def test_leaves_of_other_kinds_are_refused(case, released, tmp_path):
    edit, expected = BAD_LEAVES[case]
    config, params = load_pretrained(released, keep_quantized=True)
    flat = flatten_dict(params, sep="/")
    edit(flat)
    with pytest.raises(InputError) as caught:
        save_pretrained(tmp_path / "out", config, unflatten_dict(flat, sep="/"))
    assert expected in str(caught.value) and len(caught.value.problems) == 1
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_one_line(released, params, tmp_path):
    out = tmp_path / "out"
    mesh = jax.make_mesh((2,), ("x",))
    for call, expected in {
        "params": (lambda: save_pretrained(out, CONFIG, None), "params: expected a tree"),
        "size": (lambda: save_pretrained(out, CONFIG, params, max_shard_bytes="5GB"), "'5GB'"),
        "no size": (lambda: save_pretrained(out, CONFIG, params, max_shard_bytes=0), "got 0"),
        "format": (lambda: save_pretrained(out, CONFIG, params, format=None), "format: expected"),
        "dtype": (lambda: save_pretrained(out, CONFIG, params, dtype=np.int8), "dtype: expected"),
        "load fp8": (lambda: load_pretrained(released, dtype="fp8"), "dtype: expected one of bfl"),
        "mesh": (lambda: load_pretrained(released, mesh=mesh), "mesh: expected axes data, expert"),
        "long": (lambda: load_pretrained(tmp_path / ("x" * 300)), "cannot be read"),
        "no path": (lambda: load_pretrained("a\0b"), "expected a file in"),
        "no output": (lambda: convert(released, None, to="hf"), "output: expected a folder"),
        "to": (lambda: convert(released, out, to=None), "to: expected one of hf, deepseek"),
    }.values():  # fmt: skip
        with pytest.raises(InputError, match=expected) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_dtypes_are_given_by_name_or_as_they_are(released, params, tmp_path):
    save_pretrained(tmp_path / "name", CONFIG, params, dtype="bfloat16")
    save_pretrained(tmp_path / "type", CONFIG, params, dtype=jnp.bfloat16)
    assert bytes_of(tmp_path / "name") == bytes_of(tmp_path / "type")


def test_default_device_is_where_parameters_go(released, capsys):
    device = jax.devices()[3]
    with jax.default_device(device):
        _, loaded = load_pretrained(released, keep_quantized=True)
    assert {leaf.device for leaf in jax.tree.leaves(loaded)} == {device}
    assert f"{released}: DeepSeek's original names" in capsys.readouterr().out


def test_unreadable_or_huge_config_is_refused(released, tmp_path, monkeypatch):
    shutil.copytree(released, tmp_path / "in")
    (tmp_path / "in/config.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(InputError, match="config.json: expected at most 1048576 bytes"):
        load_pretrained(tmp_path / "in")
    (tmp_path / "in/config.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="config.json: expected a JSON object"):
        load_pretrained(tmp_path / "in")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match="config.json: cannot be read: Permission denied"):
        load_pretrained(released)


def test_draft_head_of_another_kind_is_refused_or_skipped(params, tmp_path):
    without = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    trunk = {key: leaf for key, leaf in params.items() if key != "mtp"}
    save_pretrained(tmp_path / "plain", without, trunk, format="deepseek")
    items = [
        Item(name, entry.dtype, entry.shape, lambda entry=entry: [entry.view()])
        for name, entry in open_tensors(tmp_path / "plain").items()
    ]
    items.append(Item("mtp.0.markov_head.w1.weight", "F32", (2,), lambda: [np.ones(2, "f4")]))
    config = json.loads((tmp_path / "plain/config.json").read_text())
    config |= {"num_nextn_predict_layers": 3, "dspark_block_size": 5}
    config["compress_ratios"] += [0] * 3
    with Output(tmp_path / "dspark") as output:
        write_shards(output, items, max_shard_bytes=10**9)
        output.write_json("config.json", config)
    with pytest.raises(InputError, match="'mtp.0.markov_head.w1.weight': .*DSpark.*skip_mtp"):
        load_pretrained(tmp_path / "dspark")
    config, loaded = load_pretrained(tmp_path / "dspark", skip_mtp=True)
    assert config.num_nextn_predict_layers == 0
    assert_trees_equal(loaded, trunk)


def test_base_models_scales_are_float32(params, tmp_path, monkeypatch):
    """FP8 experts with float32 scales: values of an independent product, bytes kept."""
    save_pretrained(tmp_path / "fp8", CONFIG, params, format="deepseek", dtype="fp8")
    rng, items = np.random.default_rng(0), []
    for name, entry in open_tensors(tmp_path / "fp8").items():
        if name.endswith(".scale"):
            scales = rng.uniform(1e-3, 2e-3, entry.shape).astype(np.float32)
            items.append(Item(name, "F32", entry.shape, lambda scales=scales: [scales]))
        else:
            items.append(Item(name, entry.dtype, entry.shape, lambda entry=entry: [entry.view()]))
    with Output(tmp_path / "base") as output:
        write_shards(output, items, max_shard_bytes=10**9)
        output.write("config.json", [(tmp_path / "fp8/config.json").read_bytes()])
    _, loaded = load_pretrained(tmp_path / "base", dtype="float32")
    entries = open_tensors(tmp_path / "base")
    codes = entries["layers.1.attn.wq_a.weight"].view().view(jnp.float8_e4m3fn)
    scales = entries["layers.1.attn.wq_a.scale"].view().repeat(128, 0).repeat(128, 1)
    expected = codes.astype(np.float32) * scales[: codes.shape[0], : codes.shape[1]]
    np.testing.assert_array_equal(
        flatten_dict(loaded, sep="/")["pairs/hca/attention/w_q_a"][0], expected.T
    )
    config, kept = load_pretrained(tmp_path / "base", keep_quantized=True)
    save_pretrained(tmp_path / "kept", config, kept, format="deepseek")
    assert bytes_of(tmp_path / "kept") == bytes_of(tmp_path / "base")
    # Scales stand before all values of their file: no reason to read these twice.
    original, read = FileSource.read, []
    monkeypatch.setattr(
        FileSource, "read", lambda self, t: (read.append(t.name), original(self, t))[1]
    )
    convert(tmp_path / "base", tmp_path / "copied", to="deepseek")
    assert bytes_of(tmp_path / "copied") == bytes_of(tmp_path / "base")
    assert sorted(read) == sorted(tensor.name for tensor in tensors_of(CONFIG))


def test_training_workdir_becomes_a_checkpoint(tmp_path):
    """The newest checkpoint's parameters, without the optimizer's state, and the tokenizer."""
    state = init_state(RUN)
    config = RUN.to_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    (tmp_path / "run/tokenizer.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path / "run", keep=2, config=config)
    checkpoints.save(3, state, {})
    checkpoints.close()
    for path, leaf in open_leaves(tmp_path / "run/checkpoints/3/state").items():
        stacked = ("pairs/" in path) + ("/experts/" in path)  # each layer and expert is by itself
        if leaf.shape:
            chunk = leaf._store.chunk_layout.read_chunk.shape
            assert chunk[:stacked] == (1,) * stacked, path
    convert(tmp_path / "run", tmp_path / "hf", to="hf")
    loaded, params = load_pretrained(tmp_path / "hf")
    assert loaded == dataclasses.replace(RUN.model, hash_seed=0)
    assert_trees_equal(params, state.params)
    assert_trees_equal(load_pretrained(tmp_path / "run")[1], state.params)
    assert (tmp_path / "hf/tokenizer.json").exists()
    assert isinstance(ModelConfig.from_hf(tmp_path / "hf"), ModelConfig)
    assert os.listdir(tmp_path / "hf").count("model.safetensors") == 1
    damaged = tmp_path / "run/checkpoints/3/state/_METADATA"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"state/_METADATA: its bytes are not .*; move that"):
        load_pretrained(tmp_path / "run")
