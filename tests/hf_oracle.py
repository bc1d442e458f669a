"""The independent reference: a random DeepSeek-V4 of transformers and its weights in our tree.

Source: transformers 5.23 `DeepseekV4ForCausalLM`, eager, on CPU; float32, gradients in
float64.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
from flax.linen import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_jax.config import CSA, HASH, HCA, WINDOW, ModelConfig
from dsv4_jax.model import param_shapes
from dsv4_jax.params import FROZEN_NAMES
from dsv4_jax.schedule import factor_schedule

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gains

ATTENTION_NAMES = {
    WINDOW: "sliding_attention",
    CSA: "compressed_sparse_attention",
    HCA: "heavily_compressed_attention",
}
SAME_NAME = (
    "vocab_size", "hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads",
    "index_head_dim", "index_topk", "rope_theta", "compress_rope_theta",
    "max_position_embeddings", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit", "hc_mult",
    "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps",
)  # fmt: skip

# Standard deviation of random tensors around `CENTRES`, by the end of the name. Other tensors are
# matrices, drawn so that a product keeps the scale of its input.
SPREADS = {
    "norm.weight": 0.2,
    "layernorm.weight": 0.2,
    "embed_tokens.weight": 1.0,
    "sinks": 1.0,
    "position_bias": 1.0,
    "base": 1.0,
    "scale": 0.3,
    "e_score_correction_bias": 0.3,
}
CENTRES = {"norm.weight": 1.0, "layernorm.weight": 1.0, "scale": 1.0}


def hf_config(c: ModelConfig) -> DeepseekV4Config:
    """Translate a configuration into that of transformers, which has no prediction block."""
    assert c.num_nextn_predict_layers == 0, "transformers has no multi-token prediction block"
    yarn = {
        "type": "yarn",
        "factor": c.yarn_factor,
        "beta_fast": c.yarn_beta_fast,
        "beta_slow": c.yarn_beta_slow,
        "original_max_position_embeddings": c.yarn_original_positions,
    }
    rates = {ATTENTION_NAMES[CSA]: c.csa_ratio, ATTENTION_NAMES[HCA]: c.hca_ratio}
    return DeepseekV4Config(
        **{name: getattr(c, name) for name in SAME_NAME},
        num_hidden_layers=c.num_layers,
        num_nextn_predict_layers=0,
        layer_types=[ATTENTION_NAMES[kind] for kind in c.layer_types],
        mlp_layer_types=["hash_moe" if kind == HASH else "moe" for kind in c.moe_types],
        compress_rates=rates,
        rope_scaling=yarn if c.yarn_factor > 1 else None,
        attn_implementation="eager",
        experts_implementation="eager",
    )


class Oracle:
    """A model of transformers in which every weight and buffer is random.

    Args:
      seed: of the weights; the same seed gives the same model.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.model = DeepseekV4ForCausalLM(hf_config(config)).float().eval()
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(torch.from_numpy(_random_tensor(rng, name, tensor, config)))

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every weight and persistent buffer by name."""
        return {name: t.detach().numpy() for name, t in self.model.state_dict().items()}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [b, t, v] of token ids [b, t]."""
        with torch.no_grad():
            return _logits(self.model, tokens).numpy()

    def gradients(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the gradients of the mean next-token cross-entropy over b (t-1) targets.

        They are computed in float64: where sums cancel, those of float32 carry rounding of their
        own, as large as ours. The indexer's are zero: nothing flows through the selection of
        entries.
        """
        model = copy.deepcopy(self.model).double()
        targets = torch.from_numpy(tokens[:, 1:]).long()
        with _float64_islands():
            logits = _logits(model, tokens)[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        return {
            name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.float().numpy()
            for name, p in model.named_parameters()
        }


def _logits(model: DeepseekV4ForCausalLM, tokens: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(tokens).long(), use_cache=False).logits


@contextlib.contextmanager
def _float64_islands() -> Iterator[None]:
    """Let the parts that a model of float64 would still compute in float32 stay in float64."""
    with (
        mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _random_tensor(rng, name: str, tensor: torch.Tensor, config: ModelConfig) -> np.ndarray:
    """Draw the value of one tensor; a hash table has distinct experts in each row."""
    shape = tuple(tensor.shape)
    if name.endswith("tid2eid"):
        order = rng.random((shape[0], config.n_routed_experts)).argsort(axis=1)
        return order[:, : shape[1]]
    ending = next((ending for ending in SPREADS if name.endswith(ending)), None)
    spread = shape[-1] ** -0.5 if ending is None else SPREADS[ending]
    centre = CENTRES[ending] if ending in CENTRES else 0.0
    return (centre + spread * rng.standard_normal(shape)).astype(np.float32)


def import_tensors(named: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """Rearrange tensors named as transformers names them into our tree of parameters.

    Every rearrangement is linear, so the same function maps gradients, which come without the
    frozen leaves.

    Raises:
      AssertionError: a name is unknown, or the leaves or their shapes are not those of our model.
    """
    prelude, num_pairs = factor_schedule(config)
    leaves, stacks = {}, {}
    for name, tensor in named.items():
        layer, table = _locate(name, config)
        suffix = name if layer is None else name.split(".", 3)[3]
        assert suffix in table, f"no place for {name}"
        for path, transform in table[suffix].items():
            if layer is None:
                leaves[path] = transform(tensor)
            elif layer < prelude:
                leaves[f"layers_{layer}/{path}"] = transform(tensor)
            else:
                stack = stacks.setdefault(f"pairs/{config.layer_types[layer]}/{path}", {})
                stack[(layer - prelude) // 2] = transform(tensor)
    for path, stack in stacks.items():
        assert sorted(stack) == list(range(num_pairs)), f"{path}: has layers {sorted(stack)}"
        leaves[path] = np.stack([stack[pair] for pair in range(num_pairs)])
    _check_leaves(leaves, config)
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def _locate(name: str, config: ModelConfig) -> tuple[int | None, dict]:
    """Return the layer that a name belongs to, or None, and the table that has its place."""
    if not name.startswith("model.layers."):
        return None, _outer_table(config)
    layer = int(name.split(".")[2])
    return layer, _layer_table(config, config.layer_types[layer])


def _check_leaves(leaves: dict[str, np.ndarray], config: ModelConfig) -> None:
    """Compare paths, shapes and integer types with those of our initialisation."""
    ours = flatten_dict(meta.unbox(param_shapes(config)), sep="/")
    frozen = {path for path in ours if path.rpartition("/")[2] in FROZEN_NAMES}
    expected = ours.keys() if frozen & leaves.keys() else ours.keys() - frozen
    missing, unknown = sorted(expected - leaves.keys()), sorted(leaves.keys() - expected)
    assert not missing and not unknown, f"leaves not filled: {missing}; not ours: {unknown}"
    for path, leaf in leaves.items():
        found, wanted = (leaf.shape, leaf.dtype), (ours[path].shape, ours[path].dtype)
        assert found == wanted, f"{path}: expected {wanted}, got {found}"


Table = dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _linear(*shape: int) -> Callable:
    """Turn a torch weight [out, in] into [in, out] and split its axes as given."""
    return lambda w: w.T.reshape(shape or w.T.shape)


def _outer_table(c: ModelConfig) -> Table:
    n, d = c.hc_mult, c.hidden_size
    return {
        "model.embed_tokens.weight": {"embedding": _same},
        "model.norm.weight": {"final_norm": _same},
        "model.hc_head.hc_fn": {"head_mix/fn": lambda w: w.reshape(n, n, d).transpose(2, 1, 0)},
        "model.hc_head.hc_base": {"head_mix/base": _same},
        "model.hc_head.hc_scale": {"head_mix/scale": _same},
        "lm_head.weight": {"head": _linear()},
    }


def _layer_table(c: ModelConfig, kind: str) -> Table:
    """Return, for each name within a layer, our paths and how they are made from the tensor."""
    table = {
        "input_layernorm.weight": {"attention_norm": _same},
        "post_attention_layernorm.weight": {"moe_norm": _same},
        **_prefixed("attn_hc.", "attention_mix/", _mix_table(c)),
        **_prefixed("ffn_hc.", "moe_mix/", _mix_table(c)),
        **_prefixed("self_attn.", "attention/", _attention_table(c)),
        **_prefixed("mlp.", "moe/", _moe_table(c)),
    }
    if kind != WINDOW:
        compressor = _compressor_table(2 if kind == CSA else 1)
        table |= _prefixed("self_attn.compressor.", "attention/compressor/", compressor)
    if kind == CSA:
        table |= _prefixed("self_attn.compressor.indexer.", "attention/indexer/", _indexer_table(c))
    return table


def _prefixed(theirs: str, ours: str, table: Table) -> Table:
    return {
        theirs + name: {ours + path: transform for path, transform in places.items()}
        for name, places in table.items()
    }


def _mix_table(c: ModelConfig) -> Table:
    n, d = c.hc_mult, c.hidden_size

    def rows(start: int, stop: int) -> Callable:
        return lambda w: w[start:stop].reshape(stop - start, n, d).transpose(2, 1, 0)

    return {
        "fn": {
            "fn_pre": rows(0, n),
            "fn_post": rows(n, 2 * n),
            "fn_comb": lambda w: rows(2 * n, 2 * n + n * n)(w).reshape(d, n, n, n),
        },
        "base": {
            "base_pre": lambda b: b[:n],
            "base_post": lambda b: b[n : 2 * n],
            "base_comb": lambda b: b[2 * n :].reshape(n, n),
        },
        "scale": {"scale": _same},
    }


def _attention_table(c: ModelConfig) -> Table:
    h, k, r, d = c.num_attention_heads, c.head_dim, c.q_lora_rank, c.hidden_size
    g, o = c.o_groups, c.o_lora_rank
    return {
        "q_a_proj.weight": {"w_q_a": _linear()},
        "q_a_norm.weight": {"q_norm": _same},
        "q_b_proj.weight": {"w_q_b": _linear(r, h, k)},
        "kv_proj.weight": {"w_kv": _linear()},
        "kv_norm.weight": {"kv_norm": _same},
        "sinks": {"sink": _same},
        "o_a_proj.weight": {
            "w_o_a": lambda w: w.reshape(g, o, h // g, k).transpose(0, 2, 3, 1),
        },
        "o_b_proj.weight": {"w_o_b": _linear(g, o, d)},
    }


def _compressor_table(series: int) -> Table:
    """Return the places of a compressor; two overlapping series get an axis of their own."""

    def split(w: np.ndarray) -> np.ndarray:
        return w.reshape(series, -1, w.shape[1]).transpose(0, 2, 1) if series > 1 else w.T

    def split_bias(b: np.ndarray) -> np.ndarray:
        return b.reshape(b.shape[0], series, -1) if series > 1 else b

    return {
        "kv_proj.weight": {"w_kv": split},
        "gate_proj.weight": {"w_gate": split},
        "position_bias": {"position_bias": split_bias},
        "kv_norm.weight": {"norm": _same},
    }


def _indexer_table(c: ModelConfig) -> Table:
    return {
        **_prefixed("", "compressor/", _compressor_table(2)),
        "q_b_proj.weight": {"w_q": _linear(c.q_lora_rank, c.index_n_heads, c.index_head_dim)},
        "scorer.weights_proj.weight": {"w_heads": _linear()},
    }


def _moe_table(c: ModelConfig) -> Table:
    f = c.moe_intermediate_size
    return {
        "gate.weight": {"w_router": _linear()},
        "gate.e_score_correction_bias": {"selection_bias": _same},
        "gate.tid2eid": {"hash_table": lambda table: table.astype(np.int32)},
        "experts.gate_up_proj": {
            "experts/w_gate": lambda w: w[:, :f].transpose(0, 2, 1),
            "experts/w_up": lambda w: w[:, f:].transpose(0, 2, 1),
        },
        "experts.down_proj": {"experts/w_down": lambda w: w.transpose(0, 2, 1)},
        "shared_experts.gate_proj.weight": {"shared/w_gate": _linear()},
        "shared_experts.up_proj.weight": {"shared/w_up": _linear()},
        "shared_experts.down_proj.weight": {"shared/w_down": _linear()},
    }
