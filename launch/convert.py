"""Convert a checkpoint to or from PyTorch.

    python launch/convert.py --input=DIR --output=DIR --to=hf|deepseek|orbax [--dtype=bfloat16]

The same command again finishes a conversion that was killed. `--dry_run` checks the input's names,
shapes and dtypes without reading data, and counts what would be written.
"""

from __future__ import annotations

from absl import flags

from dsv4_jax import cli
from dsv4_jax.convert.convert import FORMATS, convert
from dsv4_jax.convert.save import MAX_SHARD_BYTES
from dsv4_jax.convert.storage import DTYPES
from dsv4_jax.terminal import say

INPUT = flags.DEFINE_string(
    "input", None, "folder of safetensors, of Orbax's files, or a training's workdir"
)
OUTPUT = flags.DEFINE_string("output", None, "folder to be made")
TO = flags.DEFINE_enum("to", None, FORMATS, "format of the output")
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "of the output's weights; none: as they are, copied byte for byte"
)
SHARD = flags.DEFINE_integer("max_shard_bytes", MAX_SHARD_BYTES, "of one file of the output")
SKIP_MTP = flags.DEFINE_bool("skip_mtp", False, "leave out the multi-token prediction block")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "check the input's headers only; write nothing")


def main() -> None:
    cli.require(INPUT, *(() if DRY_RUN.value else (OUTPUT, TO)))
    report = convert(
        INPUT.value, OUTPUT.value, to=TO.value, dtype=DTYPE.value, max_shard_bytes=SHARD.value,
        skip_mtp=SKIP_MTP.value, dry_run=DRY_RUN.value,
    )
    for line in report.lines():
        say(line)
    for warning in report.warnings():
        say(f"warning: {warning}")
    if not DRY_RUN.value:
        say(f"{OUTPUT.value}: {report.speed()}")


if __name__ == "__main__":
    cli.run(main)
