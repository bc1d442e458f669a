"""Prove what is claimed of all kernels' index functions: `python -m pallas_kernels.verify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pallas_kernels.cached_attention import claims as cached_attention
from pallas_kernels.compressor import claims as compressor
from pallas_kernels.cross_entropy import claims as cross_entropy
from pallas_kernels.index_loss import claims as index_loss
from pallas_kernels.indexer import claims as indexer
from pallas_kernels.mhc import claims as mhc
from pallas_kernels.moe import claims as moe
from pallas_kernels.newton_schulz import claims as newton_schulz
from pallas_kernels.prove import Proof, Verdict
from pallas_kernels.sparse_attention import claims as sparse_attention

CLAIMS = (
    cached_attention, compressor, cross_entropy, index_loss, indexer, mhc, moe, newton_schulz,
    sparse_attention,
)


def all_proofs() -> Iterator[Proof]:
    """Yield what is claimed of every kernel."""
    for claims in CLAIMS:
        yield from claims.proofs()


def table(verdicts: list[tuple[Proof, Verdict]]) -> str:
    """Write verdicts as a table."""
    lines = ["| operation | kernel | statement | verdict | s |", "|---|---|---|---|---|"]
    lines += [
        f"| {proof.operation} | {proof.kernel} | {v.statement} | {v} | {v.seconds:.2f} |"
        for proof, v in verdicts
    ]
    return "\n".join(lines)


def main() -> int:
    """Print the table; return 1 if anything is not proved, else 0."""
    verdicts = [(proof, verdict) for proof in all_proofs() for verdict in proof.verdicts()]
    print(table(verdicts))
    return int(not all(verdict.proved for _, verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
