"""Compare what a token costs at a length with DeepSeek-V3.2: operations and bytes of cache.

    python benchmarks/token_cost.py --config=config.json

Nothing is computed: operations are those of `dsv4_jax/token_cost.py`, bytes those of the arrays of
the served cache. Without --config both released models of configs/ are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import app, flags

from dsv4_jax import ModelConfig, Runtime
from dsv4_jax.cache import init_cache
from dsv4_jax.cli import read_config_file
from dsv4_jax.run_config import RunConfig
from dsv4_jax.token_cost import TokenCost, token_cost, v32_token_cost

LENGTHS = flags.DEFINE_list("lengths", ["4096", "32768", "131072", "1048576"], "Tokens in a row.")
CONFIG = flags.DEFINE_string("config", None, "A published config.json; none: V4-Flash and V4-Pro.")

V32_BYTES = 61 * (656 + 132)  # of a token: latents and index keys of its layers, in FP8
CONFIGS = Path(__file__).parent.parent / "configs"


def models() -> dict[str, ModelConfig]:
    """Return the models to compare."""
    if CONFIG.value is not None:
        return {Path(CONFIG.value).stem: ModelConfig.from_hf(CONFIG.value)}
    return {name: _model_of(CONFIGS / f"{file}.py")
            for name, file in (("V4-Pro", "v4_pro"), ("V4-Flash", "v4_flash"))}


def _model_of(path: Path) -> ModelConfig:
    return RunConfig.from_config_dict(read_config_file(str(path))).model


def cache_bytes(config: ModelConfig, length: int) -> int:
    """Return the bytes of a served cache; tokens whose block is not complete are left out."""
    runtime = Runtime(cache="served", dtype="bfloat16")
    cache = jax.eval_shape(lambda: init_cache(config, runtime, rows=1, max_length=length))
    stores = [store for layer in cache.layers.values() for store in (layer.main, layer.index)]
    kept = [layer.window for layer in cache.layers.values()]
    kept += [store.entries for store in stores if store is not None]
    return sum(array.size * array.dtype.itemsize for array in kept)


def line(name: str, length: int, cost: TokenCost, weighted: float, size: int) -> str:
    """Write one line of the table."""
    parts = " | ".join(f"{part / 1e9:,.1f}" for part in cost)
    operations = weighted / v32_token_cost(length).weighted(index=1)
    return (
        f"| {length:,} | {name} | {parts} | {weighted / 1e9:,.1f} | {100 * operations:.1f} % "
        f"| {size / 2**30:.3f} | {100 * size / (V32_BYTES * length):.2f} % |"
    )


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    print("| tokens | model | FP8, FP4 matrices, GFLOP | other matrices | attention | index "
          "| weighted | of V3.2's | cache, GiB | of V3.2's |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for length in map(int, LENGTHS.value):
        v32 = v32_token_cost(length)
        print(line("V3.2", length, v32, v32.weighted(index=1), V32_BYTES * length))
        for name, config in models().items():
            cost = token_cost(config, length)
            print(line(name, length, cost, cost.weighted(), cache_bytes(config, length)))


if __name__ == "__main__":
    app.run(main)
