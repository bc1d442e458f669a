"""The 7-layer model of the benchmarks of whole models; see benchmarks/README.md."""

from dsv4_jax import ModelConfig

# Compression ratios 0, 0, 4, 128, 4, 128, 4: the dimensions at which MaxText 0.2.5 was measured.
CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=64,
    layer_types=("window", "window", "csa", "hca", "csa", "hca", "csa"),
    moe_types=("hash",) * 3 + ("learned",) * 4, num_attention_heads=4, head_dim=32,
    qk_rope_head_dim=32, q_lora_rank=16, o_groups=4, o_lora_rank=16, sliding_window=32,
    index_n_heads=4, index_head_dim=32, index_topk=16, n_routed_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=64, num_nextn_predict_layers=0,
)  # fmt: skip
