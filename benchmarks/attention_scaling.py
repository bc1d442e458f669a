"""Measure one layer of each attention kind, forward and backward, over sequence lengths.

    python benchmarks/attention_scaling.py --lengths=1024,4096

Prints seconds, temporary bytes and GFLOP of the loss and gradient of a one-layer model. The
dimensions are those at which MaxText 0.2.5 was measured; see benchmarks/README.md.
"""

from __future__ import annotations

import sys
import time

import jax
from absl import app, flags

from dsv4_jax import ModelConfig, Runtime, Transformer, init_params
from dsv4_jax.compiler import compiler_options
from dsv4_jax.flops import count_flops
from dsv4_jax.loss import next_token_loss
from dsv4_jax.params import merge, split_trainable

LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096"], "Tokens per sequence.")
LAYERS = flags.DEFINE_list(
    "layers", ["window", "hca", "csa-16", "csa-512"], "Attention kinds; csa-K keeps K entries."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs; the fastest is printed.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")


def layer_config(name: str) -> ModelConfig:
    """Return a one-layer model of the measured dimensions; name is a kind, or csa-K."""
    kind, _, topk = name.partition("-")
    return ModelConfig(
        vocab_size=256, hidden_size=64, layer_types=(kind,), moe_types=("learned",),
        num_attention_heads=4, head_dim=32, qk_rope_head_dim=32, q_lora_rank=16, o_groups=4,
        o_lora_rank=16, sliding_window=32, index_n_heads=4, index_head_dim=32,
        index_topk=int(topk or 16), n_routed_experts=4, num_experts_per_tok=1,
        moe_intermediate_size=64, num_nextn_predict_layers=0,
    )


def measure(config: ModelConfig, length: int) -> tuple[float, int, float, float]:
    """Return seconds, temporary bytes, GFLOP in all and GFLOP of matrix products."""
    model = Transformer(config, Runtime(dtype=DTYPE.value))
    trainable, frozen = split_trainable(init_params(config, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, config.vocab_size)

    def loss(trainable, tokens):
        params = merge(trainable, frozen)
        features = model.apply({"params": params}, tokens, method="features")
        return next_token_loss(features.hidden, features.head, tokens)

    step = jax.value_and_grad(loss)
    flops = count_flops(step, trainable, tokens)
    program = jax.jit(step, compiler_options=compiler_options())
    compiled = program.lower(trainable, tokens).compile()
    jax.block_until_ready(compiled(trainable, tokens))
    seconds = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(compiled(trainable, tokens))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return min(seconds), temporary, flops.total / 1e9, flops.matmul / 1e9


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {DTYPE.value}, forward and backward")
    print("| layer | tokens | seconds | temporary MB | GFLOP | of which matmul |")
    print("|---|---|---|---|---|---|")
    for layer in LAYERS.value:
        for length in map(int, LENGTHS.value):
            seconds, temporary, total, matmul = measure(layer_config(layer), length)
            print(
                f"| {layer} | {length} | {seconds:.3f} | {temporary / 1e6:.0f} | {total:.2f} "
                f"| {matmul:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
