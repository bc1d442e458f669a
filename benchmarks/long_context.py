"""Measure reading and writing at the end of long rows, beside transformers.

    python benchmarks/long_context.py --lengths=4096,16384,65536,262144,1048576

One row, the model of benchmarks/seven_layers.py, with room for 2^20 tokens. Every measurement
runs in a process of its own. A row up to --whole is read as a prompt; the cache of a longer one is
filled with random keys and entries, all of which are then read as those of a prompt would be.
`transformers` (extra `test`) reads and writes the same row with the same weights, up to
--peer_length.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from seven_layers import CONFIG

from dsv4_jax import Runtime, init_params, save_pretrained
from dsv4_jax.cache import Cache, LayerCache, init_cache
from dsv4_jax.cache_format import encode_entry, encode_index_key
from dsv4_jax.decode import decode_step, prefill

LENGTHS = flags.DEFINE_list(
    "lengths", ["4096", "16384", "65536", "262144", "1048576"], "Tokens in the row."
)
FORMS = flags.DEFINE_list("forms", ["float32", "served"], "Formats of the cache.")
CHUNK = flags.DEFINE_integer("chunk", 1024, "Tokens that are read at once.")
STEPS = flags.DEFINE_integer("steps", 32, "Tokens written; the median time is printed.")
WHOLE = flags.DEFINE_integer("whole", 65_536, "Longest row that is read as a prompt.")
PEER_LENGTH = flags.DEFINE_integer("peer_length", 16_384, "Longest row of transformers; 0: none.")
PEER_CHUNKS = flags.DEFINE_list("peer_chunks", ["512", "2048"], "Tokens that it reads at once.")


class Measured(NamedTuple):
    """What one row took."""

    whole: float | None  # tokens per second over the row as a prompt; None: it was not read so
    last: float | None  # tokens per second of its last chunk
    step: float  # seconds per token written after it
    cache_bytes: int | None
    peak_bytes: int  # of memory while reading, beside weights, cache and programs


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement."""

    length: int
    form: str  # of the cache, or "transformers"
    chunk: int
    steps: int
    whole: bool  # the row is read as a prompt
    folder: str  # of the weights


def measure(task: Task) -> Measured:
    """Measure in this process, which does nothing else."""
    return _measure_peer(task) if task.form == "transformers" else _measure_ours(task)


def _measure_ours(task: Task) -> Measured:
    runtime = Runtime(cache=task.form)
    model = CONFIG, runtime, init_params(CONFIG, jax.random.key(0))
    room = min(task.length + task.chunk + task.steps, CONFIG.max_position_embeddings)
    cache = init_cache(CONFIG, runtime, rows=1, max_length=room)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    tokens = _tokens(task.length)
    # Up to here the cache holds random entries, or nothing; the steps are to fit behind the row.
    start = 0 if task.whole else room - task.steps - task.chunk
    if not task.whole:
        cache = _filled(cache, task.form)

    def at(cache: Cache, length: int) -> Cache:
        return cache._replace(length=jnp.full(1, length, jnp.int32))

    def read(cache: Cache, part: np.ndarray) -> Cache:
        count = np.array([part.shape[1]])
        return jax.block_until_ready(
            prefill(*model, cache, part, count, chunk=task.chunk)
        )[1]

    cache = read(at(cache, start), tokens[:, : task.chunk])  # compiles
    before = _reset_peak()
    seconds = None
    if task.whole:
        begun = time.perf_counter()
        cache = read(at(cache, 0), tokens)
        seconds = time.perf_counter() - begun
    last = task.length - task.chunk if task.whole else start
    begun = time.perf_counter()
    cache = read(at(cache, last), tokens[:, -task.chunk :])
    last_seconds = time.perf_counter() - begun
    peak = _peak() - before
    times = []
    for _ in range(task.steps + 1):
        begun = time.perf_counter()
        _, cache = jax.block_until_ready(
            decode_step(*model, cache, jnp.ones(1, jnp.int32), jnp.ones(1, bool))
        )
        times.append(time.perf_counter() - begun)
        cache = at(cache, int(cache.length[0]) - (len(times) == 1))  # the first one compiles
    whole = None if seconds is None else task.length / seconds
    step = float(np.median(times[1:]))
    return Measured(whole, task.chunk / last_seconds, step, cache_bytes, peak)


def _filled(cache: Cache, form: str) -> Cache:
    """Fill rings and stored entries with random numbers in the cache's format."""
    keys = iter(jax.random.split(jax.random.key(1), 8 * len(cache.layers)))

    def entries(array):
        made = jax.random.normal(next(keys), (*array.shape[:3], CONFIG.head_dim))
        return encode_entry(made, CONFIG, form)

    def fill(layer: LayerCache) -> LayerCache:
        main, index = layer.main, layer.index
        if main is not None:
            main = main._replace(entries=entries(main.entries))
        if index is not None:
            shape = (*index.entries.shape[:3], CONFIG.index_head_dim)
            made = encode_index_key(jax.random.normal(next(keys), shape), form)
            index = index._replace(entries=made)
        return LayerCache(entries(layer.window), main, index)

    return cache._replace(layers={path: fill(layer) for path, layer in cache.layers.items()})


def _measure_peer(task: Task) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32).eval()
    ids, kept, times = torch.from_numpy(_tokens(task.length)).long(), None, []
    with torch.no_grad():
        model(ids[:, :64])
        before, begun = _reset_peak(), time.perf_counter()
        for first in range(0, task.length, task.chunk):
            part = ids[:, first : first + task.chunk]
            kept = model(part, cache=kept, use_cache=True, logits_to_keep=1).cache
        seconds, peak = time.perf_counter() - begun, _peak() - before
        for _ in range(task.steps):
            begun = time.perf_counter()
            kept = model(ids[:, :1], cache=kept, use_cache=True).cache
            times.append(time.perf_counter() - begun)
    return Measured(task.length / seconds, None, float(np.median(times)), None, peak)


def _tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, length), dtype=np.int32)


def _reset_peak() -> int:
    """Begin to measure the peak of this process's memory; return what it has now, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide the next peak
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def tasks(folder: str) -> list[Task]:
    """Return what is to be measured."""
    found = []
    for length in map(int, LENGTHS.value):
        whole = length <= WHOLE.value
        found += [Task(length, form, CHUNK.value, STEPS.value, whole, folder)
                  for form in FORMS.value]
        if length <= PEER_LENGTH.value:
            found += [Task(length, "transformers", int(chunk), STEPS.value, True, folder)
                      for chunk in PEER_CHUNKS.value]
    return found


def line(task: Task, found: Measured) -> str:
    """Write one line of the table."""
    whole, last = (
        "" if rate is None else f"{rate:,.0f}" for rate in (found.whole, found.last)
    )
    size = "" if found.cache_bytes is None else f"{found.cache_bytes / 1e6:,.1f}"
    return (
        f"| {task.length:,} | {task.form} | {task.chunk:,} | {whole} | {last} "
        f"| {1 / found.step:,.0f} | {found.step * 1e3:,.1f} | {size} "
        f"| {found.peak_bytes / 1e6:,.0f} |"
    )


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print("| tokens | cache | chunk | read, tokens/s | last chunk, tokens/s | written, tokens/s "
          "| ms | cache MB | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "model"))
        save_pretrained(folder, CONFIG, init_params(CONFIG, jax.random.key(0)), format="hf")
        for task in tasks(folder):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                print(line(task, process.apply(measure, (task,))), flush=True)


if __name__ == "__main__":
    app.run(main)
