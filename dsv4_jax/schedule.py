"""How the layers of a schedule are laid out: a prelude, then equal pairs that are scanned."""

from __future__ import annotations

from typing import NamedTuple

from dsv4_jax.config import LEARNED, ModelConfig


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
