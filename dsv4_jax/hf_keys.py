"""List the keys of published DeepSeek-V4 configurations and what each one is."""

from __future__ import annotations

import dataclasses

from dsv4_jax.config import CSA, HASH, HCA, LEARNED, WINDOW

# Names of the two schedules in what transformers writes.
ATTENTION_NAMES = {
    "sliding_attention": WINDOW,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
MOE_NAMES = {"hash_moe": HASH, "moe": LEARNED}
RATE_KEYS = {CSA: "compressed_sparse_attention", HCA: "heavily_compressed_attention"}
RATE_ALIASES = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}  # of early conversions
RELEASED_RATES = {CSA: 4, HCA: 128}

# Fields of YaRN and their keys in its parameters.
YARN_KEYS = {
    "yarn_factor": "factor",
    "yarn_original_positions": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}

# Fields that `inference/config.json` leaves to defaults, on which both releases agree.
OPTIONAL_FIELDS = frozenset({
    "rms_norm_eps", "hc_eps", "initializer_range", "max_position_embeddings",
    "num_nextn_predict_layers",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Naming:
    """The keys of one kind of configuration file."""

    fields: dict[str, str]  # field of ModelConfig -> key
    schedule: frozenset[str]  # keys of the schedule and of rotary parameters, read by functions
    fixed: dict[str, tuple]  # key -> the values that this architecture admits
    storage: frozenset[str]  # keys that say how tensors are stored, read by `storage_of`
    ignored: frozenset[str]  # other keys that do not change what the model computes
    num_layers: str
    num_hash_layers: str

    @property
    def known(self) -> frozenset[str]:
        """Every key that may occur."""
        keys = self.schedule | self.storage | self.ignored
        return keys | set(self.fields.values()) | set(self.fixed)


_SAME_NAME = (
    "vocab_size", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads",
    "index_head_dim", "index_topk", "n_routed_experts", "swiglu_limit", "hc_mult",
    "hc_sinkhorn_iters", "hc_eps",
)  # fmt: skip
_ROOT_SAME_NAME = (
    "hidden_size", "num_attention_heads", "sliding_window", "max_position_embeddings",
    "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor",
    "num_nextn_predict_layers", "rms_norm_eps", "initializer_range",
)  # fmt: skip

ROOT = Naming(
    fields={name: name for name in _SAME_NAME + _ROOT_SAME_NAME},
    schedule=frozenset({
        "num_hidden_layers", "compress_ratios", "layer_types", "compress_rates",
        "compress_rate_csa", "compress_rate_hca", "num_hash_layers", "mlp_layer_types",
        "rope_theta", "compress_rope_theta", "rope_scaling", "rope_parameters",
        "qk_rope_head_dim", "partial_rotary_factor",
    }),
    fixed={
        "model_type": ("deepseek_v4",),
        "architectures": (["DeepseekV4ForCausalLM"], ["DeepseekV4Model"], None),
        "num_key_value_heads": (1,),
        "n_shared_experts": (1,),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "mlp_bias": (False,),
        "hidden_act": ("silu",),
        "scoring_func": ("sqrtsoftplus",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "tie_word_embeddings": (False,),
        "router_jitter_noise": (0.0,),
        "chunk_size_feed_forward": (0,),
        "is_encoder_decoder": (False,),
        "per_layer_config": (None,),
    },
    storage=frozenset({"dtype", "torch_dtype", "quantization_config", "expert_dtype"}),
    ignored=frozenset(
        # tokens and outputs
        "transformers_version pad_token_id bos_token_id eos_token_id use_cache "
        "output_hidden_states output_attentions output_router_logits router_aux_loss_coef "
        "return_dict "
        # what every transformers configuration may carry
        "id2label label2id num_labels problem_type name_or_path _name_or_path _commit_hash "
        "attn_implementation experts_implementation auto_map tie_last_hidden_states "
        # settings of text generation
        "max_length min_length do_sample early_stopping num_beams temperature top_k top_p "
        "typical_p repetition_penalty length_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
        "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff "
        "eta_cutoff encoder_repetition_penalty num_assistant_tokens "
        "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
        "target_lookbehind num_beam_groups diversity_penalty".split()
    ),
    num_layers="num_hidden_layers",
    num_hash_layers="num_hash_layers",
)  # fmt: skip

INFERENCE = Naming(
    fields={name: name for name in _SAME_NAME} | {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "qk_rope_head_dim": "rope_head_dim",
        "sliding_window": "window_size",
        "rope_theta": "rope_theta",
        "compress_rope_theta": "compress_rope_theta",
        "yarn_factor": "rope_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
        "yarn_original_positions": "original_seq_len",
        "num_experts_per_tok": "n_activated_experts",
        "moe_intermediate_size": "moe_inter_dim",
        "routed_scaling_factor": "route_scale",
        "num_nextn_predict_layers": "n_mtp_layers",
        "rms_norm_eps": "norm_eps",
    },
    schedule=frozenset({"n_layers", "compress_ratios", "n_hash_layers"}),
    fixed={"n_shared_experts": (1,), "score_func": ("sqrtsoftplus",)},
    storage=frozenset({"dtype", "scale_fmt", "scale_dtype", "expert_dtype"}),
    ignored=frozenset({"max_batch_size", "max_seq_len"}),
    num_layers="n_layers",
    num_hash_layers="n_hash_layers",
)  # fmt: skip

# Of ROOT's fixed keys those that only transformers writes.
TRANSFORMERS_FIXED = frozenset({
    "mlp_bias", "router_jitter_noise", "chunk_size_feed_forward", "is_encoder_decoder",
    "per_layer_config",
})  # fmt: skip

# How tensors are stored: key -> the values that our formats of numbers admit.
DTYPES = ("bfloat16", "float16", "float32")
EXPERT_DTYPES = ("fp4", "fp8")
QUANTIZATION = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128], (128, 128)),
    "scale_fmt": ("ue8m0", "float"),
    "expert_dtype": EXPERT_DTYPES,
    # what else transformers writes
    "dequantize": (False,),
    "modules_to_convert": (None,),
    "modules_to_not_convert": (None, []),
}
INFERENCE_STORAGE = {
    "dtype": ("fp8", "bf16"),
    "scale_fmt": ("ue8m0", None),
    "scale_dtype": ("fp8", "fp32"),
    "expert_dtype": (*EXPERT_DTYPES, None),
}
