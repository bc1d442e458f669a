"""DeepSeekMoE: a few of many routed experts for each token, beside one that all tokens share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.collectives import sum_over
from dsv4_jax.config import HASH, ModelConfig, Runtime
from dsv4_jax.experts import ExpertWeights, routed_experts
from dsv4_jax.layers import clamped_swiglu, linear, project
from dsv4_jax.params import Init, param
from dsv4_jax.router import (
    Routing,
    affinity,
    balanced_table,
    best_experts,
    expert_load,
    route,
    sequence_balance,
)
from dsv4_jax.shapes import Array, Bool, Float, Hidden, Int, Tokens


class Experts(nn.Module):
    """The weights of the routed experts and their sum."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: Hidden, routing: Routing) -> Hidden:
        c = self.config
        e, d, f = c.n_routed_experts, x.shape[-1], c.moe_intermediate_size
        w_gate = param(self, "w_gate", "experts | width -> expert_width", (e, d, f))
        w_up = param(self, "w_up", "experts | width -> expert_width", (e, d, f))
        w_down = param(self, "w_down", "experts | expert_width -> width", (e, f, d))
        return routed_experts(
            x, routing, ExpertWeights(w_gate, w_up, w_down), limit=c.swiglu_limit,
            runtime=self.runtime,
        )


class SharedExpert(nn.Module):
    """The expert that every token uses."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        d, f, limit = x.shape[-1], self.config.moe_intermediate_size, self.config.swiglu_limit
        w_gate = param(self, "w_gate", "width -> expert_width", (d, f))
        w_up = param(self, "w_up", "width -> expert_width", (d, f))
        w_down = param(self, "w_down", "expert_width -> width", (f, d))
        gate, up = (
            linear("btd,df->btf", x, w, self.runtime, preferred_element_type=jnp.float32)
            for w in (w_gate, w_up)
        )
        hidden = clamped_swiglu(gate, up, limit).astype(x.dtype)
        y = linear(
            "btf,fd->btd", hidden, w_down, self.runtime, preferred_element_type=jnp.float32
        )
        return sum_over(y, ("tensor",), self.runtime.mesh).astype(x.dtype)


class MoE(nn.Module):
    """Route, run the experts, add the shared expert.

    Routing runs in float32 throughout.

    Source: report 2.1; fact sheet 3.
    """

    config: ModelConfig
    runtime: Runtime
    kind: str  # "hash" or "learned"
    layer: int  # seeds the hash table

    @nn.compact
    def __call__(
        self, x: Hidden, tokens: Tokens, valid: Bool[Array, "b t"],
        experts: Int[Array, "b t a"] | None = None,
    ) -> tuple[Hidden, Int[Array, "b t a"], Float[Array, " e"], Float[Array, ""]]:
        """Return the output, each token's experts, the load of each expert and the balance loss.

        Args:
          experts: take these, with the weights that their scores give; None: the best.
        """
        c = self.config
        count = c.n_routed_experts
        w_router = param(
            self, "w_router", "width -> router_experts", (x.shape[-1], count), exact=True
        )
        logits = project(
            "btd,de->bte", x.astype(jnp.float32), w_router, self.runtime, precision="highest"
        )
        scores = affinity(logits)
        if experts is None:
            experts = self._choose(scores, tokens)
        balance = jnp.zeros(())
        if self.kind != HASH:
            balance = sequence_balance(scores, c.num_experts_per_tok, valid)
        routing = route(scores, experts, c.routed_scaling_factor)
        # Padding goes to the expert past the last, which does nothing.
        routing = routing._replace(experts=jnp.where(valid[..., None], experts, count))
        y = Experts(c, self.runtime, name="experts")(x, routing)
        y = y + SharedExpert(c, self.runtime, name="shared")(x)
        return y, experts, expert_load(experts, count, valid), balance

    def _choose(self, scores: Float[Array, "b t e"], tokens: Tokens) -> Int[Array, "b t a"]:
        c = self.config
        if self.kind == HASH:
            shape = (c.vocab_size, c.num_experts_per_tok)
            init = table_init(c.hash_seed, self.layer, c.n_routed_experts)
            return param(self, "hash_table", "table_row choice", shape, init)[tokens]
        bias = param(
            self, "selection_bias", "router_experts", (c.n_routed_experts,),
            nn.initializers.zeros,
        )
        return best_experts(scores, bias, c.num_experts_per_tok)


@functools.cache
def table_init(seed: int, layer: int, experts: int) -> Init:
    """Make the hash-routing table of a layer; it depends on the config's seed alone."""

    def init(key, shape, dtype):
        key = jax.random.fold_in(jax.random.key(seed), layer)
        return balanced_table(key, shape[0], experts, shape[1])

    return init
