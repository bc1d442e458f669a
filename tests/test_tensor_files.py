"""What a checkpoint's files may do to the loader: load whole, or end in one line that says why."""

from __future__ import annotations

import collections
import copy
import functools
import json
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import safetensors
import torch
from checkpoint_files import CONFIG, INDEX, SINGLE, Stored, filled, joined, memory_below

from dsv4_jax import InputError
from dsv4_jax.convert import tensor_files
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.tensor_files import CheckpointError
from dsv4_jax.errors import shown
from dsv4_jax.quant import Block

RELEASED, MODULES = files.released(), files.modules()
LONGEST = 8000  # characters of a message without the folder, whatever is in the files


def read_all(folder: Path) -> dict[str, Block]:
    source = FileSource(folder, CONFIG)
    return {tensor.name: source.read(tensor) for tensor in source.tensors}


def checked(error: InputError, folder: Path) -> str:
    """Return a message, which must be one short line that names the folder."""
    message = str(error)
    assert str(folder) in message
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert len(message) < LONGEST + len(str(folder)) * (tensor_files.SHOWN + 1)
    return message


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_all(folder)
    return checked(caught.value, folder)


# B1: fuzzed files. Some mutators change header and data and return the tensor that a message must
# name ("": any); the others change the bytes of a file.

BATCHES, FILES = 10, 1000  # batches, and files in each
EVIL_NAMES = (
    "../../etc/passwd", "", "\0", "a\nb", "x" * 10_000, "\n" * 10_000, "norm.weight ", "\u202e",
    "layers.99.attn.wq_a.weight", "__metadata__2", "mtp.0.markov_head.weight", "'", "\x1b[31m",
)  # fmt: skip
EVIL_SIZES = (
    -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**4000, 1.5, 8.0, 1e300, "8", True,
    None, [], {}, [8], [[8]], [[[]]], "\n" * 300,
)  # fmt: skip
EVIL_DTYPES = (
    "F64", "BOOL", "F8_E5M2", "F4", "F6_E2M3", "C64", "X", "", "a\nb", "x" * 10_000, "\u2028", 3,
    None, [], {}, True, "f32",
)  # fmt: skip


def some_tensor(rng: np.random.Generator, header: dict) -> str:
    names = [name for name in header if name != "__metadata__"]
    return names[rng.integers(len(names))]


def choose(rng: np.random.Generator, values):
    return values[rng.integers(len(values))]


def bad_dtype(rng, header, data):
    name = some_tensor(rng, header)
    header[name]["dtype"] = choose(rng, EVIL_DTYPES)
    return name


def other_dtype(rng, header, data):
    """Another dtype of V4's checkpoints, with as many bytes at times."""
    info = header[name := some_tensor(rng, header)]
    others = {"F32": "I32", "BF16": "F16", "F8_E4M3": "F8_E8M0", "F8_E8M0": "U8", "I8": "F8_E4M3"}
    info["dtype"] = choose(rng, (others.get(info["dtype"], "I64"), "F32", "I8", "F8_E8M0", "BF16"))
    return name.rpartition(".")[0]  # its weight, where it is a scale


def bad_size(rng, header, data):
    info = header[name := some_tensor(rng, header)]
    info["shape"][rng.integers(len(info["shape"]))] = choose(rng, EVIL_SIZES)
    return name


def other_shape(rng, header, data):
    """The same bytes in another shape, or a shape that has more or fewer."""
    info = header[name := some_tensor(rng, header)]
    shape = info["shape"]
    info["shape"] = choose(
        rng, ([1, *shape], [*shape, 1], [*shape, 2], [0, *shape], [], [2**40, *shape], shape * 2),
    )  # fmt: skip
    return name


def no_shape(rng, header, data):
    name = some_tensor(rng, header)
    header[name]["shape"] = choose(rng, (None, 8, "8", {}, {"0": 8}, [None], [2**63, 2**63, 0]))
    return name


def bad_offset(rng, header, data):
    name = some_tensor(rng, header)
    header[name]["data_offsets"][rng.integers(2)] = choose(rng, EVIL_SIZES)
    return name


def no_offsets(rng, header, data):
    info = header[name := some_tensor(rng, header)]
    first, last = info["data_offsets"]
    info["data_offsets"] = choose(
        rng, (None, [], [first], [first, last, last], [last + 1, first], {}, "0", first)
    )
    return name


def moved_offset(rng, header, data):
    """A tensor longer or shorter than its shape says."""
    name = some_tensor(rng, header)
    header[name]["data_offsets"][rng.integers(2)] += int(choose(rng, (-9, -1, 1, 7)))
    return name


def shifted(rng, header, data):
    """A hole before a tensor and an overlap behind it, or the other way round."""
    offsets = header[some_tensor(rng, header)]["data_offsets"]
    offsets[:] = [offset + int(choose(rng, (1, 4096))) for offset in offsets]
    return ""


def all_shifted(rng, header, data):
    """A hole before the first tensor."""
    for info in header.values():
        info["data_offsets"] = [offset + 8 for offset in info["data_offsets"]]
    data += b"\0" * 8
    return ""


def overlapping(rng, header, data):
    """Two tensors on the same bytes."""
    one, other = header[some_tensor(rng, header)], header[some_tensor(rng, header)]
    same = one["data_offsets"] == other["data_offsets"]
    other["data_offsets"] = list(one["data_offsets"]) if not same else [0, 0]
    return ""


def renamed(rng, header, data):
    name, evil = some_tensor(rng, header), choose(rng, EVIL_NAMES)
    header[evil] = header.pop(name)
    return evil


def added(rng, header, data):
    evil = choose(rng, EVIL_NAMES)
    header[evil] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    return evil


def dropped(rng, header, data):
    """A tensor less, with or without its bytes."""
    name = some_tensor(rng, header)
    first, last = header.pop(name)["data_offsets"]
    if rng.random() < 0.5:
        return ""  # the hole is found at the next one
    del data[first:last]
    for info in header.values():
        if info["data_offsets"][0] >= last:
            info["data_offsets"] = [offset - (last - first) for offset in info["data_offsets"]]
    return name.removesuffix("scale")  # a weight misses its scale


def missing_field(rng, header, data):
    name = some_tensor(rng, header)
    del header[name][choose(rng, ("dtype", "shape", "data_offsets"))]
    return name


def extra_field(rng, header, data):
    header[some_tensor(rng, header)][choose(rng, EVIL_NAMES)] = choose(rng, (1, None, {"a": [{}]}))
    return ""


def no_entry(rng, header, data):
    name = some_tensor(rng, header)
    header[name] = choose(rng, (None, 1, "x\n" * 5000, [], {}, True, [[]], 1.5))
    return name


def bad_metadata(rng, header, data):
    header["__metadata__"] = choose(
        rng, (None, 1, [], "x", {"a": 1}, {"a": None}, {"a": {}}, {"x": "y\n" * 1000}, {"": ""})
    )
    return ""


def swapped(rng, header, data):
    """The bytes of one tensor under the name of another."""
    one, other = some_tensor(rng, header), some_tensor(rng, header)
    header[one], header[other] = header[other], header[one]
    return ""


def swapped_data(rng, header, data):
    half = len(data) // 2
    data[:] = data[half:] + data[:half]
    return ""


def not_finite(rng, header, data):
    """NaN, infinity, an E8M0 NaN, or an id that is none; in FP4 all is finite."""
    names = [name for name, info in header.items() if info["dtype"] != "I8"]
    first, last = header[name := choose(rng, names)]["data_offsets"]
    noise = choose(rng, (b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\x80\xff" * 4, b"\x80\x7f" * 4))
    data[first : last if header[name]["dtype"] == "F8_E8M0" else first + 8] = (
        b"\xff" * (last - first) if header[name]["dtype"] == "F8_E8M0" else noise[: last - first]
    )
    return name.removesuffix("scale") if header[name]["dtype"] != "F8_E4M3" else ""


def noise(rng, header, data):
    place = int(rng.integers(len(data)))
    data[place : place + 8] = rng.bytes(len(data[place : place + 8]))
    return ""


STRUCTURE = (
    bad_dtype, other_dtype, bad_size, other_shape, no_shape, bad_offset, no_offsets, moved_offset,
    shifted, all_shifted, overlapping, renamed, added, dropped, missing_field, extra_field,
    no_entry, bad_metadata, swapped, swapped_data, not_finite, noise,
)  # fmt: skip


def split(whole: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[8 : 8 + length], whole[8 + length :]


def truncated(rng, whole):
    return whole[: rng.integers(len(whole))]


def last_bytes_cut(rng, whole):
    """The header is whole: a memory map of the claimed bytes would go beyond the file's end."""
    return whole[: -int(rng.integers(1, 64))]


def extended(rng, whole):
    return whole + rng.bytes(int(rng.integers(1, 5000)))


def flipped_bits(rng, whole):
    changed, length = bytearray(whole), len(split(whole)[0])
    for place in rng.integers(choose(rng, (8, length, len(whole))), size=rng.integers(1, 5)):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


def wrong_length(rng, whole):
    (right,) = struct.unpack("<Q", whole[:8])
    lengths = (0, 1, 2, 7, right - 8, right + 8, len(whole), 2**31, 2**32, 2**63, 2**64 - 1)
    return struct.pack("<Q", choose(rng, lengths)) + whole[8:]


def bad_text(rng, whole):
    text, data = split(whole)
    place = rng.integers(len(text.rstrip()))
    piece = choose(rng, (b"\xff", b"\0", b"{", b"[" * 3000, b'"', b"\xed\xa0\x80", b"\\", b","))
    return joined(text[:place] + piece + text[place:], data)


def lone_surrogate(rng, whole):
    text, data = split(whole)
    return joined(text.replace(b'"norm', b'"\\ud800norm').replace(b'.w1', b".w1\\udfff"), data)


def other_encoding(rng, whole):
    text, data = split(whole)
    encodings = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp037")
    return joined(text.decode().encode(choose(rng, encodings)), data)


def duplicate_key(rng, whole):
    """The library takes the last of two equal names without a word."""
    text, data = split(whole)
    header = json.loads(text)
    name = some_tensor(rng, header)
    twice = json.dumps({name: header[some_tensor(rng, header)]})
    return joined(twice[:-1].encode() + b", " + text[1:], data)


def duplicate_field(rng, whole):
    text, data = split(whole)
    field = choose(rng, (b'"dtype": "F32", ', b'"shape": [8], ', b'"x": 1, "x": 2, '))
    return joined(text.replace(b'"dtype"', field + b'"dtype"', 1), data)


def odd_start(rng, whole):
    """Data that begin anywhere: every number lies across words."""
    text, data = split(whole)
    text = text.rstrip() + b" " * int(rng.integers(8))
    return struct.pack("<Q", len(text)) + text + data


def no_file_of_tensors(rng, whole):
    choices = (b"", b"\0" * 7, b"\0" * 8, b"\2" + b"\0" * 7 + b"{}", b"\x80\x04N.", rng.bytes(500))
    return choose(rng, choices)


ON_BYTES = (
    truncated, last_bytes_cut, extended, flipped_bits, wrong_length, bad_text, lone_surrogate,
    other_encoding, duplicate_key, duplicate_field, odd_start, no_file_of_tensors,
)  # fmt: skip
HARMLESS = {extra_field, odd_start}  # where nothing else is done
TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def numbers(stored: dict) -> np.ndarray:
    """Return what the library read, as float64, by torch's account of the formats."""
    data, shape = bytearray(stored["data"]), stored["shape"]
    if stored["dtype"] in ("I8", "U8"):
        halves = torch.frombuffer(data, dtype=torch.uint8).numpy()
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[np.stack([halves & 7, halves >> 4 & 7])]
        return values.max(axis=0).reshape(shape)  # magnitudes: are they finite?
    if stored["dtype"] == "F8_E8M0":
        bits = torch.frombuffer(data, dtype=torch.uint8).numpy().astype(np.float64)
        return np.where(bits == 255, np.nan, 2.0 ** (bits - 127)).reshape(shape)
    values = torch.frombuffer(data, dtype=TORCH_DTYPES[stored["dtype"]])
    return values.double().numpy().reshape(shape)


def check_loaded(blocks: dict[str, Block], whole: bytes) -> None:
    """Check that what was read is what the library reads, and that all of it is valid."""
    stored = dict(safetensors.deserialize(whole))
    held = [part for b in blocks.values() for part in (b.values, b.scales) if part is not None]
    assert len(stored) == len(held)
    largest = float(np.finfo(np.float32).max)
    for name, block in blocks.items():
        assert block.values.tobytes() == stored[name]["data"]
        values = numbers(stored[name])
        if block.form:
            scale = stored[name.removesuffix("weight") + "scale"]
            assert block.scales.tobytes() == scale["data"]
            assert np.all(numbers(scale) > 0)
            values = values * numbers(scale)  # here a row or a matrix has one scale
        assert np.all(np.abs(values) <= largest), name
        if name.endswith("tid2eid"):
            assert np.all((values >= 0) & (values < CONFIG.n_routed_experts))


def damaged(rng: np.random.Generator) -> tuple[bytes, tuple[Callable, ...], str]:
    """Return a bad file, what was done to it, and a name that a refusal must have in it."""
    header, data = copy.deepcopy(GOOD[0]), bytearray(GOOD[1])
    kind = rng.random()
    made, name = [], ""
    if kind < 0.75:
        made.append(choose(rng, STRUCTURE))
        name = made[0](rng, header, data)
    whole = joined(header, bytes(data))
    if kind > 0.45:
        made.append(choose(rng, ON_BYTES))
        return made[-1](rng, whole), tuple(made), ""
    return whole, tuple(made), name


GOOD = files.parts(RELEASED)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_fuzzed_file_loads_whole_or_is_refused_in_one_line(batch, tmp_path):
    """10,000 files. None crashes, hangs, takes memory or descriptors, or loads what is not so."""
    rng, path, refused = np.random.default_rng(batch), tmp_path / SINGLE, collections.Counter()
    path.write_bytes(joined(*GOOD))
    check_loaded(read_all(tmp_path), path.read_bytes())
    opened = len(os.listdir("/proc/self/fd"))
    with memory_below(200e6):
        for _ in range(FILES):
            whole, made, name = damaged(rng)
            path.write_bytes(whole)
            start = time.perf_counter()
            try:
                blocks = read_all(tmp_path)
            except InputError as error:
                message = checked(error, tmp_path)
                blocks, refused[made] = None, refused[made] + 1
                assert shown(name)[1:-1] in message, (made, name, message)
                if len(made) == 1 and made[0] in STRUCTURE and made[0] is not bad_metadata:
                    assert "tensor '" in message or 'tensor "' in message, (made, message)
            assert time.perf_counter() - start < 1, made
            if blocks is not None:
                check_loaded(blocks, whole)
            blocks = None  # each of its maps has a descriptor
    assert len(os.listdir("/proc/self/fd")) <= opened
    found = {made for made, *other in refused if not other}
    assert found | {noise} == {*STRUCTURE, *ON_BYTES} - HARMLESS  # noise is seldom not finite


def test_a_map_never_goes_beyond_the_end_of_a_file_cut_after_it_was_opened(tmp_path):
    """It would be a SIGBUS, which no Python code survives."""
    folder = files.write_single(tmp_path / "cut", RELEASED)
    path = folder / SINGLE
    whole = path.read_bytes()
    for kept in (*range(len(whole) - 70, len(whole)), 8192, 4097, 4096, 4095, 1, 0):
        path.write_bytes(whole)
        source = FileSource(folder, CONFIG)
        os.truncate(path, kept)
        with pytest.raises(InputError, match="cannot be read.*copy it again") as caught:
            for tensor in source.tensors:
                source.read(tensor)
        checked(caught.value, folder)


# B2: headers and index files that would cost time and memory.


def with_extra(text: Callable[[], str]) -> Callable[[], bytes]:
    """Put something large where the library passes over it."""

    def build() -> bytes:
        header, data = files.parts(RELEASED)
        last = json.dumps(header)
        return joined((last[:-2] + ', "extra": ' + text() + "}}").encode(), data)

    return build


def with_header(edit: Callable[[dict], object]) -> Callable[[], bytes]:
    def build() -> bytes:
        header, data = files.parts(RELEASED)
        edit(header)
        return joined(header, data)

    return build


MANY = 31_000_000  # bytes, just below the largest header
HEADER_BOMBS = {
    "objects": with_extra(lambda: "[" + "{}," * (MANY // 3) + "0]"),
    "lists": with_extra(lambda: "[" + "[]," * (MANY // 3) + "0]"),
    "texts": with_extra(lambda: "[" + '"ab",' * (MANY // 5) + "0]"),
    "keys": with_extra(lambda: "{" + ",".join(f'"{i:x}":0' for i in range(MANY // 10)) + "}"),
    "equal keys": with_extra(lambda: "{" + '"a":0,' * (MANY // 6) + '"b":0}'),
    "digits": with_extra(lambda: "9" * MANY),
    "digits after the point": with_extra(lambda: "0." + "9" * MANY),
    "exponent": with_extra(lambda: "1e" + "9" * MANY),
    "escapes": with_extra(lambda: '"' + "\\u0000" * (MANY // 6) + '"'),
    "a million keys": with_header(
        lambda h: h.update(__metadata__={f"{i:x}": "" for i in range(10**6)})
    ),
    "dimensions": with_header(
        lambda h: h["norm.weight"].update(shape=[*h["norm.weight"]["shape"], *[1] * 10**6])
    ),
    "huge dimensions": with_header(lambda h: h["norm.weight"].update(shape=[2**63] * 10**6)),
    "a long dtype": with_header(lambda h: h["norm.weight"].update(dtype="\n" * 10**7)),
    "a long entry": with_header(lambda h: h.update({"norm.weight": "\n" * 10**7})),
    "long names": with_header(
        lambda h: h.update(
            {f"{i}" + "\n" * 10_000: h["norm.weight"] | {"data_offsets": [0, 0], "shape": [0]}
             for i in range(1000)}
        )
    ),
}  # fmt: skip
LOADED = {"a million keys", "digits after the point", "escapes"}  # and the library does so too


@pytest.mark.parametrize("case", HEADER_BOMBS)
def test_a_header_bomb_costs_little(case, tmp_path):
    (tmp_path / SINGLE).write_bytes(HEADER_BOMBS[case]())
    start = time.perf_counter()
    with memory_below(1e9):
        if case in LOADED:
            read_all(tmp_path)
        else:
            refusal(tmp_path)
    assert time.perf_counter() - start < 5


def weight_map(pairs: Callable[[], str]) -> Callable[[], str]:
    return lambda: '{"weight_map": {' + pairs() + "}}"


INDEX_BOMBS = {
    "objects": lambda: '{"weight_map": [' + "{}," * 20_000_000 + "0]}",
    "keys": weight_map(lambda: ",".join(f'"{i:x}":""' for i in range(5_000_000))),
    "texts": lambda: '{"weight_map": [' + '"abc",' * 10_000_000 + "0]}",
    "a million tensors": weight_map(
        lambda: ",".join(f'"{i}":"model-00001-of-00003.safetensors"' for i in range(10**6))
    ),
    "a million shards": weight_map(
        lambda: ",".join(f'"{i}":"{i}.safetensors"' for i in range(10**6))
    ),
    "long names": weight_map(
        lambda: ",".join(f'"{i}{"x" * 9999}":"{i}{"x" * 9999}.safetensors"' for i in range(3000))
    ),
    "deep": lambda: "[" * 60_000_000,
    "digits": lambda: '{"metadata": {"total_size": ' + "9" * 60_000_000,
    "digits after the point": lambda: '{"weight_map": {}, "x": 0.' + "9" * 60_000_000 + "}",
}


@pytest.mark.parametrize("case", INDEX_BOMBS)
def test_an_index_bomb_costs_little(case, tmp_path):
    files.write_sharded(tmp_path, MODULES)
    (tmp_path / INDEX).write_text(INDEX_BOMBS[case]())
    start = time.perf_counter()
    with memory_below(1e9):
        refusal(tmp_path)
    assert time.perf_counter() - start < 5


def test_a_file_of_a_gigabyte_is_not_read_as_an_index(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(1 << 30)
    with memory_below(10e6):
        assert "expected at most" in refusal(tmp_path)


# B3: index files.


@functools.cache
def audited() -> list[tuple]:
    """Return the list to which the interpreter adds what is opened and unpickled from now on."""
    seen: list[tuple] = []
    watched = ("open", "pickle.find_class", "ctypes.dlopen")
    sys.addaudithook(lambda event, args: seen.append((event, *args)) if event in watched else None)
    return seen


def opened_shards() -> list[str]:
    names = [str(path) for event, path, *_ in audited() if event == "open"]
    return [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]


def make_odd_files(folder: Path) -> None:
    """Put things beside the shards that an index may name and must not."""
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")  # reading it would wait for ever
    (folder / "a\nb.safetensors").write_bytes(joined({}, b""))
    (folder / "a\u2028b.safetensors").write_bytes(joined({}, b""))
    for name, target in {
        "out": "/etc/passwd", "zero": "/dev/zero", "loop": "loop.safetensors", "gone": "nothing",
        "up": "../secret.safetensors", "to folder": "folder.safetensors", "to here": ".",
    }.items():  # fmt: skip
        (folder / f"{name}.safetensors").symlink_to(target)
    (folder.parent / "secret.safetensors").write_bytes(joined({}, b""))
    for name in ("pytorch_model.bin", "model.pt", "shard", "weights.SAFETENSORS"):
        (folder / name).write_bytes(joined({}, b""))


SHARD_NAMES = (
    "../secret.safetensors", "../../etc/passwd", "/etc/passwd", "./x.safetensors", "", ".", "..",
    "x/y.safetensors", "x\\y.safetensors", "C:\\x.safetensors", "\\\\host\\x.safetensors",
    "https://host/x.safetensors", "file:///x.safetensors", "~/x.safetensors", "a\0b.safetensors",
    "x.safetensors\0", "missing.safetensors", ".safetensors", "x" * 5000 + ".safetensors",
    "\ud800.safetensors", "\udcff.safetensors", "a\nb.safetensors", "a\u2028b.safetensors",
    "\n" * 5000 + ".safetensors", "folder.safetensors", "pipe.safetensors", "out.safetensors",
    "zero.safetensors", "loop.safetensors", "gone.safetensors", "up.safetensors",
    "to folder.safetensors", "to here.safetensors", "pytorch_model.bin", "model.pt", "shard",
    "weights.SAFETENSORS", "model-00001-of-00003.safetensors/", "model-00001-of-00003.safetensors ",
    "%2e%2e/secret.safetensors", INDEX, "$HOME.safetensors", "*.safetensors",
)  # fmt: skip
NO_NAMES = (None, 1, 1.5, True, [], {}, ["model-00001-of-00003.safetensors"], {"a": "b"})
NO_METADATA = ([], 0, "", False, 1, [1], "x", [[]])
TOTALS = (
    -1, 2**31, 2**63, 2**64, 10**4000, 1.5, 0.0, 8892.0, 1e300, "8892", "", True, False, [], {},
    [8892],
)  # fmt: skip


def index_texts(index: dict) -> dict[str, bytes]:
    """Return index files that are no JSON, or JSON of another kind."""
    good = json.dumps(index).encode()
    total = str(index["metadata"]["total_size"]).encode()
    return {
        "empty": b"", "blank": b"  ", "cut": good[:-1], "half": good[: len(good) // 2],
        "more": good + b"x", "twice": good + good, "BOM": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"), "UTF-32": good.decode().encode("utf-32-le"),
        "Latin-1": good[:-1] + b', "\xe9": 1}', "NUL": b"\0" + good, "a comma": good[:-1] + b",}",
        "quotes": good.replace(b'"', b"'"), "list": b"[" + good + b"]",
        "text": json.dumps(good.decode()).encode(), "pickle": pickle.dumps(index),
        "null": b"null", "number": b"1", "NaN": b"NaN", "object": b"{}",
        "deep list": b"[" * 10**5, "deep object": b'{"a":' * 10**5,
        "deep value": good[:-1] + b', "x":' + b"[" * 10**5,
        "digits": good.replace(total, b"9" * 5001), "inf": good.replace(total, b"1e5000"),
        "no map": b'{"metadata": {}}', "map of map": b'{"weight_map": ' + good + b"}",
        "two maps": good[:-1] + b', "weight_map": {}}',
        "equal keys": good[:-1] + b', "metadata": {}}',
        "equal names": good.replace(b'_map": {', b'_map": {"norm": "x", "norm": "x", '),
    }  # fmt: skip


def changed(index: dict, **edits) -> bytes:
    """Return an index with tensors moved, or with another total_size or metadata."""
    index = copy.deepcopy(index)
    index["weight_map"] |= edits.get("moved", {})
    if "total" in edits:
        index["metadata"]["total_size"] = edits["total"]
    return json.dumps(index | edits.get("top", {})).encode()


def bad_indices(index: dict) -> dict[str, bytes]:
    """Return over 300 index files that are wrong in themselves."""
    names = list(index["weight_map"])
    cases = {f"text: {case}": text for case, text in index_texts(index).items()}
    for place in (0, len(names) // 4, len(names) // 2, len(names) - 2, len(names) - 1):
        for value in (*SHARD_NAMES, *NO_NAMES):
            moved = {names[place]: value}
            cases[f"{place}: {str(value)[:30]!r} {type(value)}"] = changed(index, moved=moved)
    cases |= {f"total: {str(v)[:9]} {type(v)}": changed(index, total=v) for v in TOTALS}
    for value in NO_METADATA:
        cases[f"metadata: {value!r}"] = changed(index, top={"metadata": value})
    for value in (None, [], 1, "x", list(names), [list(index["weight_map"].items())]):
        cases[f"map: {str(value)[:9]}"] = changed(index, top={"weight_map": value})
    every = dict.fromkeys(names, "missing.safetensors")
    cases["all elsewhere"] = changed(index, moved=every)
    return cases


def test_an_index_that_is_wrong_is_refused_before_a_shard_is_opened(tmp_path):
    """By the interpreter's own account of what is opened."""
    folder = tmp_path / "folder"
    index = files.write_sharded(folder, MODULES)
    make_odd_files(folder)
    cases = bad_indices(index)
    assert len(cases) > 300
    for case, text in cases.items():
        (folder / INDEX).write_bytes(text)
        audited().clear()
        refusal(folder)
        assert not opened_shards(), case
    (folder / INDEX).write_bytes(changed(index))
    audited().clear()
    read_all(folder)
    assert len(opened_shards()) > 3  # the account is not empty where shards are opened


def test_an_index_and_its_shards_must_agree(tmp_path):
    index = files.write_sharded(tmp_path, MODULES)
    names, shards = list(index["weight_map"]), sorted(set(index["weight_map"].values()))

    def told(text: bytes) -> str:
        (tmp_path / INDEX).write_bytes(text)
        return refusal(tmp_path)

    for name in names[::7]:
        here = index["weight_map"][name]
        there = next(shard for shard in shards if shard != here)
        message = told(changed(index, moved={name: there}))
        assert f"tensor {name!r}: expected in {there!r}" in message
        assert f"got it in {here}" in message
        less = {key: shard for key, shard in index["weight_map"].items() if key != name}
        assert f"tensor {name!r}: expected in no shard" in told(
            changed(index, top={"weight_map": less})
        )
    for name in EVIL_NAMES:
        message = told(changed(index, moved={name: shards[0]}))
        assert f"tensor {shown(name)}: expected in {shards[0]!r}" in message
    total = index["metadata"]["total_size"]
    for lie in (0, 1, total - 1, total + 1, total + 100):
        assert f"total_size: expected the tensors' {total} bytes, got {lie};" in told(
            changed(index, total=lie)
        )
    (tmp_path / INDEX).write_bytes(changed(index, top={"metadata": None}))
    read_all(tmp_path)


def test_an_index_that_is_no_plain_file_is_refused(tmp_path):
    index = files.write_sharded(tmp_path / "folder", MODULES)
    path = tmp_path / "folder" / INDEX
    (tmp_path / "elsewhere.json").write_text(json.dumps(index))
    makers = (
        lambda: path.mkdir(), lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("../elsewhere.json"), lambda: path.symlink_to("nothing"),
        lambda: path.symlink_to(INDEX), lambda: path.symlink_to("."),
    )  # fmt: skip
    for make in makers:
        path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()
        make()
        audited().clear()
        assert INDEX in refusal(tmp_path / "folder")
        assert not opened_shards()


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read: .*File name too long"):
        read_all(tmp_path / ("x" * 5000))
    files.write_sharded(tmp_path, MODULES)

    def fail(*args, **kwargs) -> None:
        raise PermissionError(13, "Permission denied", "secret\n" * 1000)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        assert "cannot be read" in refusal(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors, "safe_open", fail)
        assert "model-00001-of-00003.safetensors" in refusal(tmp_path)
    read_all(tmp_path)


def cached(root: Path, model: str = "models--x", revision: str = "abc") -> tuple[Path, Path]:
    """Make a checkpoint as the Hugging Face cache lays it out: links to files named by hashes."""
    blobs, snapshot = root / model / "blobs", root / model / "snapshots" / revision
    files.write_sharded(blobs, MODULES)
    snapshot.mkdir(parents=True)
    for path in sorted(blobs.iterdir()):
        target = path.rename(blobs / f"{hash(path.name) & 0xFFFFFFFF:08x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{target.name}")
    return blobs, snapshot


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    _, snapshot = cached(tmp_path)
    plain = tmp_path / "plain"
    files.write_sharded(plain, MODULES)
    expected, found = read_all(plain), read_all(snapshot)
    assert all(np.array_equal(found[name].values, expected[name].values) for name in expected)
    (tmp_path / "link").symlink_to(snapshot)
    read_all(tmp_path / "link")  # the folder itself may be a link
    shard = "model-00001-of-00003.safetensors"
    (plain / shard).rename(plain / "file")
    (plain / shard).symlink_to("file")
    read_all(plain)  # and a file may be one to its own folder


def test_links_that_only_look_like_those_of_the_cache_are_refused(tmp_path):
    blobs, snapshot = cached(tmp_path)
    other_blobs, other = cached(tmp_path, "models--y")
    name = "model-00001-of-00003.safetensors"
    path, blob = snapshot / name, (snapshot / name).resolve()
    inner = blobs / "inner"
    inner.mkdir()
    (inner / blob.name).write_bytes(blob.read_bytes())
    (tmp_path / "outside").write_bytes(blob.read_bytes())
    (blobs / "leads out").symlink_to(tmp_path / "outside")
    for target in (
        other_blobs / (other / name).resolve().name, other / name, inner / blob.name,
        tmp_path / "outside", blobs / "leads out", blobs, "../../../outside", "/dev/zero",
    ):  # fmt: skip
        path.unlink()
        path.symlink_to(target)
        audited().clear()
        assert name in refusal(snapshot)
        assert not opened_shards()
    moved = tmp_path / "models--x" / "revisions" / "abc"
    moved.mkdir(parents=True)
    for link in snapshot.iterdir():
        (moved / link.name).symlink_to(f"../../blobs/{(other / link.name).resolve().name}")
    assert "link out of it" in refusal(moved)


@pytest.mark.parametrize("name", ["a\nb.safetensors", "\x1b[31m.safetensors", "\udcff.safetensors"])
def test_a_name_that_would_break_a_message_up_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(joined(*GOOD))
    assert f"{name!r}: expected the name of a file" in refusal(tmp_path)


# B6: pickles.


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def payloads(canary: Path, folder: Path) -> dict[str, bytes]:
    """Return pickles as programs write them, and files that are several things at once."""
    plain = pickle.dumps({"weight": Canary(canary)})
    found = {f"protocol {n}": pickle.dumps(Canary(canary), n) for n in range(6)}
    for case, zipped in {"torch": True, "torch of old": False}.items():
        path = folder / case
        torch.save({"x": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
        found[case] = path.read_bytes()
    with open(folder / "x.npy", "wb") as file:
        np.save(file, np.array([Canary(canary)], object), allow_pickle=True)
    found["npy"] = (folder / "x.npy").read_bytes()
    good = joined(*GOOD)
    found |= {"before": plain + good, "after": good + plain, "archive after": good + found["torch"]}
    length = struct.pack("<Q", len(plain))
    found["as a header"] = length + plain + good
    extra = RELEASED | {"data.pkl": Stored("U8", (len(plain),), plain)}
    found["as a tensor"] = joined(*files.parts(extra))
    return found


PICKLE_NAMES = (
    SINGLE, "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl",
    "model.pickle", "model.npy", "model.npz",
)  # fmt: skip


@pytest.mark.parametrize("name", PICKLE_NAMES)
def test_no_pickle_is_ever_loaded(name, tmp_path):
    canary = tmp_path / "canary"
    cases = payloads(canary, tmp_path)
    for case, payload in cases.items():
        folder = tmp_path / f"{case} folder"
        folder.mkdir()
        (folder / name).write_bytes(payload)
        if name != SINGLE:
            (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        audited().clear()
        message = refusal(folder)
        assert not [event for event, *_ in audited() if event != "open"]
        if name != SINGLE:
            assert f"got {name}, a pickle" in message and "save it as safetensors" in message
            assert not [path for event, path, *_ in audited() if str(path).endswith(name)]
        elif case == "as a tensor":
            assert "tensor 'data.pkl': unexpected" in message
        assert not canary.exists()
    pickle.loads(cases["protocol 4"])
    assert canary.exists()  # the payload would have worked


@pytest.mark.parametrize("name", PICKLE_NAMES[1:])
def test_an_index_leads_to_no_pickle(name, tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "folder"
    index = files.write_sharded(folder, MODULES)
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    for moved in ({"lm_head.weight": name}, dict.fromkeys(index["weight_map"], name)):
        (folder / INDEX).write_bytes(changed(index, moved=moved))
        audited().clear()
        assert f"{name!r}: expected a .safetensors file" in refusal(folder)
        assert not opened_shards() and not canary.exists()


def test_a_pickle_among_the_weights_is_weights(tmp_path):
    """Bytes of a tensor are numbers, whatever a file scanner would make of them."""
    canary, tensors = tmp_path / "canary", dict(RELEASED)
    name = "layers.0.ffn.experts.1.w2.weight"
    payload = pickle.dumps(Canary(Path("c")))
    size = len(tensors[name].data)
    tensors[name] = tensors[name]._replace(data=(payload + bytes(size))[:size])
    audited().clear()
    blocks = read_all(files.write_single(tmp_path / "folder", tensors))
    assert blocks[name].values.tobytes().startswith(payload[:size])
    assert not [event for event, *_ in audited() if event != "open"] and not canary.exists()


# Strictness: one fault is one problem, which names the tensor, what was expected and what came.

Fault = tuple[Callable[[dict[str, Stored]], object], str, str]  # edit, tensor, what is told


def put(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({name: filled(dtype, shape)})


def end_with(name: str, values: bytes) -> Callable[[dict], object]:
    """Change the last bytes of a tensor: those of the last expert of a stack."""

    def edit(tensors: dict[str, Stored]) -> None:
        data = tensors[name].data
        tensors[name] = tensors[name]._replace(data=data[: -len(values)] + values)

    return edit


STACK, TABLE = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.tid2eid"
NORM, QUERY = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_a_proj.weight"
FP8, FP4, IDS = "layers.0.attn.wq_a.weight", "layers.1.ffn.experts.1.w2.weight", (
    "layers.0.ffn.gate.tid2eid"
)  # fmt: skip
HEADER_FAULTS: dict[str, Fault] = {
    "norm missing": (lambda t: t.pop(NORM), NORM, "missing"),
    "stack missing": (lambda t: t.pop(STACK), STACK, "missing"),
    "expert too many": (put(STACK, "BF16", (3, 16, 8)), STACK, "[2, 16, 8], got [3, 16, 8]"),
    "half an expert": (put(STACK, "BF16", (2, 8, 8)), STACK, "[2, 16, 8], got [2, 8, 8]"),
    "stack laid flat": (put(STACK, "BF16", (32, 8)), STACK, "[2, 16, 8], got [32, 8]"),
    "rows and columns": (put(QUERY, "BF16", (8, 4)), QUERY, "expected shape [4, 8], got [8, 4]"),
    "norm of F64": (put(NORM, "I64", (8,)), NORM, "expected BF16 or F16 or F32, got I64"),
    "table of floats": (put(TABLE, "BF16", (8, 1)), TABLE, "expected I64 or I32, got BF16"),
    "table of bytes": (put(TABLE, "U8", (8, 1)), TABLE, "expected I64 or I32, got U8"),
    "FP8 without scales": (put(QUERY, "F8_E4M3", (4, 8)), QUERY, "expected its scales as"),
    "scales of BF16": (
        put("model.layers.0.self_attn.q_a_proj.weight_scale_inv", "F8_E8M0", (1, 1)),
        "model.layers.0.self_attn.q_a_proj.weight_scale_inv", "unexpected",
    ),
    "layer too many": (
        put(NORM.replace("0", "2"), "BF16", (8,)), NORM.replace("0", "2"), "unexpected"
    ),
}  # fmt: skip
HEADER_FAULTS_OF_RELEASED: dict[str, Fault] = {
    "FP8 missing, scale left": (lambda t: t.pop(FP8), FP8, "missing"),
    "FP4 missing, scale left": (lambda t: t.pop(FP4), FP4, "missing"),
    "FP8 of another kind": (put(FP8, "F8_E5M2", (4, 8)), FP8, "got F8_E5M2"),
    "FP8 as integers": (put(FP8, "I64", (4, 8)), FP8, "got I64"),
    "FP8 as FP4": (put(FP8, "I8", (4, 4)), FP8, "expected F8_E4M3 or BF16 or F16 or F32, got I8"),
    "scale in BF16": (
        put(FP8.replace("weight", "scale"), "BF16", (1, 1)), FP8.replace("weight", "scale"),
        "expected F8_E8M0 or F32, got BF16",
    ),
    "scale too many": (
        put(FP4.replace("weight", "scale"), "F8_E8M0", (8, 2)), FP4.replace("weight", "scale"),
        "expected shape [8, 1], got [8, 2]",
    ),
    "FP4 not packed": (put(FP4, "I8", (8, 8)), FP4, "expected shape [8, 4], got [8, 8]"),
    "table as FP4": (put(IDS, "I8", (8, 1)), IDS, "expected I64 or I32, got I8"),
}  # fmt: skip
VALUE_FAULTS: dict[str, Fault] = {
    "NaN": (end_with(NORM, b"\xc0\x7f"), NORM, "expected finite values, got NaN"),
    "inf": (end_with(NORM, b"\x80\x7f"), NORM, "expected finite values, got NaN or infinity"),
    "-inf of the last expert": (end_with(STACK, b"\x80\xff"), STACK, "expected finite values"),
    "F16": (
        lambda t: (put(NORM, "F16", (8,))(t), end_with(NORM, b"\x00\x7c")(t)), NORM,
        "expected finite values",
    ),
    "F32": (
        lambda t: (put(QUERY, "F32", (4, 8))(t), end_with(QUERY, b"\x00\x00\x80\xff")(t)), QUERY,
        "expected finite values",
    ),
    "id": (end_with(TABLE, struct.pack("<q", 2)), TABLE, "expected ids of 2 experts, got"),
    "negative id": (end_with(TABLE, struct.pack("<q", -1)), TABLE, "got -1 to"),
    "smallest id": (end_with(TABLE, struct.pack("<q", -(2**63))), TABLE, f"got {-(2**63)} to"),
    "id in 32 bits": (
        lambda t: (put(TABLE, "I32", (8, 1))(t), end_with(TABLE, struct.pack("<i", 2**31 - 1))(t)),
        TABLE, f"to {2**31 - 1}",
    ),
}  # fmt: skip
FAULTS = {case: (MODULES, *fault) for case, fault in {**HEADER_FAULTS, **VALUE_FAULTS}.items()}
FAULTS |= {case: (RELEASED, *fault) for case, fault in HEADER_FAULTS_OF_RELEASED.items()}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_problem(case, tmp_path):
    """And not another one of the scales that a tensor has or lacks."""
    tensors, edit, name, told = FAULTS[case]
    tensors = dict(tensors)
    edit(tensors)
    with pytest.raises(InputError) as caught:
        read_all(files.write_single(tmp_path, tensors))
    message = checked(caught.value, tmp_path)
    problems = getattr(caught.value, "problems", (message,))
    assert len(problems) == 1 and told in message
    assert f"tensor {name!r}: " in problems[0]


def test_all_faults_are_told_at_once(tmp_path):
    tensors = dict(MODULES)
    cases = ("norm missing", "half an expert", "rows and columns", "table of bytes",
             "layer too many")  # fmt: skip
    for case in cases:
        HEADER_FAULTS[case][0](tensors)
    evil = [name for name in EVIL_NAMES if not name.startswith("mtp.")]  # that is told alone
    tensors |= {name: filled("F32", (1,)) for name in evil}
    with pytest.raises(CheckpointError) as caught:
        read_all(files.write_single(tmp_path, tensors))
    checked(caught.value, tmp_path)
    assert len(caught.value.problems) == len(cases) + len(evil)
    for case in cases:
        _, name, told = HEADER_FAULTS[case]
        assert sum(f"tensor {name!r}: " in p and told in p for p in caught.value.problems) == 1


def test_good_checkpoints_load_in_either_naming_and_every_admitted_dtype(tmp_path):
    """The faults above are told of these very files."""
    read_all(files.write_single(tmp_path / "modules", MODULES))
    for dtype in ("BF16", "F16", "F32"):
        tensors = {
            name: filled("I32" if stored.dtype == "I64" else dtype, stored.shape)
            for name, stored in MODULES.items()
        }
        read_all(files.write_single(tmp_path / dtype, tensors))
    check_loaded(read_all(files.write_single(tmp_path / "released", RELEASED)), joined(*GOOD))
