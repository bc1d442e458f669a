"""Measure what drafting by multi-token prediction saves on a trained model.

    python benchmarks/speculation.py --checkpoint=runs/tiny [--text=PATH]

Beginnings of held-out documents are continued with and without drafts, in turns. Both give the same
tokens. The printed speed is that of decoding alone, the fastest of the repeats.
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from dsv4_jax import cli, generate
from dsv4_jax.evaluate import Settings, read_texts
from dsv4_jax.infer import Stats
from dsv4_jax.served_model import check_model

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A folder that launch/generate.py reads.")
TEXT = flags.DEFINE_string("text", None, "As that of launch/evaluate.py.")
ROWS = flags.DEFINE_list("rows", ["1", "8"], "Prompts that are continued together.")
TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "1"], "How tokens are drawn.")
PROMPT = flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1)
NEW = flags.DEFINE_integer("new", 256, "Tokens to write after it.", lower_bound=3)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed pairs of runs.", lower_bound=1)


def speed(stats: Stats) -> float:
    """Return tokens of all rows per second."""
    return stats.decode_tokens / stats.decode_seconds


def main() -> None:
    cli.require(CHECKPOINT)
    folder = check_model(CHECKPOINT.value)
    texts = read_texts(folder, Settings(text=TEXT.value))
    documents = folder.tokenizer.encode_documents(texts)
    prompts = [ids[: PROMPT.value] for ids in documents if len(ids) > PROMPT.value]
    most = max(map(int, ROWS.value))
    if len(prompts) < most:
        sys.exit(f"expected {most} documents of {PROMPT.value} tokens, got {len(prompts)}")
    model = folder.load()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {model.runtime.dtype}")
    print("| rows | temperature | drafts accepted | tokens/s | with drafts | times |")
    print("|---|---|---|---|---|---|")
    for rows in map(int, ROWS.value):
        for temperature in map(float, TEMPERATURES.value):
            found = {False: [], True: []}
            for _ in range(REPEATS.value + 1):
                for speculate, stats in found.items():
                    stats.append(generate(
                        model.config, model.params, prompts[:rows], max_new_tokens=NEW.value,
                        temperature=temperature, runtime=model.runtime, speculate=speculate,
                    ).stats)
            plain, ahead = (max(map(speed, stats[1:])) for stats in found.values())
            judged = found[True][-1]
            print(f"| {rows} | {temperature:g} | {judged.accepted / judged.drafted:.1%} "
                  f"| {plain:,.0f} | {ahead:,.0f} | {ahead / plain:.2f} |", flush=True)


if __name__ == "__main__":
    cli.run(main)
