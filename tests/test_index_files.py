"""What an index, links and pickles may do to the loader: nothing."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import safetensors
import torch
from checkpoint_files import INDEX, SINGLE, Stored, joined
from checkpoint_reading import (
    EVIL_NAMES,
    GOOD,
    MODULES,
    RELEASED,
    read_all,
    refusal,
)

from dsv4_jax import InputError
from dsv4_jax.errors import shown

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
