"""What a compiled step needs, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4_jax.account import memory_lines
from dsv4_jax.aot import Account
from dsv4_jax.devices import GIB


def as_json(account: Account) -> dict:
    """Return an account as JSON types, with what follows from it."""
    found = dataclasses.asdict(account)
    found["chip"] = account.chip._asdict()
    found["memory"] |= {"total": account.memory.total, "fits": account.memory.fits}
    found["exchanges"] = [
        x._asdict() | {"hidden_share": x.hidden_share} for x in account.exchanges
    ]
    for name in ("exposed_seconds", "step_seconds", "mfu"):
        found[name] = getattr(account, name)
    return found


def table(account: Account) -> Iterator[str]:
    """Yield the lines of an account."""
    yield from memory_lines(
        account.parameters, account.memory, account.devices, account.chip.kind
    )
    yield f"a step of {account.tokens:,} tokens, with experts evenly loaded, at least"
    yield (
        f"  {account.flops / 1e15:,.1f} PFLOP in products; a device computes "
        f"{account.compute_seconds:.3f} s and waits {account.exposed_seconds:.3f} s: MFU "
        f"{account.mfu:.1%}"
    )
    yield "  collectives                   number       GiB   seconds    hidden"
    for x in account.exchanges:
        name = x.kind + (" of experts" if x.experts else "") + (", far" if x.slow else "")
        yield (
            f"  {name:<28}{x.number:8,.0f}{x.bytes / GIB:10.3f}{x.seconds:10.4f}"
            f"{x.hidden_share:10.1%}"
        )
    yield (
        f"lowered in {account.lower_seconds:.0f} s, compiled in {account.compile_seconds:.0f} s "
        f"with {account.compiler_memory / GIB:.1f} GiB of this machine's memory"
    )
