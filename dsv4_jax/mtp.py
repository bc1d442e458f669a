"""Multi-token prediction: one more layer that predicts the token after the next."""

from __future__ import annotations

from flax import linen as nn

from dsv4_jax.block import Batch, block_class
from dsv4_jax.cache import LayerCache, StackedCache
from dsv4_jax.config import LEARNED, WINDOW, ModelConfig, Runtime
from dsv4_jax.layer_stats import LayerStats
from dsv4_jax.layers import linear, rms_norm
from dsv4_jax.mhc import StreamHead, finish, start
from dsv4_jax.params import param
from dsv4_jax.shapes import Hidden, Streams


class MultiTokenPrediction(nn.Module):
    """Join the streams with the embedding of the next token and run one window layer.

    Source: fact sheet 4.
    """

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, streams: Streams, next_embedding: Hidden, batch: Batch,
        cache: StackedCache | None = None,
    ) -> tuple[Hidden, LayerStats, LayerCache | None]:
        """Return the vectors for the shared head, [b, t, d], and what the layer's block does.

        Args:
          streams: after the last layer of the main model.
          next_embedding: of the token after each token; 0 where the document ends.
          batch: of the main model, except that tokens are the next tokens.
        """
        c, d = self.config, streams.shape[-1]
        ones = nn.initializers.ones
        token_norm = param(self, "token_norm", "width", (d,), ones)
        stream_norm = param(self, "stream_norm", "width", (d,), ones)
        w_token = param(self, "w_token", "width -> width_out", (d, d))
        w_stream = param(self, "w_stream", "width -> width_out", (d, d))
        e = rms_norm(next_embedding, token_norm, eps=c.rms_norm_eps)
        h = rms_norm(streams, stream_norm, eps=c.rms_norm_eps)
        joined = linear("btd,dx->btx", e, w_token, self.runtime)[:, :, None]
        joined = joined + linear("btnd,dx->btnx", h, w_stream, self.runtime)
        block = block_class(self.runtime)(
            c, self.runtime, WINDOW, LEARNED, c.num_layers, name="block"
        )
        residual, stats, kept = block(start(joined, c, self.runtime), batch, cache)
        final_norm = param(self, "final_norm", "width", (d,), ones)
        x = StreamHead(c, self.runtime, name="head_mix")(finish(residual, c, self.runtime))
        return rms_norm(x, final_norm, eps=c.rms_norm_eps), stats, kept
