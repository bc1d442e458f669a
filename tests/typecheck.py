"""Check the shapes that signatures promise, in every call of every test.

Only where arrays are computed: the other modules say themselves what is wrong with a value of the
wrong type, and tests give them such values.
"""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

MODULES = (
    "attention", "block", "cache", "cache_format", "chunks", "experts", "layers", "loss", "mhc",
    "moe", "model", "mtp", "optimizer", "params", "rope", "router", "sharding", "train_step",
)  # fmt: skip

# An int is a float, as in PEP 484.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_shapes() -> None:
    """Must come before the package is imported."""
    install_import_hook([f"dsv4_jax.{name}" for name in MODULES], "typecheck.checked")
