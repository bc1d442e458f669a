"""The one table between a checkpoint's tensors and our parameters, read in both directions.

A row says where a tensor's values live in our tree and how its axes are made of the leaf's axes:
`(heads head_width) rank` is a matrix whose rows enumerate heads and, within a head, its width. The
axes have the names under which the model declares the weight, so that shapes, stacked layers and
shardings need no second description. Rows with the same tensor fill its first axis one after the
other.

Source: fact sheet 10.1 (original names and shapes), 10.4 (names of transformers).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from dsv4_jax.config import CSA, HASH, LEARNED, WINDOW, ModelConfig
from dsv4_jax.model import param_shapes
from dsv4_jax.params import Weight
from dsv4_jax.schedule import factor_schedule
from dsv4_jax.shapes import Array

# How a tensor is stored in the released checkpoints; plain floating point is always accepted.
EXPERT = "expert"  # FP4, or FP8 in base models
LINEAR = "linear"  # FP8
PLAIN = "plain"  # BF16
FLOAT = "float"  # F32, also where the rest of a checkpoint is BF16
INTEGER = "integer"  # I64


class Row(NamedTuple):
    """A tensor or some of its rows: names within a layer, our path, axes, storage."""

    name: str  # original
    hf: str  # of transformers' modules
    path: str  # within the block
    axes: str
    kind: str


STREAM_HEAD = (
    Row("hc_head_fn", "model.hc_head.hc_fn", "head_mix/fn", "mix (streams width)", FLOAT),
    Row("hc_head_base", "model.hc_head.hc_base", "head_mix/base", "mix", FLOAT),
    Row("hc_head_scale", "model.hc_head.hc_scale", "head_mix/scale", "gate", FLOAT),
)

OUTER = (
    Row("embed.weight", "model.embed_tokens.weight", "embedding", "vocab width", PLAIN),
    Row("norm.weight", "model.norm.weight", "final_norm", "width", PLAIN),
    Row("head.weight", "lm_head.weight", "head", "vocab width", PLAIN),
    *STREAM_HEAD,
)

MIXES = tuple(
    Row(f"hc_{theirs}_{name}", f"{theirs}_hc.{name}", f"{ours}_mix/{leaf}", axes, FLOAT)
    for theirs, ours in (("attn", "attention"), ("ffn", "moe"))
    for name, leaf, axes in (
        ("fn", "fn_pre", "mix (streams width)"),
        ("fn", "fn_post", "mix (streams width)"),
        ("fn", "fn_comb", "(mix mix_in) (streams width)"),
        ("base", "base_pre", "mix"),
        ("base", "base_post", "mix"),
        ("base", "base_comb", "(mix mix_in)"),
        ("scale", "scale", "gate"),
    )
)

NORMS = (
    Row("attn_norm.weight", "input_layernorm.weight", "attention_norm", "width", PLAIN),
    Row("ffn_norm.weight", "post_attention_layernorm.weight", "moe_norm", "width", PLAIN),
)


def _within(name: str, hf: str, path: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Put rows below prefixes of their three names."""
    return tuple(
        row._replace(name=name + row.name, hf=hf + row.hf, path=path + row.path) for row in rows
    )


ATTENTION = _within("attn.", "self_attn.", "attention/", (
    Row("wq_a.weight", "q_a_proj.weight", "w_q_a", "rank width", LINEAR),
    Row("q_norm.weight", "q_a_norm.weight", "q_norm", "rank", PLAIN),
    Row("wq_b.weight", "q_b_proj.weight", "w_q_b", "(heads head_width) rank", LINEAR),
    Row("wkv.weight", "kv_proj.weight", "w_kv", "entry width", LINEAR),
    Row("kv_norm.weight", "kv_norm.weight", "kv_norm", "entry", PLAIN),
    Row("attn_sink", "sinks", "sink", "heads", FLOAT),
    Row("wo_a.weight", "o_a_proj.weight", "w_o_a", "(groups out_rank) (group_heads head_width)",
        LINEAR),
    Row("wo_b.weight", "o_b_proj.weight", "w_o_b", "width (groups out_rank)", LINEAR),
))  # fmt: skip


def _compressor(entry: str) -> tuple[Row, ...]:
    return (
        Row("wkv.weight", "kv_proj.weight", "w_kv", f"{entry} width", PLAIN),
        Row("wgate.weight", "gate_proj.weight", "w_gate", f"{entry} width", PLAIN),
        Row("ape", "position_bias", "position_bias", f"slot {entry}", FLOAT),
        Row("norm.weight", "kv_norm.weight", "norm", "entry", PLAIN),
    )


_COMPRESSOR = ("attn.compressor.", "self_attn.compressor.", "attention/compressor/")
_INDEXER_HF = "self_attn.compressor.indexer."
HCA_COMPRESSOR = _within(*_COMPRESSOR, _compressor("entry"))
CSA_COMPRESSOR = _within(*_COMPRESSOR, _compressor("(series entry)"))
INDEXER = _within("attn.indexer.", _INDEXER_HF, "attention/indexer/", (
    Row("wq_b.weight", "q_b_proj.weight", "w_q", "(index_heads index_width) rank", LINEAR),
    Row("weights_proj.weight", "scorer.weights_proj.weight", "w_heads", "index_heads width", PLAIN),
)) + _within("attn.indexer.compressor.", _INDEXER_HF, "attention/indexer/compressor/",
             _compressor("(series entry)"))  # fmt: skip

GATE = Row("ffn.gate.weight", "mlp.gate.weight", "moe/w_router", "router_experts width", PLAIN)
HASH_ROUTER = (
    GATE,
    Row("ffn.gate.tid2eid", "mlp.gate.tid2eid", "moe/hash_table", "table_row choice", INTEGER),
)
LEARNED_ROUTER = (
    GATE,
    Row("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "moe/selection_bias",
        "router_experts", FLOAT),
)  # fmt: skip

SHARED_EXPERT = _within("ffn.shared_experts.", "mlp.shared_experts.", "moe/shared/", (
    Row("w1.weight", "gate_proj.weight", "w_gate", "expert_width width", LINEAR),
    Row("w2.weight", "down_proj.weight", "w_down", "width expert_width", LINEAR),
    Row("w3.weight", "up_proj.weight", "w_up", "expert_width width", LINEAR),
))  # fmt: skip
# One tensor for each expert. Transformers stacks them; `names.py` says how.
EXPERTS = _within("ffn.experts.{expert}.", "mlp.experts.", "moe/experts/", (
    Row("w1.weight", "gate_up_proj", "w_gate", "expert_width width", EXPERT),
    Row("w2.weight", "down_proj", "w_down", "width expert_width", EXPERT),
    Row("w3.weight", "gate_up_proj", "w_up", "expert_width width", EXPERT),
))  # fmt: skip

MTP_PREFIX = "mtp.0."
MTP = (  # transformers has no names for it
    Row("e_proj.weight", "", "w_token", "width_out width", LINEAR),
    Row("h_proj.weight", "", "w_stream", "width_out width", LINEAR),
    Row("enorm.weight", "", "token_norm", "width", PLAIN),
    Row("hnorm.weight", "", "stream_norm", "width", PLAIN),
    Row("norm.weight", "", "final_norm", "width", PLAIN),
    *STREAM_HEAD,
)


def layer_rows(attention: str, router: str) -> tuple[Row, ...]:
    """Return the rows of a layer of these kinds."""
    compressed = () if attention == WINDOW else HCA_COMPRESSOR
    if attention == CSA:
        compressed = CSA_COMPRESSOR + INDEXER
    routers = HASH_ROUTER if router == HASH else LEARNED_ROUTER
    return NORMS + MIXES + ATTENTION + compressed + routers + SHARED_EXPERT + EXPERTS


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a tensor's rows are made of the axes of a leaf's slice."""

    axes: tuple[tuple[str, ...], ...]  # names merged into each axis of the tensor
    names: tuple[str, ...]  # of the slice's axes
    sizes: tuple[int, ...]  # of the slice's axes

    @functools.cached_property
    def order(self) -> list[str]:
        """The names in the order of the tensor."""
        return [name for axis in self.axes for name in axis]

    @functools.cached_property
    def split(self) -> list[list[int]]:
        """The sizes that each axis of the tensor splits into."""
        return [[self.sizes[self.names.index(name)] for name in axis] for axis in self.axes]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor's rows."""
        return tuple(map(math.prod, self.split))

    def to_leaf(self, rows: Array) -> Array:
        """Split and permute the axes of the tensor's rows into those of the leaf's slice."""
        rows = rows.reshape([size for sizes in self.split for size in sizes])
        return rows.transpose([self.order.index(name) for name in self.names])

    def to_tensor(self, values: Array) -> Array:
        """Undo `to_leaf`."""
        order = [self.names.index(name) for name in self.order]
        return values.transpose(order).reshape(self.shape)

    def restrict(self, index: tuple[slice, ...]) -> tuple[Layout, list[np.ndarray]]:
        """Return the layout of a part of the slice, and the tensor's indices on each axis.

        Args:
          index: a slice of every axis of the leaf's slice.
        """
        chosen = dict(zip(self.names, index, strict=True))
        picks = []
        for axis, sizes in zip(self.axes, self.split, strict=True):
            whole = np.arange(math.prod(sizes)).reshape(sizes)
            picks.append(whole[tuple(chosen[name] for name in axis)].reshape(-1))
        sizes = tuple(len(range(size)[part]) for size, part in zip(self.sizes, index, strict=True))
        return dataclasses.replace(self, sizes=sizes), picks


class Part(NamedTuple):
    """The rows of a tensor that one slice of a leaf fills."""

    path: str  # of the leaf
    index: tuple[int, ...]  # of the slice: stacked layer, then expert, where the leaf has them
    layout: Layout
    start: int  # first row in the tensor


class Tensor(NamedTuple):
    """A tensor of a checkpoint, under its original name."""

    name: str
    hf: str  # of transformers' modules; where these stack experts, of the stack
    kind: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    expert: int | None  # that it belongs to

    @property
    def group(self) -> str:
        """The part of the model it belongs to, for reports."""
        return next(group for piece, group in GROUPS if piece in self.name)


GROUPS = (
    ("mtp.", "mtp"), ("embed", "embedding"), ("head.", "head"), ("hc_", "hyper-connections"),
    ("norm", "norms"), (".indexer.", "indexer"), (".compressor.", "compressor"),
    (".attn.", "attention"), (".gate.", "router"), (".shared_experts.", "shared experts"),
    (".experts.", "experts"),
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """Return the declaration of every leaf of the parameters, by path; not to be changed."""
    return flatten_dict(param_shapes(config), sep="/")


@functools.lru_cache(maxsize=2)  # a second for a full-size model
def tensors_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """Return every tensor of a model in the order of the released checkpoints."""
    leaves = weights_of(config)
    prelude, _ = factor_schedule(config)
    found = _block(OUTER[:1], "", "", "", (), leaves)
    for layer, kinds in enumerate(zip(config.layer_types, config.moe_types, strict=True)):
        names = f"layers.{layer}.", f"model.layers.{layer}."
        path, index = f"layers_{layer}/", ()
        if layer >= prelude:
            path, index = f"pairs/{kinds[0]}/", ((layer - prelude) // 2,)
        found += _block(layer_rows(*kinds), *names, path, index, leaves)
    found += _block(OUTER[1:], "", "", "", (), leaves)
    if config.num_nextn_predict_layers:
        # Transformers has no such block and takes its tensors under the original names.
        block = layer_rows(WINDOW, LEARNED)
        found += _block(MTP, MTP_PREFIX, None, "mtp/", (), leaves)
        found += _block(block, MTP_PREFIX, None, "mtp/block/", (), leaves)
    return tuple(found)


def _block(
    rows: tuple[Row, ...], name: str, hf: str | None, path: str, index: tuple[int, ...],
    leaves: dict[str, Weight],
) -> list[Tensor]:
    """Turn rows into tensors; without a prefix `hf` the original names serve."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    found = []
    for same in by_name.values():
        first = same[0]
        layouts = [_layout(row, leaves[path + row.path], len(index)) for row in same]
        if "{expert}" in first.name:
            count = leaves[path + first.path].value.shape[len(index)]
            places = [(expert, (*index, expert)) for expert in range(count)]
        else:
            places = [(None, index)]
        starts = list(itertools.accumulate((layout.shape[0] for layout in layouts), initial=0))
        shape = (starts[-1], *layouts[0].shape[1:])
        for expert, at in places:
            full = name + first.name.format(expert=expert)
            parts = tuple(
                Part(path + row.path, at, layout, start)
                for row, layout, start in zip(same, layouts, starts, strict=False)
            )
            named = full if hf is None else hf + first.hf
            found.append(Tensor(full, named, first.kind, shape, parts, expert))
    return found


def _layout(row: Row, weight: Weight, stacked: int) -> Layout:
    """Read a row's axes; `stacked` is the number of axes that enumerate layers."""
    axes = tuple(
        tuple((merged or single).split())
        for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", row.axes)
    )
    stacked += "{expert}" in row.name
    layout = Layout(axes, weight.axes[stacked:], weight.value.shape[stacked:])
    assert sorted(layout.order) == sorted(layout.names), f"{row.path}: has axes {layout.names}"
    return layout
