"""How the layers of a schedule are laid out: a prelude, then equal pairs that are scanned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dsv4_jax.config import LEARNED, ModelConfig
from dsv4_jax.shapes import Array

MTP_BLOCK = "mtp/block"  # path of the prediction's block


class BlockGroup(NamedTuple):
    """The layers that share one block of the tree of parameters."""

    kind: str  # of their attention
    layers: int  # stacked on the first axis if scanned


def factor_schedule(config: ModelConfig) -> tuple[int, int]:
    """Split the layers into a prelude and repeated pairs: return (prelude layers, pairs).

    A pair is two layers of different attention kinds with learned routers; at least two equal
    pairs must end the schedule, else every layer belongs to the prelude.
    """
    kinds = list(zip(config.layer_types, config.moe_types, strict=True))
    first, second = kinds[-2:] if len(kinds) > 1 else (None, None)
    if len(kinds) < 4 or first[0] == second[0] or {first[1], second[1]} != {LEARNED}:
        return len(kinds), 0
    pairs = 0
    while kinds[len(kinds) - 2 * (pairs + 1) :][:2] == [first, second]:
        pairs += 1
        if 2 * (pairs + 1) > len(kinds):
            break
    return (len(kinds) - 2 * pairs, pairs) if pairs > 1 else (len(kinds), 0)


def block_groups(config: ModelConfig) -> dict[str, BlockGroup]:
    """Return the layers of the main model by the path of their block."""
    prelude, pairs = factor_schedule(config)
    groups = {
        f"layers_{layer}": BlockGroup(config.layer_types[layer], 1) for layer in range(prelude)
    }
    if pairs:
        groups |= {f"pairs/{kind}": BlockGroup(kind, pairs) for kind in config.layer_types[-2:]}
    return groups


def by_layer(config: ModelConfig, by_block: Mapping[str, Array]) -> dict[str, Array]:
    """Return by layer what is given by the path of a block, and stacked if scanned.

    The layers of the main model are named `layer_0` and so on, with zeros in front where their
    numbers differ in length, and that of the prediction `mtp`: sorted by name they are in order.
    """
    prelude, _ = factor_schedule(config)
    width = len(str(config.num_layers - 1))
    values = {}
    for layer, kind in enumerate(config.layer_types):
        scanned = layer - prelude
        values[f"layer_{layer:0{width}}"] = (
            by_block[f"layers_{layer}"] if scanned < 0 else by_block[f"pairs/{kind}"][scanned // 2]
        )
    return values | ({"mtp": by_block[MTP_BLOCK]} if MTP_BLOCK in by_block else {})
