"""How fast the kernels are on the device that is here, beside the same in plain JAX.

    python benchmarks/kernels.py [--operations=moe,mhc] [--output=benchmarks/results]

Times every case of `pallas_kernels/*/cases.py`, and for comparison a large matrix product and a
large copy. Operations are those that the result needs (of attention the pairs that are admitted,
not padded slots), so that a share of the product's rate is one of useful work; the rate of all
slots, which other figures are of, stands beside it. Prints a table and writes it as DEVICE.json.
Plain JAX is each operation's `reference.py`, which may not fit. Where there are others
(`kernel_peers.py`; tokamax if it is installed), they are timed as well.
"""

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from absl import flags
from kernel_peers import peers

from dsv4_jax.cli import run
from dsv4_jax.errors import InputError
from pallas_kernels import aot
from pallas_kernels.case import Case
from pallas_kernels.implementation import XLA
from pallas_kernels.target import CPU, target_platform

OPERATIONS = flags.DEFINE_list("operations", [], "Of these alone; default: of all.")
OUTPUT = flags.DEFINE_string(
    "output", str(Path(__file__).parent / "results"), "Folder for the table as JSON."
)
RUNS, LEAST_SECONDS = 5, 0.05  # repetitions, and the least time that each takes
SIDE, COPIED = 8192, 2**30  # of the large product, and bytes of the large copy


def seconds_of(function: Callable, *arguments) -> float:
    """Return the median time of a call, compiled."""
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    calls = max(1, round(LEAST_SECONDS / timed(1)))
    return statistics.median(timed(calls) for _ in range(RUNS))


def ceilings() -> tuple[float, float]:
    """Return the rates of a large matrix product, FLOP/s, and of a large copy, byte/s."""
    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.bfloat16)
    product = 2 * SIDE**3 / seconds_of(lambda a: a @ a, a)
    x = jnp.zeros(COPIED // 4, jnp.float32)
    return product, 2 * COPIED / seconds_of(lambda x: x + 1, x)


def measured(case: Case, kernel: str) -> dict:
    """Time a case as a kernel, in plain JAX and by others; None where that does not fit."""
    arguments = case.make_arguments(seed=0)
    others = {"plain JAX": case.run(XLA)} | peers(case)
    return {
        "operation": case.operation, "case": case.name, "flops": case.flops, "bytes": case.bytes,
        "slots": case.slots, "kernel_s": seconds_of(case.run(kernel), *arguments),
        "others_s": {name: _if_it_fits(other, *arguments) for name, other in others.items()},
    }


def _if_it_fits(function: Callable, *arguments) -> float | None:
    try:
        return seconds_of(function, *arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


HEADING = (
    "| operation | case | kernel, ms | others, ms | times as fast as the best | TFLOP/s | "
    "of a product's | of slots | GB/s | of a copy's |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict, product: float, copy: float) -> str:
    """Write a row of the table."""
    kernel, others = row["kernel_s"], row["others_s"]
    fitting = [seconds for seconds in others.values() if seconds is not None]
    told = ", ".join(
        f"{name}: {'does not fit' if seconds is None else f'{seconds * 1e3:.3g}'}"
        for name, seconds in others.items()
    )
    flops, moved = row["flops"] / kernel, row["bytes"] / kernel
    cells = [
        row["operation"], row["case"], f"{kernel * 1e3:.3g}", told,
        f"{min(fitting) / kernel:.2f}" if fitting else "", f"{flops / 1e12:.3g}",
        f"{flops / product:.0%}", f"{flops * row['slots'] / 1e12:.3g}", f"{moved / 1e9:.4g}",
        f"{moved / copy:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    kernel = target_platform()
    if kernel == CPU:
        raise InputError(
            "expected a GPU or a TPU to time kernels on, got a CPU, where "
            "they are interpreted; `python -m pallas_kernels.aot` prints what compilers say of them"
        )
    device, (product, copy) = jax.devices()[0].device_kind, ceilings()
    print(f"{device}: product {product / 1e12:.4g} TFLOP/s, copy {copy / 1e9:.4g} GB/s\n{HEADING}")
    rows = []
    for module in aot.CASES:
        for case in module.cases():
            if not OPERATIONS.value or case.operation in OPERATIONS.value:
                rows.append(measured(case, kernel))
                print(line(rows[-1], product, copy), flush=True)
    result = {
        "device": device, "date": datetime.date.today().isoformat(), "jax": jax.__version__,
        "jaxlib": jaxlib.__version__, "product_flops_per_s": product, "copy_bytes_per_s": copy,
        "rows": rows,
    }
    path = Path(OUTPUT.value) / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
