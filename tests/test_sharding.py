"""On every mesh a training step computes what one device does, and nothing is whole by mistake."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax import linen as nn
from on_mesh import mesh_of

from dsv4_jax import chunks
from dsv4_jax.collectives import gather_weight
from dsv4_jax.errors import InputError
from dsv4_jax.model import param_shapes
from dsv4_jax.optimizer import Placed, make_optimizer
from dsv4_jax.params import (
    IN,
    kinds_of,
    moment_split,
    parse_axes,
    path_name,
    shardings_of,
    split_trainable,
    weight_split,
)
from dsv4_jax.run_config import MeshConfig, RunConfig
from dsv4_jax.sharding import (
    KEPT,
    LAYOUTS,
    MESH_AXES,
    POD,
    SHARED,
    AxisSplit,
    batch_sharding,
    parts_of,
    split_of,
)
from dsv4_jax.train_state import Skips, TrainState, abstract_state, init_state, state_shardings
from dsv4_jax.train_step import make_train_step

# Sums over devices round in another order: a few float32 units in the last place.
TOLERANCE = 1e-5
# A gradient this much smaller than the largest leaf's is a sum that cancels, at worst to rounding
# errors: those of a first mixing matrix vanish, as the streams start out equal. Such a leaf may
# differ by the tolerance times this bound, 1e-8 of the largest.
CANCELLED = 1e-3

ROWS, SEQ_LEN = 8, 16
MODEL = {
    "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 8,
    "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 4,
    "sliding_window": 4, "csa_ratio": 2, "hca_ratio": 4, "index_n_heads": 4,
    "index_head_dim": 8, "index_topk": 2, "yarn_original_positions": 16,
    "max_position_embeddings": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    # Large, so that few gradients of the stream mixes cancel to rounding errors.
    "rms_norm_eps": 0.1, "hc_eps": 0.03,
}
# One has a hash router, sparse CSA and, for multi-token prediction, a window layer with a learned
# router; the other scans two pairs of layers. Few layers, as each takes seconds to compile.
SPARSE = {"layer_types": ["csa"], "moe_types": ["hash"]}
DENSE = {
    "layer_types": ["csa", "hca"] * 2, "moe_types": ["learned"] * 4, "num_nextn_predict_layers": 0,
}
# The last number is the budget of long axes: the smallest cuts losses and attention into pieces.
CASES = [
    ("sparse", (2, 2, 2, 1), 2**18, "pod"),
    ("sparse", (1, 1, 4, 2), 2**18, "pod"),
    pytest.param("sparse", (2, 2, 1, 2), 2**18, "cluster", marks=pytest.mark.heavy),
    ("dense", (1, 2, 2, 2), 2**8, "pod"),
]


def run_config(name: str, optimizer: str = "adamw", **changes) -> RunConfig:
    return RunConfig.from_config_dict({
        "model": {**MODEL, **(DENSE if name == "dense" else SPARSE), **changes},
        "stages": {
            "stage1": {
                "tokens": 10 * ROWS * SEQ_LEN, "seq_len": SEQ_LEN, "batch_tokens": ROWS * SEQ_LEN,
                "attention": name,
            },
        },
        "optimizer": {
            "name": optimizer, "learning_rate": 1e-3, "end_learning_rate": 1e-4,
            "warmup_steps": 1, "decay_fraction": 0.0, "clip_norm": 1e9,
        },
        "train": {"eval_every": 10, "checkpoint_every": 10},
    })


def packed_batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents, some with padding at the end."""
    choose = np.random.default_rng(0)
    segment_ids = np.zeros((ROWS, SEQ_LEN), np.int32)
    for row in segment_ids:
        cuts = np.sort(choose.choice(np.arange(1, SEQ_LEN), 3, replace=False))
        row[:] = np.searchsorted(cuts, np.arange(SEQ_LEN), side="right") + 1
        row[row == 4] = choose.choice([0, 4])
    tokens = choose.integers(0, MODEL["vocab_size"], (ROWS, SEQ_LEN)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids}


def take_step(config: RunConfig, mesh=None):
    """Take the first step; return its metrics and the state after it."""
    placed = state_shardings(config, mesh)
    state, batch = initial_state(config.stages[0].attention), packed_batch()
    if mesh is not None:
        state = jax.device_put(state, placed)
        batch = jax.device_put(batch, batch_sharding(mesh, ROWS))
    outputs = None if mesh is None else (placed, None)
    step = make_train_step(config, config.stages[0], mesh)
    state, metrics = quick_jit(step, out_shardings=outputs)(state, batch)
    return metrics, state


@functools.cache
def initial_state(name: str):
    """Return a state with random parameters, none of them zero."""
    choose = np.random.default_rng(0)

    def value(path, leaf) -> np.ndarray:
        if path_name(path).endswith("hash_table"):
            table = [choose.permutation(MODEL["n_routed_experts"]) for _ in range(leaf.shape[0])]
            return np.array(table, np.int32)[:, : leaf.shape[1]]
        around = 1.0 if path_name(path).endswith("norm") else 0.0
        # Small index scores would make lessons of rounding errors alone.
        spread = 4.0 if "indexer" in path_name(path) else 0.02
        return (around + spread * choose.normal(size=leaf.shape)).astype(leaf.dtype)

    state = abstract_state(run_config(name))
    return TrainState(
        np.int32(0),
        Skips(np.int32(0), np.int32(0)),
        jax.tree_util.tree_map_with_path(value, state.params),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.opt_state),
    )


@functools.cache
def one_device(name: str):
    return take_step(run_config(name))


def by_name(tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def moments_of(state, kind: str) -> dict[str, jax.Array]:
    """Return AdamW's moments of one kind by the name of their parameter.

    After the first step those called "mu" are a tenth of the gradients.
    """
    leaves = by_name(state.opt_state).items()
    return {name.partition(f"/{kind}/")[2]: leaf for name, leaf in leaves if f"/{kind}/" in name}


def assert_close(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    """Compare leaf by leaf, by the norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    norms = {name: np.linalg.norm(leaf) for name, leaf in expected.items()}
    floor = CANCELLED * max(norms.values())
    ratios = {
        name: np.linalg.norm(np.asarray(found[name]) - expected[name]) / max(norms[name], floor)
        for name in expected
    }
    assert max(ratios.values()) < TOLERANCE, sorted(ratios.items(), key=lambda x: -x[1])[:5]


def assert_parted(tree, boxed, mesh, split=weight_split, layout=POD) -> int:
    """Check every leaf against the table, by the shapes of its parts; return how many are split.

    Args:
      boxed: the tree of `Weight`s that tell the axes of the leaves.
    """
    count = 0
    weights = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    for leaf, weight in zip(jax.tree.leaves(tree), weights, strict=True):
        part = tuple(
            size // parts_of(part.names, mesh)
            for size, part in zip(leaf.shape, split(weight, mesh, layout), strict=True)
        )
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        assert shapes == {part}, (weight.axes, leaf.shape, shapes, part)
        assert len(leaf.addressable_shards) == mesh.size
        count += part != leaf.shape
    return count


@pytest.mark.parametrize(("name", "sizes", "elements", "layout"), CASES)
def test_a_step_on_a_mesh_equals_one_device(name, sizes, elements, layout, monkeypatch):
    config, mesh = run_config(name), mesh_of(*sizes)
    config = dataclasses.replace(config, mesh=MeshConfig(layout=layout))
    expected_metrics, expected = one_device(name)
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", elements)
    metrics, state = take_step(config, mesh)
    for key, value in expected_metrics.items():
        # What is left of a sum after subtracting 1 is as exact as the sum.
        atol = TOLERANCE if key == "sinkhorn_error" else 0
        np.testing.assert_allclose(metrics[key], value, rtol=TOLERANCE, atol=atol, err_msg=key)
    assert_close(moments_of(state, "mu"), moments_of(expected, "mu"))

    boxed = param_shapes(config.model)
    trainable = split_trainable(boxed)[0]
    assert_parted(state.params, boxed, mesh, layout=layout)
    for kind in ("mu", "nu"):  # AdamW's two
        moments = moments_of(state, kind)
        names = by_name(split_trainable(state.params)[0])
        assert moments.keys() == names.keys()
        assert_parted([moments[name] for name in names], trainable, mesh, moment_split, layout)


def test_a_state_is_born_sharded_and_equal():
    config, mesh = run_config("sparse", "muon"), mesh_of(1, 2, 2, 2)
    state, expected = init_state(config, mesh), init_state(config)
    assert assert_parted(state.params, param_shapes(config.model), mesh) > 20
    for found, value in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, value)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_shardings(config, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_muon_on_a_mesh_equals_one_device():
    """On stacked layers of experts: what a mesh splits in three ways at once."""
    config, mesh = run_config("dense", "muon"), mesh_of(1, 2, 2, 2)
    boxed = split_trainable(param_shapes(config.model))[0]["pairs"]["csa"]["moe"]
    splits = jax.tree.map(
        lambda weight: moment_split(weight, mesh), boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
    choose = np.random.default_rng(0)
    gradients, params = (
        jax.tree.map(lambda x: choose.normal(size=x.shape).astype(np.float32), nn.meta.unbox(boxed))
        for _ in range(2)
    )

    def update(gradients, params, placed=None):
        optimizer = make_optimizer(config.optimizer, kinds_of(boxed), placed=placed)
        return optimizer.update(gradients, optimizer.init(params), params, learning_rate=1e-3)[0]

    lie = shardings_of(boxed, mesh)
    on_mesh = quick_jit(functools.partial(update, placed=Placed(mesh, splits)))
    found = on_mesh(*jax.device_put((gradients, params), (lie, lie)))
    assert_close(by_name(found), by_name(quick_jit(update)(gradients, params)))


def test_gradients_of_a_gathered_weight_add_up_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    mesh, ids = mesh_of(1, 8, 1, 1), np.zeros(3000, np.int32)
    rows = jax.P("fsdp")

    def on_device(part):
        def looked_up(part):
            table = gather_weight(part, (AxisSplit((), ("fsdp",)),), jnp.dtype("bfloat16"))
            return jnp.sum(table[ids].astype(jnp.bfloat16).astype(jnp.float32))

        return jax.grad(looked_up)(part)

    on_devices = jax.shard_map(on_device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    gradient = jax.jit(on_devices)(jnp.ones(8))
    np.testing.assert_array_equal(gradient, [8 * 3000] + [0] * 7)


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
    with pytest.raises(InputError, match=r"the 8 devices, got data 3 x expert 1 .* = 3; change"):
        mesh_of(3, 1, 1, 1)
    with pytest.raises(InputError, match="= 16; change"):
        mesh_of(16, 1, 1, 1)


@pytest.mark.parametrize(("sizes", "changes", "message"), [
    ((1, 1, 4, 1), {"n_routed_experts": 6}, "expert = 4 .* axis 'experts' of size 6 of layers_0"),
    ((1, 1, 1, 4), {}, "tensor = 4 devices do not divide axis 'groups' of size 2 of layers_0"),
])
def test_a_mesh_that_does_not_divide_an_axis_is_refused(sizes, changes, message):
    config = run_config("sparse", **changes).model
    with pytest.raises(InputError, match=message) as caught:
        shardings_of(param_shapes(config), mesh_of(*sizes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layout", "axes", "shape", "expected"), [
    # Whole experts as long as these suffice, then their width; "tensor" has been used.
    ("pod", "experts | width -> expert_width", (8, 16, 8), ("expert fsdp", "", "tensor")),
    ("pod", "experts | width -> expert_width", (2, 16, 8), ("expert", "fsdp", "tensor")),
    ("pod", "width -> rank", (16, 8), ("expert fsdp tensor", "")),
    ("pod", "width -> rank", (12, 8), ("expert fsdp", "tensor")),
    ("pod", "width -> rank", (9, 7), ("", "")),
    ("pod", "rank -> heads head_width", (8, 4, 8), ("expert fsdp", "tensor", "")),
    ("pod", "width", (16,), ("",)),
    ("pod", "heads", (4,), ("tensor",)),
    ("cluster", "width -> rank", (16, 8), ("fsdp tensor", "")),
    ("cluster", "experts | width -> expert_width", (8, 16, 8), ("expert fsdp", "", "tensor")),
])
def test_how_a_weight_is_split(layout, axes, shape, expected):
    names, kinds = parse_axes(axes)
    split = split_of(names, shape, mesh_of(1, 2, 2, 2), layout, matrix=IN in kinds)
    assert tuple(" ".join(part.names) for part in split) == expected


def test_axes_of_one_device_split_nothing():
    split = split_of(("width", "heads"), (16, 8), mesh_of(1, 1, 1, 1), POD, matrix=True)
    assert [part.names for part in split] == [(), ()]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="data x expert x fsdp = 8 .* 'batch' of size 6"):
        batch_sharding(mesh_of(8, 1, 1, 1), 6)


def test_every_rule_names_axes_of_the_mesh_and_of_the_model():
    used = {axis for leaf in jax.tree.leaves(
        param_shapes(run_config("sparse").model),
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    ) for axis in leaf.axes}
    assert {*KEPT, *SHARED} <= used
    assert set(KEPT.values()) <= set(MESH_AXES)
    for layout in LAYOUTS.values():
        assert set().union(*layout.values()) <= set(MESH_AXES)
