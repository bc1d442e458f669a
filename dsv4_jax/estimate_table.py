"""An estimate as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4_jax.account import memory_lines
from dsv4_jax.estimate import Estimate

PRETRAINING = 33e12  # tokens of Pro; the report's


def as_json(found: Estimate) -> dict:
    """Return an estimate as JSON types, with what follows from it."""
    sections = dataclasses.asdict(found)
    sections["chip"] = found.chip._asdict()
    sections["memory"] |= {"total": found.memory.total, "fits": found.memory.fits}
    for name in ("parts", "sent"):
        sections[name] = [
            x._asdict() | {"seconds": x.seconds(found.chip)} for x in getattr(found, name)
        ]
    for name in ("compute_seconds", "network_seconds", "step_seconds", "mfu", "tokens_per_day",
                 "bottleneck"):
        sections[name] = getattr(found, name)
    return sections | {"device_hours": found.device_hours(PRETRAINING)}


def table(found: Estimate) -> Iterator[str]:
    """Yield the lines of an estimate."""
    yield from memory_lines(found.parameters, found.memory, found.devices, found.chip.kind)
    yield f"a step of {found.tokens:,} tokens, with experts evenly loaded, at least"
    yield f"  {'a device computes':<32}{'PFLOP':>9}{'TB':>9}{'seconds':>9}"
    for part in found.parts:
        yield (
            f"  {part.name:<32}{part.flops / 1e15:9.2f}{part.bytes / 1e12:9.2f}"
            f"{part.seconds(found.chip):9.2f}"
        )
    yield f"  {'and sends':<32}{'':>9}{'TB':>9}{'seconds':>9}"
    for sent in found.sent:
        name = sent.name + (", far" if sent.slow else "")
        yield f"  {name:<41}{sent.bytes / 1e12:9.2f}{sent.seconds(found.chip):9.2f}"
    yield (
        f"{found.flops / found.tokens / 1e9:.1f} GFLOP for a token; computing takes "
        f"{found.compute_seconds:.2f} s, sending {found.network_seconds:.2f} s beside it; most of "
        f"it for: {found.bottleneck}"
    )
    yield (
        f"MFU {found.mfu:.1%}, {found.tokens_per_day / 1e9:,.1f} billion tokens a day, "
        f"{found.device_hours(PRETRAINING) / 1e6:,.2f} million device-hours for "
        f"{PRETRAINING / 1e12:.0f}T tokens"
    )
