"""Damaged and hostile checkpoints end in one line that names file, tensor and reason."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_files import CONFIG, joined
from checkpoint_files import SINGLE as SHARD

from dsv4_jax import InputError, init_params, load_pretrained, save_pretrained
from dsv4_jax.convert import tensor_files
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.tensor_files import INDEX, CheckpointError

FILES, BATCHES = 10_000, 10
SLOW = 1.0  # seconds that a file may take
MEMORY = 200e6  # bytes that all files of a batch may add
LONGEST = 10_000  # characters of a message, whatever the names are


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A whole checkpoint with FP4, FP8, E8M0, BF16, F32 and I64 tensors in one small file."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    params = init_params(CONFIG, jax.random.key(0))
    save_pretrained(folder, CONFIG, params, format="deepseek", dtype="fp4")
    return folder


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> Path:
    """The same under the names of transformers' modules, in BF16 and in several files."""
    folder = tmp_path_factory.mktemp("modules") / "checkpoint"
    params = init_params(CONFIG, jax.random.key(0))
    save_pretrained(folder, CONFIG, params, dtype="bfloat16", max_shard_bytes=2000)
    return folder


def read_all(folder: Path) -> None:
    source = FileSource(folder, CONFIG)
    for tensor in source.tensors:
        source.read(tensor)


def refusal(folder: Path) -> str:
    """Return the one line of the error that reading everything raises."""
    with pytest.raises(InputError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < LONGEST
    return message


def parts(data: bytes) -> tuple[dict, bytes]:
    """Split a safetensors file into its header and its data; the inverse of `joined`."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


# B1: fuzzed files. Each mutator takes a random generator, the header and the data of a good file.

Mutator = Callable[[np.random.Generator, dict, bytes], bytes]
EVIL_NAMES = (
    "../../etc/passwd", "", "\0", "a\nb", "x" * 10_000, "\ud800", "layers.0.attn.wq_a.weight ",
    "layers.99.attn.wq_a.weight", "__metadata__2", "\u202e", "mtp.0.markov_head.weight",
)  # fmt: skip
EVIL_NUMBERS = (-1, 2**31, 2**63, 2**64, 10**30, 1.5, "1", True, None, [], {})
EVIL_DTYPES = ("F64", "BOOL", "I8", "U8", "F32", "BF16", "F8_E4M3", "F8_E5M2", "F4", "X", "", 3)


def pick(rng: np.random.Generator, header: dict) -> str:
    names = [name for name in header if name != "__metadata__"]
    return names[rng.integers(len(names))]


def choose(rng: np.random.Generator, values: tuple):
    return values[rng.integers(len(values))]


def truncated(rng, header, data):
    whole = joined(header, data)
    return whole[: rng.integers(len(whole))]


def extended(rng, header, data):
    return joined(header, data) + rng.bytes(int(rng.integers(1, 100)))


def flipped_bits(rng, header, data):
    whole = bytearray(joined(header, data))
    for _ in range(rng.integers(1, 8)):
        place = rng.integers(len(whole)) if rng.random() < 0.5 else rng.integers(200)
        whole[place] ^= 1 << rng.integers(8)
    return bytes(whole)


def wrong_length(rng, header, data):
    whole = joined(header, data)
    length = choose(rng, (0, 1, 7, len(whole), len(whole) * 2, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + whole[8:]


def moved_offsets(rng, header, data):
    offsets = header[pick(rng, header)]["data_offsets"]
    offsets[rng.integers(2)] += int(rng.integers(-50, 50)) or 1
    return joined(header, data)


def evil_offsets(rng, header, data):
    header[pick(rng, header)]["data_offsets"][rng.integers(2)] = choose(rng, EVIL_NUMBERS)
    return joined(header, data)


def changed_dtype(rng, header, data):
    header[pick(rng, header)]["dtype"] = choose(rng, EVIL_DTYPES)
    return joined(header, data)


def changed_shape(rng, header, data):
    shape = header[pick(rng, header)]["shape"]
    kind = rng.integers(4)
    if kind == 0:
        shape.append(1)
    elif kind == 1:
        shape.reverse()
    elif kind == 2:
        shape[rng.integers(len(shape))] = choose(rng, EVIL_NUMBERS)
    else:
        shape.insert(0, choose(rng, (0, 2, 2**40)))
    return joined(header, data)


def duplicate_key(rng, header, data):
    name = pick(rng, header)
    twice = json.dumps({name: header[choose(rng, (name, pick(rng, header)))]})
    return joined((twice[:-1] + ", " + json.dumps(header)[1:]).encode(), data)


def renamed(rng, header, data):
    name, evil = pick(rng, header), choose(rng, EVIL_NAMES)
    header = {evil if key == name else key: info for key, info in header.items()}
    return joined(header, data)


def missing_field(rng, header, data):
    info = header[pick(rng, header)]
    del info[choose(rng, ("dtype", "shape", "data_offsets"))]
    return joined(header, data)


def other_types(rng, header, data):
    header[pick(rng, header)] = choose(rng, (None, 1, "x", [], {}, [1, 2], True))
    return joined(header, data)


def removed(rng, header, data):
    del header[pick(rng, header)]
    return joined(header, data)


def evil_metadata(rng, header, data):
    header["__metadata__"] = choose(rng, (None, 1, [], {"a": 1}, {"a": None}, {"x": "y" * 1000}))
    return joined(header, data)


def bad_text(rng, header, data):
    text = json.dumps(header).encode()
    place = rng.integers(len(text))
    return joined(text[:place] + choose(rng, (b"\xff", b"\0", b"{", b"[" * 300, b'"')), data)


def noise_in_data(rng, header, data):
    """Non-finite values and scales may be among it."""
    data, place = bytearray(data), rng.integers(len(data))
    data[place : place + 16] = choose(rng, (b"\xff", b"\x7f", b"\0", b"\x80")) * len(
        data[place : place + 16]
    )
    return joined(header, bytes(data))


def swapped(rng, header, data):
    one, other = pick(rng, header), pick(rng, header)
    header[one], header[other] = header[other], header[one]
    return joined(header, data)


def no_file_at_all(rng, header, data):
    return choose(rng, (b"", b"\0" * 7, b"\0" * 8, b"{}", b"\x80\x04N.", rng.bytes(500)))


MUTATORS: tuple[Mutator, ...] = (
    truncated, extended, flipped_bits, wrong_length, moved_offsets, evil_offsets, changed_dtype,
    changed_shape, duplicate_key, renamed, missing_field, other_types, removed, evil_metadata,
    bad_text, noise_in_data, swapped, no_file_at_all,
)  # fmt: skip


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("batch", range(BATCHES))
def test_fuzzed_files_load_whole_or_are_refused_in_one_line(batch, released, tmp_path):
    """10,000 in all: no crash, none slow, path and reason always, the tensor where it is one."""
    good = (released / SHARD).read_bytes()
    header, data = parts(good)
    (tmp_path / SHARD).write_bytes(good)
    read_all(tmp_path)
    rng, before, refused = np.random.default_rng(batch), peak_memory(), 0
    for number in range(FILES // BATCHES):
        mutate = MUTATORS[number % len(MUTATORS)]
        (tmp_path / SHARD).write_bytes(mutate(rng, copy.deepcopy(header), data))
        start = time.perf_counter()
        try:
            read_all(tmp_path)
        except InputError as error:
            message, refused = str(error), refused + 1
            assert str(tmp_path) in message and "\n" not in message, (mutate, message)
            assert len(message) < LONGEST and len(message) > len(str(tmp_path)) + 10
            if mutate in (removed, renamed, changed_dtype, noise_in_data):
                assert "tensor" in message or "safetensors file" in message, message
        assert time.perf_counter() - start < SLOW, mutate
    assert peak_memory() - before < MEMORY
    # Bits that are weights, metadata and changes to the same value do not matter.
    assert 0.7 * FILES / BATCHES < refused < FILES / BATCHES


# B2: headers that would cost time and memory.


def bombs(part: int = 1) -> dict[str, Callable[[dict, bytes], bytes]]:
    """Return headers as large as they come, or the given part of it."""

    def with_text(text: Callable[[dict], bytes]) -> Callable[[dict, bytes], bytes]:
        return lambda header, data: joined(text(header), data)

    def count(most: int) -> int:
        return most // part

    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    def many(header: dict) -> bytes:
        return json.dumps({f"t{i}": entry for i in range(count(100_000))}).encode()

    def metadata(header: dict) -> bytes:
        keys = {str(i): "" for i in range(count(200_000))}
        return json.dumps(header | {"__metadata__": keys}).encode()

    return {
        "blanks": with_text(lambda header: json.dumps(header).encode() + b" " * count(10**8)),
        "a long text": with_text(
            lambda header: json.dumps(header | {"__metadata__": {"a": "b" * count(10**8)}}).encode()
        ),
        "a long claim": lambda header, data: struct.pack("<Q", count(10**8)) + data,
        "tensors": with_text(many),
        "metadata keys": with_text(metadata),
        "deep list": with_text(lambda header: b'{"a":' + b"[" * count(10**6)),
        "deep object": with_text(lambda header: b'{"a":' * count(10**6)),
        "closed deep list": with_text(
            lambda header: b'{"a":' + b"[" * count(10**5) + b"]" * count(10**5) + b"}"
        ),
        "long number": with_text(lambda header: b'{"a":' + b"9" * count(10**7) + b"}"),
        "long name": with_text(
            lambda header: json.dumps({"x" * count(10**7): entry}).encode()
        ),
    }


# These are whole checkpoints where their header is below the largest that is read.
HARMLESS = ("blanks", "a long text", "metadata keys")


@pytest.mark.parametrize("part", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("case", bombs())
def test_header_bombs_cost_little(case, part, released, tmp_path):
    data = bombs(part)[case](*parts((released / SHARD).read_bytes()))
    (tmp_path / SHARD).write_bytes(data)
    (length,) = struct.unpack("<Q", data[:8])
    before, start = peak_memory(), time.perf_counter()
    if case in HARMLESS and length <= tensor_files.LARGEST_HEADER:
        read_all(tmp_path)
    else:
        assert str(tmp_path) in refusal(tmp_path)
    assert time.perf_counter() - start < 5
    assert peak_memory() - before < 1e9


# B3: index files.


def indexed(folder: Path, tmp_path: Path) -> tuple[Path, dict]:
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    return target, json.loads((target / INDEX).read_text())


SHARD_NAMES = (
    "../model-00001-of-00002.safetensors", "../../etc/passwd", "/etc/passwd", "", ".", "..",
    "sub/model.safetensors", "a\0b.safetensors", "http://host/x.safetensors", "C:\\x.safetensors",
    "missing.safetensors", "model.bin", "pytorch_model.bin", "model.safetensors\n",
    "~/x.safetensors", "file:///etc/passwd", "model.safetensors/", "x" * 5000 + ".safetensors",
    "\ud800.safetensors",
    "folder.safetensors", "link.safetensors", "loop.safetensors", "config.json",
)  # fmt: skip
VALUES = (None, 1, 1.5, True, [], {}, ["a"])
TOTALS = (-1, 0, 1, 10**12, 10**30, 1.5, "100", True, [], {})
TEXTS = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b'{"weight_map": []}', b'{"weight_map": null}',
    b'{"weight_map": 1}', b"\xef\xbb\xbf{}", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5,
    b'{"weight_map": {"a": "b", "a": "c"}}', b'{"weight_map": {}, "weight_map": {}}',
    b'{"weight_map": {}}', b'{"total_size": ' + b"9" * 10_000 + b"}",
)  # fmt: skip


def index_cases() -> dict[str, tuple[str, object]]:
    """Return over 300 bad index files: what is changed, and to what."""
    cases = {f"text {number}": ("text", text) for number, text in enumerate(TEXTS)}
    for place in range(10):
        cases |= {f"name {place} {i}": ("name", (place, v)) for i, v in enumerate(SHARD_NAMES)}
        cases |= {f"value {place} {i}": ("name", (place, v)) for i, v in enumerate(VALUES)}
    return cases | {f"total {i}": ("total", v) for i, v in enumerate(TOTALS)}


def test_bad_index_files_are_refused_before_a_shard_is_opened(modules, tmp_path, monkeypatch):
    folder, index = indexed(modules, tmp_path)
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("/etc/passwd")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    opened = []
    monkeypatch.setattr(tensor_files, "read_header", lambda path: opened.append(path) or {})
    names = list(index["weight_map"])
    cases = index_cases()
    assert len(cases) >= 300
    for case, (kind, value) in cases.items():
        changed = copy.deepcopy(index)
        if kind == "name":
            changed["weight_map"][names[value[0] * 4]] = value[1]
        elif kind == "total":
            changed["metadata"]["total_size"] = value
        text = value if kind == "text" else json.dumps(changed).encode()
        (folder / INDEX).write_bytes(text)
        message = refusal(folder)
        assert str(folder) in message, case
        # Lies smaller than a header show only when headers are read, and no shard is none to open.
        if (kind, value) not in (("total", 0), ("total", 1)):
            assert not opened, (case, message)
        opened.clear()


def test_an_index_that_does_not_agree_with_its_shards(modules, tmp_path):
    folder, index = indexed(modules, tmp_path)
    shards = sorted(set(index["weight_map"].values()))
    here = next(name for name, shard in index["weight_map"].items() if shard == shards[0])

    def changed(**edits) -> str:
        edited = copy.deepcopy(index)
        edited["weight_map"] |= edits.get("moved", {})
        for name in edits.get("dropped", ()):
            del edited["weight_map"][name]
        edited["metadata"]["total_size"] += edits.get("lie", 0)
        (folder / INDEX).write_text(json.dumps(edited))
        return refusal(folder)

    message = changed(moved={here: shards[1]})
    assert f"tensor {here!r}: expected in {shards[1]!r}" in message and shards[0] in message
    assert "tensor 'ghost': expected in" in changed(moved={"ghost": shards[0]})
    assert f"tensor {here!r}: expected in no shard" in changed(dropped=[here])
    assert "total_size: expected the tensors'" in changed(lie=8)
    (folder / INDEX).write_text(json.dumps(index))
    read_all(folder)
    (folder / shards[2]).unlink()
    assert repr(shards[2]) in refusal(folder)


def test_links_are_followed_within_the_folder_and_the_hub_cache_alone(released, tmp_path):
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for name in ("config.json", SHARD):
        shutil.copy(released / name, blobs / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    assert load_pretrained(snapshot)[0] == load_pretrained(released)[0]
    elsewhere = tmp_path / "models--x/other/abc"
    elsewhere.mkdir(parents=True)
    (elsewhere / SHARD).symlink_to(blobs / f"sha-{SHARD}")
    assert "link out of it" in refusal(elsewhere)


# B6: pickles.


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickles(canary: Path, good: bytes) -> dict[str, bytes]:
    payload = pickle.dumps(Canary(canary))
    array, zipped = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Canary(canary)], object), allow_pickle=True)
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", payload)
    header, data = parts(good)
    return {
        "pickle": payload, "protocol 0": pickle.dumps(Canary(canary), 0), "npy": array.getvalue(),
        "zip": zipped.getvalue(), "before": payload + good, "after": good + payload,
        "zip after": good + zipped.getvalue(),
        "in metadata": joined(header | {"__metadata__": {"x": payload.hex()}}, data),
    }  # fmt: skip


NAMES = (SHARD, "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.npy", "x.pkl")


@pytest.mark.parametrize("name", NAMES)
def test_pickles_are_never_opened(name, released, tmp_path):
    canary, good = tmp_path / "canary", (released / SHARD).read_bytes()
    for case, data in pickles(canary, good).items():
        folder = tmp_path / case
        folder.mkdir()
        (folder / name).write_bytes(data)
        if name == SHARD and case == "in metadata":
            read_all(folder)  # text like any other
        else:
            message = refusal(folder)
            assert str(folder) in message
            if name != SHARD:
                assert f"got {name}, a pickle" in message and "save it as safetensors" in message
        assert not canary.exists()
    open_canary = pickle.loads(pickle.dumps(Canary(canary)))  # the payload would have worked
    open_canary.close()
    assert canary.exists()


# Strictness: what is wrong with single tensors.


def edited(folder: Path, tmp_path: Path, edit: Callable[[dict, bytearray], None]) -> Path:
    """Copy a checkpoint of one file with its tensors changed; offsets are made good again."""
    header, data = parts((folder / SHARD).read_bytes())
    header.pop("__metadata__", None)
    tensors = {
        name: [info["dtype"], info["shape"], bytearray(data[slice(*info["data_offsets"])])]
        for name, info in header.items()
    }
    edit(tensors)
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    target = tmp_path / "edited"
    target.mkdir()
    (target / SHARD).write_bytes(joined(header, data))
    return target


def set_bytes(name: str, values: bytes, dtype: str | None = None) -> Callable[[dict], None]:
    def edit(tensors: dict) -> None:
        tensors[name][2][: len(values)] = values
        tensors[name][0] = dtype or tensors[name][0]

    return edit


def float32_scales(name: str, value: float) -> Callable[[dict], None]:
    def edit(tensors: dict) -> None:
        count = int(np.prod(tensors[name][1]))
        values = np.ones(count, np.float32)
        values[-1] = value
        tensors[name] = ["F32", tensors[name][1], bytearray(values.tobytes())]

    return edit


FP8, FP4 = "layers.0.attn.wq_a", "layers.0.ffn.experts.1.w2"
SINGLE_FAULTS: dict[str, tuple[Callable[[dict], object], str, str]] = {
    "missing": (lambda t: t.pop("norm.weight"), "norm.weight", "missing"),
    "unexpected": (lambda t: t.update(x=["F32", [0], b""]), "x", "unexpected"),
    "scale missing": (lambda t: t.pop(f"{FP8}.scale"), f"{FP8}.weight", "expected its scales as"),
    "scale twice": (
        lambda t: t.update({f"{FP8}.weight_scale_inv": t[f"{FP8}.scale"]}), f"{FP8}.weight",
        "got both",
    ),
    "scale of nothing": (
        lambda t: t.update({"norm.scale": ["F32", [1], b"1234"]}), "norm.scale", "unexpected"
    ),
    "shape": (
        lambda t: t["head.weight"].__setitem__(1, [64]), "head.weight",
        "expected shape [8, 8], got [64]",
    ),
    "scale shape": (
        lambda t: t[f"{FP4}.scale"].__setitem__(1, [4, 2]), f"{FP4}.scale",
        "expected shape [8, 1], got [4, 2]",
    ),
    "dtype": (
        lambda t: t["norm.weight"].__setitem__(0, "I16"), "norm.weight",
        "expected BF16 or F16 or F32, got I16",
    ),
    "FP4 attention": (
        lambda t: t[f"{FP8}.weight"].__setitem__(0, "I8"), f"{FP8}.weight", "got I8"
    ),
    "FP8 norm": (
        lambda t: t.update({"norm.weight": ["F8_E4M3", [8], bytearray(8)]}), "norm.weight",
        "got F8_E4M3",
    ),
    "FP4 with float scales": (float32_scales(f"{FP4}.scale", 1.0), f"{FP4}.scale", "got F32"),
    "E8M0 NaN": (set_bytes(f"{FP4}.scale", b"\xff"), f"{FP4}.weight", "E8M0 byte 255"),
    "E4M3 NaN": (set_bytes(f"{FP8}.weight", b"\x7f"), f"{FP8}.weight", "E4M3 code that is NaN"),
    "scale 0": (float32_scales(f"{FP8}.scale", 0.0), f"{FP8}.weight", "above 0, got 0.0"),
    "scale negative": (float32_scales(f"{FP8}.scale", -2.0), f"{FP8}.weight", "got -2.0"),
    "scale NaN": (float32_scales(f"{FP8}.scale", np.nan), f"{FP8}.weight", "got nan"),
    "scale inf": (float32_scales(f"{FP8}.scale", np.inf), f"{FP8}.weight", "got inf"),
    "overflow": (
        lambda t: (set_bytes(f"{FP8}.weight", b"\x7e")(t), set_bytes(f"{FP8}.scale", b"\xfe")(t)),
        f"{FP8}.weight", "expected finite values",
    ),
    "BF16 NaN": (set_bytes("norm.weight", b"\xc0\x7f"), "norm.weight", "expected finite values"),
    "BF16 inf": (set_bytes("norm.weight", b"\x80\xff"), "norm.weight", "expected finite values"),
    "F32 NaN": (
        set_bytes("layers.1.attn.attn_sink", b"\0\0\xc0\x7f"), "layers.1.attn.attn_sink",
        "expected finite values",
    ),
    "expert id": (
        set_bytes("layers.0.ffn.gate.tid2eid", b"\2"), "layers.0.ffn.gate.tid2eid",
        "expected ids of 2 experts, got 0 to 2",
    ),
    "negative expert": (
        set_bytes("layers.0.ffn.gate.tid2eid", b"\xff" * 8), "layers.0.ffn.gate.tid2eid", "got -1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE_FAULTS)
def test_each_fault_names_the_tensor_what_was_expected_and_what_came(case, released, tmp_path):
    edit, name, expected = SINGLE_FAULTS[case]
    folder = edited(released, tmp_path, edit)
    message = refusal(folder)
    assert f"tensor {name!r}" in message and expected in message
    # The same on the way to parameters, which reads other parts of the code.
    (folder / "config.json").write_bytes((released / "config.json").read_bytes())
    with pytest.raises(InputError) as caught:
        load_pretrained(folder)
    assert f"tensor {name!r}: expected" in str(caught.value) or str(caught.value) == message


def test_all_faults_of_names_shapes_and_dtypes_are_told_at_once(released, tmp_path):
    def edit(tensors: dict) -> None:
        for case in ("missing", "unexpected", "shape", "scale missing", "scale shape"):
            SINGLE_FAULTS[case][0](tensors)
        tensors["hc_head_base"][0] = "I32"

    with pytest.raises(CheckpointError) as caught:
        read_all(edited(released, tmp_path, edit))
    problems = caught.value.problems
    assert len(problems) == 6
    for name in ("norm.weight", "x", "head.weight", f"{FP8}.weight", f"{FP4}.scale"):
        assert sum(f"tensor {name!r}" in problem for problem in problems) == 1


def test_thousands_of_faults_make_a_short_message_and_a_whole_list(released, tmp_path):
    names = [f"x{i}" for i in range(5000)]
    folder = edited(
        released, tmp_path, lambda t: t.update({name: ["F32", [0], b""] for name in names})
    )
    with pytest.raises(CheckpointError, match="5000 wrong: .*and 4980 more") as caught:
        read_all(folder)
    assert len(caught.value.problems) == 5000


def test_a_file_cut_short_while_it_is_read_is_no_crash(released, tmp_path):
    """A memory map beyond the end of a file would kill the process when it is touched."""
    folder = tmp_path / "copy"
    shutil.copytree(released, folder)
    source = FileSource(folder, CONFIG)
    with open(folder / SHARD, "rb+") as file:
        file.truncate((folder / SHARD).stat().st_size // 2)
    with pytest.raises(InputError, match="cannot be read.*copy it again"):
        for tensor in source.tensors:
            source.read(tensor)


@functools.cache
def audited() -> list[str]:
    """Return the list that every file opened from now on is added to."""
    files: list[str] = []
    sys.addaudithook(lambda event, args: files.append(str(args[0])) if event == "open" else None)
    return files


def test_only_the_index_is_opened_when_it_is_bad(modules, tmp_path):
    """By the interpreter's own account, not by our functions."""
    folder, index = indexed(modules, tmp_path)
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    files = audited()
    files.clear()
    refusal(folder)
    assert not [path for path in files if path.endswith(".safetensors")]
    assert any(path.endswith(INDEX) for path in files)
