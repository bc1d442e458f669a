"""Damaged files load whole or end in one line that says why, at little cost."""

from __future__ import annotations

import collections
import copy
import gc
import json
import os
import struct
import time
from collections.abc import Callable

import checkpoint_files as files
import numpy as np
import pytest
from checkpoint_files import CONFIG, INDEX, SINGLE, joined, memory_below
from checkpoint_reading import (
    EVIL_NAMES,
    GOOD,
    MODULES,
    RELEASED,
    check_loaded,
    checked,
    read_all,
    refusal,
)

from dsv4_jax import InputError
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.tensor_files import open_tensors
from dsv4_jax.errors import shown

# B1: fuzzed files. Some mutators change header and data and return the tensor that a message must
# name ("": any); the others change the bytes of a file.

BATCHES, FILES = 10, 1000  # batches, and files in each
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
            start = time.process_time()
            try:
                blocks = read_all(tmp_path)
            except InputError as error:
                message = checked(error, tmp_path)
                blocks, refused[made] = None, refused[made] + 1
                assert shown(name)[1:-1] in message, (made, name, message)
                if len(made) == 1 and made[0] in STRUCTURE and made[0] is not bad_metadata:
                    assert "tensor '" in message or 'tensor "' in message, (made, message)
            assert time.process_time() - start < 1, made
            if blocks is not None:
                check_loaded(blocks, whole)
            blocks = None  # each of its maps has a descriptor
    gc.collect()  # the frames of an error may still hold a map
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
        source = FileSource(folder, open_tensors(folder), CONFIG)
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
    start = time.process_time()
    with memory_below(1e9):
        if case in LOADED:
            read_all(tmp_path)
        else:
            refusal(tmp_path)
    assert time.process_time() - start < 5


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
    start = time.process_time()
    with memory_below(1e9):
        refusal(tmp_path)
    assert time.process_time() - start < 5


def test_a_file_of_a_gigabyte_is_not_read_as_an_index(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(1 << 30)
    with memory_below(10e6):
        assert "expected at most" in refusal(tmp_path)
