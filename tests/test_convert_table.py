"""The table names every tensor of the released checkpoints once and covers every weight once."""

from __future__ import annotations

import collections
import json
import math
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_parity import FLASH_LIKE

from dsv4_jax import ModelConfig, param_shapes
from dsv4_jax.convert.convert import convert
from dsv4_jax.convert.names import (
    HF,
    HF_APART,
    HYBRID,
    NAMINGS,
    ORIGINAL,
    file_tensors,
    naming_of,
    scale_name,
)
from dsv4_jax.convert.storage import released_storage, stored_bytes, stored_shapes
from dsv4_jax.convert.table import Layout, tensors_of
from dsv4_jax.errors import InputError

DATA = Path(__file__).parent / "data"
# Tensors and bytes of the instruct checkpoints, headers aside. Source: fact sheet 10.2.
PUBLISHED = {"flash": (69_187, 159_609_485_896), "pro": (145_116, 864_704_792_696)}
FLASH_WITHOUT_MTP = 67_612
SHARD_BYTES = 14 * 10**9
FLASH_STORED_ELEMENTS = 158_069_433_298  # packed bytes and scales counted once; fact sheet 13 A


def config_of(size: str) -> ModelConfig:
    return ModelConfig.from_hf(DATA / f"v4_{size}_config.json")


def expected_files(config: ModelConfig, *, base: bool = False) -> list[tuple[str, str, tuple, int]]:
    """Return name, dtype, shape and bytes of everything in a released checkpoint."""
    found = []
    for file in file_tensors(ORIGINAL, tensors_of(config)):
        (tensor,) = file.tensors
        storage = released_storage(tensor, base=base)
        shapes = stored_shapes(tensor.shape, storage.form)
        names = (file.name, scale_name(file.name, ORIGINAL.scale_suffix))
        sizes = stored_bytes(tensor.shape, storage)
        for name, shape, (dtype, nbytes) in zip(names, shapes, sizes, strict=False):
            found.append((name, dtype, shape, nbytes))
    return found


@pytest.mark.parametrize("size", PUBLISHED)
def test_full_size_lists_are_those_of_the_releases(size):
    expected = expected_files(config_of(size))
    names = [name for name, *_ in expected]
    assert len(set(names)) == len(names)
    assert (len(names), sum(nbytes for *_, nbytes in expected)) == PUBLISHED[size]


def test_flash_counts_of_its_published_tables():
    expected = expected_files(config_of("flash"))
    main = [name for name, *_ in expected if not name.startswith("mtp.")]
    assert len(main) == FLASH_WITHOUT_MTP
    assert sum(math.prod(shape) for _, _, shape, _ in expected) == FLASH_STORED_ELEMENTS
    base = expected_files(config_of("flash"), base=True)
    assert [name for name, *_ in base] == [name for name, *_ in expected]
    stored = {dtype for name, dtype, *_ in base if name.endswith("scale")}
    assert stored == {"F32"}
    assert {dtype for name, dtype, *_ in base if ".experts." in name} == {"F8_E4M3", "F32"}


def write_sparse(folder: Path, files: list[tuple[str, str, tuple, int]]) -> None:
    """Write a full-size checkpoint whose data are holes: headers and an index, and no bytes."""
    shards: list[dict] = [{}]
    places, end = {}, 0
    for name, dtype, shape, nbytes in files:
        if end + nbytes > SHARD_BYTES:
            shards.append({})
            end = 0
        offsets = [end, end + nbytes]
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        places[name] = f"model-{len(shards):05d}.safetensors"
        end += nbytes
    for number, header in enumerate(shards, start=1):
        text = json.dumps(header).encode()
        with open(folder / f"model-{number:05d}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(info["data_offsets"][1] for info in header.values()))
    index = {"metadata": {"total_size": sum(f[3] for f in files)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("size", PUBLISHED)
def test_dry_run_accounts_for_every_tensor_of_a_full_size_folder(size, tmp_path):
    files = expected_files(config_of(size))
    write_sparse(tmp_path, files)
    shutil.copy(DATA / f"v4_{size}_config.json", tmp_path / "config.json")
    report = convert(tmp_path, None, to=None, dry_run=True)
    tensors = sum(group.tensors for group in report.groups.values())
    assert (tensors, report.bytes) == PUBLISHED[size]
    write_sparse(tmp_path, files[1:])
    with pytest.raises(InputError, match="1 wrong: tensor 'embed.weight': missing"):
        convert(tmp_path, None, to=None, dry_run=True)


# One tensor of each kind, as the fact sheet's table (10.1) gives it for Flash.
FLASH_TENSORS = {
    "embed.weight": ("BF16", (129_280, 4096)),
    "hc_head_fn": ("F32", (4, 16_384)),
    "layers.0.hc_attn_fn": ("F32", (24, 16_384)),
    "layers.7.hc_ffn_scale": ("F32", (3,)),
    "layers.2.attn.wq_b.weight": ("F8_E4M3", (32_768, 1024)),
    "layers.2.attn.wq_b.scale": ("F8_E8M0", (256, 8)),
    "layers.2.attn.wo_a.weight": ("F8_E4M3", (8192, 4096)),
    "layers.2.attn.compressor.wkv.weight": ("BF16", (1024, 4096)),
    "layers.3.attn.compressor.wkv.weight": ("BF16", (512, 4096)),
    "layers.2.attn.compressor.ape": ("F32", (4, 1024)),
    "layers.3.attn.compressor.ape": ("F32", (128, 512)),
    "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", (8192, 1024)),
    "layers.2.attn.indexer.compressor.norm.weight": ("BF16", (128,)),
    "layers.2.ffn.gate.tid2eid": ("I64", (129_280, 6)),
    "layers.3.ffn.gate.bias": ("F32", (256,)),
    "layers.9.ffn.experts.255.w1.weight": ("I8", (2048, 2048)),
    "layers.9.ffn.experts.255.w1.scale": ("F8_E8M0", (2048, 128)),
    "layers.9.ffn.experts.0.w2.weight": ("I8", (4096, 1024)),
    "layers.9.ffn.shared_experts.w2.weight": ("F8_E4M3", (4096, 2048)),
    "mtp.0.e_proj.weight": ("F8_E4M3", (4096, 4096)),
    "mtp.0.norm.weight": ("BF16", (4096,)),
    "mtp.0.ffn.gate.bias": ("F32", (256,)),
}


def test_shapes_and_dtypes_of_flash():
    files = expected_files(config_of("flash"))
    expected = {name: (dtype, shape) for name, dtype, shape, _ in files}
    assert {name: expected[name] for name in FLASH_TENSORS} == FLASH_TENSORS
    assert "layers.3.ffn.gate.tid2eid" not in expected and "layers.2.ffn.gate.bias" not in expected
    assert "layers.1.attn.compressor.ape" not in expected  # a window layer
    assert "layers.3.attn.indexer.wq_b.weight" not in expected  # HCA has no indexer


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_weight_of_a_full_size_model_is_filled_once(size):
    config = config_of(size)
    filled = collections.defaultdict(set)
    for tensor in tensors_of(config):
        rows = 0
        for part in tensor.parts:
            assert part.start == rows and part.index not in filled[part.path]
            filled[part.path].add(part.index)
            rows += part.layout.shape[0]
        assert rows == tensor.shape[0]
    leaves = flatten_dict(param_shapes(config), sep="/")
    assert filled.keys() == leaves.keys()
    for path, weight in leaves.items():
        shape = weight.value.shape
        stacked = len(next(iter(filled[path])))
        assert filled[path] == set(np.ndindex(shape[:stacked]))


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.title)
def test_each_naming_has_a_name_for_every_tensor(naming):
    tensors = tensors_of(config_of("flash"))
    files = file_tensors(naming, tensors)
    assert len({file.name for file in files}) == len(files)
    assert sorted(t.name for file in files for t in file.tensors) == sorted(t.name for t in tensors)
    assert naming_of({file.name for file in files}, tensors) is naming


def test_namings_differ_where_they_must():
    layer = "layers.4."
    tensor = next(t for t in tensors_of(FLASH_LIKE) if t.name == layer + "attn.kv_norm.weight")
    assert HYBRID.place(tensor).name == "model.layers.4.attn.norm.weight"
    assert HF.place(tensor).name == "model.layers.4.self_attn.kv_norm.weight"
    expert = next(t for t in tensors_of(FLASH_LIKE) if t.name == layer + "ffn.experts.3.w3.weight")
    assert HF.place(expert) == ("model.layers.4.mlp.experts.gate_up_proj", 3, 1, 2)
    assert HF_APART.place(expert).name == "model.layers.4.mlp.experts.3.w3.weight"


def test_names_of_another_model_are_refused():
    with pytest.raises(InputError, match="expected tensors of DeepSeek-V4.*'transformer.wte'"):
        naming_of({"transformer.wte"}, tensors_of(FLASH_LIKE))


@st.composite
def layouts(draw):
    """Draw a layout of up to four axes, merged into one or two, and a slice of each axis."""
    names = draw(st.permutations("abcd"))[: draw(st.integers(1, 4))]
    cut = draw(st.integers(1, len(names)))
    axes = tuple(filter(None, (tuple(names[:cut]), tuple(names[cut:]))))
    order = tuple(draw(st.permutations(names)))
    sizes = tuple(draw(st.integers(1, 4)) for _ in order)
    index = []
    for size in sizes:
        start = draw(st.integers(0, size - 1))
        index.append(slice(start, draw(st.integers(start + 1, size))))
    return Layout(axes, order, sizes), tuple(index)


@settings(deadline=None, max_examples=300)
@given(layouts())
def test_layouts_are_invertible_and_restrict_to_parts(drawn):
    layout, index = drawn
    tensor = np.arange(math.prod(layout.sizes)).reshape(layout.shape)
    leaf = layout.to_leaf(tensor)
    assert leaf.shape == layout.sizes
    assert np.array_equal(layout.to_tensor(leaf), tensor)
    part, picks = layout.restrict(index)
    assert np.array_equal(part.to_leaf(tensor[np.ix_(*picks)]), leaf[index])
    # An element's place along a merged axis counts the merged axes in the order written.
    place = tuple(np.array(layout.sizes) - 1)
    assert leaf[place] == tensor.size - 1


def test_groups_of_the_report():
    groups = {tensor.group for tensor in tensors_of(config_of("flash"))}
    assert groups == {
        "mtp", "embedding", "head", "hyper-connections", "norms", "indexer", "compressor",
        "attention", "router", "shared experts", "experts",
    }  # fmt: skip
    by_name = {re.sub(r"\d+", "N", t.name): t.group for t in tensors_of(config_of("flash"))}
    assert by_name["layers.N.attn.indexer.compressor.ape"] == "indexer"
    assert by_name["head.weight"] == "head" and by_name["hc_head_fn"] == "hyper-connections"
