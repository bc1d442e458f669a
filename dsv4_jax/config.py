"""Describe the architecture (ModelConfig) and how it is computed (Runtime)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dsv4_jax.errors import InputError
from dsv4_jax.sharding import LAYOUTS, POD
from pallas_kernels.implementation import check_choices, implementation_of

WINDOW, CSA, HCA = "window", "csa", "hca"
HASH, LEARNED = "hash", "learned"
SERVED = "served"
PLAIN, FP8, FP4 = "plain", "fp8", "fp4"
ATTENTION_KINDS = (WINDOW, CSA, HCA)
MOE_KINDS = (HASH, LEARNED)
CACHE_FORMATS = ("float32", "bfloat16", SERVED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one DeepSeek-V4 model.

    Field names are those of the official `config.json`; the schedule is explicit.

    Raises:
      InputError: a dimension is impossible; the message names the field, what it must be and
        what it is.
    Source: official config.json of V4-Flash and V4-Pro; report sections 2 and 4.2.1.
    """

    vocab_size: int  # token ids
    hidden_size: int  # d, width of one residual stream
    layer_types: tuple[str, ...]  # attention of each layer: "window", "csa" or "hca"
    moe_types: tuple[str, ...]  # router of each layer: "hash" (by token id) or "learned"

    # Attention (report 2.3)
    num_attention_heads: int  # query heads; there is one shared key-value head
    head_dim: int = 512  # width of a head and of a key-value entry
    qk_rope_head_dim: int = 64  # trailing part of a head that is rotated
    q_lora_rank: int = 1024  # rank of the query projection, shared with the indexer
    o_groups: int = 8  # groups of heads in the output projection
    o_lora_rank: int = 1024  # rank of each group's output
    sliding_window: int = 128  # tokens a query sees uncompressed, itself included
    csa_ratio: int = 4  # tokens per compressed entry, overlapping blocks
    hca_ratio: int = 128  # tokens per heavily compressed entry, disjoint blocks
    index_n_heads: int = 64  # lightning indexer: query heads
    index_head_dim: int = 128  # lightning indexer: head width
    index_topk: int = 512  # compressed entries a CSA query keeps

    # Rotary embedding (fact sheet 2.3: window layers plain, compressed layers YaRN)
    rope_theta: float = 10_000.0  # base in window layers
    compress_rope_theta: float = 160_000.0  # base in CSA and HCA layers
    yarn_factor: float = 16.0  # context extension in CSA and HCA layers; 1 = off
    yarn_beta_fast: float = 32.0  # rotations above which a frequency is kept
    yarn_beta_slow: float = 1.0  # rotations below which a frequency is divided by the factor
    yarn_original_positions: int = 65_536  # context before the extension, tokens
    max_position_embeddings: int = 1_048_576  # context the model is made for, tokens

    # Mixture of experts (report 2.1)
    n_routed_experts: int = 256  # experts a router chooses from
    num_experts_per_tok: int = 6  # experts a token uses, beside the one shared expert
    moe_intermediate_size: int = 2048  # width of each expert, the shared one too
    routed_scaling_factor: float = 1.5  # scale of the routed sum
    swiglu_limit: float = 10.0  # clamp: gate from above, linear part from both sides

    # Manifold-constrained hyper-connections (report 2.2)
    hc_mult: int = 4  # residual streams
    hc_sinkhorn_iters: int = 20  # row and column normalisations of the mixing matrix
    hc_eps: float = 1e-6  # floor inside the mixing matrix's normalisations

    num_nextn_predict_layers: int = 1  # multi-token prediction blocks: 0 or 1
    rms_norm_eps: float = 1e-6

    # Training from scratch; V4's own initialisation is not published
    initializer_range: float = 0.02  # standard deviation of weight matrices, official config
    hc_gate_init: float = 0.01  # initial gate of mHC's dynamic part, mHC paper
    hash_seed: int = 0  # seed of the hash-routing tables

    @classmethod
    def from_hf(cls, source: Mapping | str | os.PathLike) -> ModelConfig:
        """Read an HF or official `config.json`, given as a mapping, a file or its directory.

        Raises:
          InputError: a key or value is unknown, missing or not of this architecture.
        """
        from dsv4_jax.hf_config import model_config_from_hf

        return model_config_from_hf(source)

    @property
    def num_layers(self) -> int:
        """Layers of the main model, the multi-token prediction block left out."""
        return len(self.layer_types)

    def ratio(self, kind: str) -> int:
        """Tokens per compressed entry in a layer of this attention kind; 0 for window layers."""
        return {WINDOW: 0, CSA: self.csa_ratio, HCA: self.hca_ratio}[kind]

    def __post_init__(self):
        for name in ("layer_types", "moe_types"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_field_types(self)
        _check_schedule(self)
        _check_dims(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model is computed: all that changes speed, memory or rounding, not the model.

    Where `linears` is not "plain", products round tokens alone: their weights are to be rounded
    once, before, by `round_weights`. Training and evaluation of runs do this by themselves.
    """

    dtype: str = "float32"  # of activations and products: "float32" or "bfloat16"
    remat: bool = False  # recompute each block in the backward pass instead of storing it
    csa: str = "sparse"  # CSA attends to "sparse" top-k entries or is "dense" over the visible
    index_learns: bool = False  # training: compare index scores with the attention of entries
    moe: str = "auto"  # grouped expert products: "auto", "blocks" or "ragged"
    expert_waves: int = 2  # parts of the tokens, one of which travels while another is computed
    expert_slack: float = 1.25  # rows that a device takes at once, over those of an even load
    kernels: str = "auto"  # "auto": the device's where they pay, "xla": none; also by operation
    scan_unroll: int = 1  # layer pairs in one step of the scan over depth
    linears: str = PLAIN  # factors of products rounded to "fp8", or experts' weights to "fp4" too
    keys: str = PLAIN  # keys and compressed entries rounded to "fp8", as served
    indexer: str = PLAIN  # index queries and keys rounded to "fp4", scores to bfloat16, as served
    cache: str = "float32"  # stored keys: "float32", "bfloat16" or "served" (FP8, FP4 index keys)
    batch_invariant: bool = False  # inference: a row has the same bits whatever its batch
    mesh: jax.sharding.Mesh | None = None  # whose devices run the model, under `jax.shard_map`
    layout: str = POD  # how its weights lie on the mesh, see `sharding.LAYOUTS`

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    def implementation(self, operation: str) -> str:
        """Return which implementation of an operation runs."""
        return implementation_of(operation, self.kernels)

    @property
    def entry_format(self) -> str:
        """How a cache stores keys and entries: what is rounded as served, is stored as served."""
        return SERVED if self.keys == FP8 else self.cache

    @property
    def index_format(self) -> str:
        """How a cache stores index keys."""
        return SERVED if self.indexer == FP4 else self.cache

    def __post_init__(self):
        check_field_types(self)
        check_choice("Runtime.dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("Runtime.csa", self.csa, ("sparse", "dense"))
        check_choice("Runtime.moe", self.moe, ("auto", "blocks", "ragged"))
        check_choice("Runtime.linears", self.linears, (PLAIN, FP8, FP4))
        check_choice("Runtime.keys", self.keys, (PLAIN, FP8))
        check_choice("Runtime.indexer", self.indexer, (PLAIN, FP4))
        check_choice("Runtime.cache", self.cache, CACHE_FORMATS)
        check_choice("Runtime.layout", self.layout, tuple(LAYOUTS))
        try:
            check_choices(self.kernels)
        except ValueError as error:
            raise InputError(f"Runtime.kernels: {error}") from None
        for name in ("scan_unroll", "expert_waves", "expert_slack"):
            if not 1 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"Runtime.{name}: expected at least 1, got {value}")


def check_choice(name: str, value, choices: tuple) -> None:
    """Raise an InputError that lists the choices unless value is one of them."""
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


SEEDS = "0 to 2^32 - 1"


def is_seed(value: int) -> bool:
    """Say whether every random generator of a run takes the value."""
    return 0 <= value < 2**32


def check_field_types(config) -> None:
    """Raise an InputError naming the first field of a dataclass whose value is ill-typed.

    Understands the annotations that configs use: int, float (an int is taken), str, bool and
    `tuple[str, ...]`, each also with `| None`.
    """
    accepted = {"int": int, "float": (int, float), "str": str, "bool": bool}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        annotation = str(field.type)
        if annotation.endswith("| None"):
            if value is None:
                continue
            annotation = annotation.removesuffix("| None").strip()
        if annotation == "tuple[str, ...]":
            correct = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        elif annotation in accepted:
            correct = isinstance(value, accepted[annotation])
            correct = correct and (annotation == "bool" or not isinstance(value, bool))
        else:
            continue
        if not correct:
            raise InputError(
                f"{type(config).__name__}.{field.name}: expected {annotation}, got {value!r}"
            )


def _check_schedule(c: ModelConfig) -> None:
    if not c.layer_types:
        raise InputError("ModelConfig.layer_types: expected at least one layer, got none")
    if len(c.moe_types) != len(c.layer_types):
        raise InputError(
            f"ModelConfig.moe_types: expected one entry per layer ({len(c.layer_types)}), "
            f"got {len(c.moe_types)}"
        )
    for kind in c.layer_types:
        check_choice("ModelConfig.layer_types", kind, ATTENTION_KINDS)
    for kind in c.moe_types:
        check_choice("ModelConfig.moe_types", kind, MOE_KINDS)
    check_choice("ModelConfig.num_nextn_predict_layers", c.num_nextn_predict_layers, (0, 1))


def _check_dims(c: ModelConfig) -> None:
    non_negative = {"num_nextn_predict_layers", "hash_seed"}
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if isinstance(value, (int, float)) and not (0 < value < float("inf")):
            if value != 0 or field.name not in non_negative:
                raise InputError(
                    f"ModelConfig.{field.name}: expected a positive number, got {value}"
                )
    rules = (
        ("qk_rope_head_dim", c.qk_rope_head_dim % 2 == 0, "even: it is rotated in pairs"),
        (
            "qk_rope_head_dim",
            c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim),
            f"at most head_dim ({c.head_dim}) and index_head_dim ({c.index_head_dim})",
        ),
        (
            "o_groups",
            c.num_attention_heads % c.o_groups == 0,
            f"a divisor of num_attention_heads ({c.num_attention_heads})",
        ),
        (
            "num_experts_per_tok",
            c.num_experts_per_tok <= c.n_routed_experts,
            f"at most n_routed_experts ({c.n_routed_experts})",
        ),
        ("yarn_factor", c.yarn_factor >= 1, "at least 1 (1 is no extension)"),
        (
            "yarn_beta_fast",
            c.yarn_beta_fast > c.yarn_beta_slow,
            f"more than yarn_beta_slow ({c.yarn_beta_slow})",
        ),
        ("hash_seed", is_seed(c.hash_seed), SEEDS),
        ("csa_ratio", c.csa_ratio >= 2, "at least 2: entries stand for several tokens"),
        ("hca_ratio", c.hca_ratio >= 2, "at least 2: entries stand for several tokens"),
    )
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"ModelConfig.{name}: expected {expected}, got {getattr(c, name)}")
