"""Draw how a training goes.

    python launch/plot.py --workdir=DIR [--out=FILE.png]

The training may be going on. Needs the extra `plot`.
"""

from __future__ import annotations

from absl import flags

from dsv4_jax import cli
from dsv4_jax.run_plot import plot_run
from dsv4_jax.terminal import say

WORKDIR = flags.DEFINE_string("workdir", None, "the folder of a training")
OUT = flags.DEFINE_string("out", None, "the PNG to write; none: metrics.png in the workdir")


def main() -> None:
    cli.require(WORKDIR)
    say(f"wrote {plot_run(WORKDIR.value, OUT.value)}")


if __name__ == "__main__":
    cli.run(main)
