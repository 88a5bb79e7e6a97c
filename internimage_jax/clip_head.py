"""The attention-pooling head of InternImage-H and -G."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from internimage_jax.common import Context, along_channels, widened
from internimage_jax.shapes import CLIP_OUT, CLIP_WIDTH

_HEADS = 16


class CrossAttention(nnx.Module):
    """Multi-head attention whose projections have their biases apart, as the weights have them."""

    def __init__(self, ctx: Context):
        self.q = ctx.linear(CLIP_WIDTH, CLIP_WIDTH, bias=False)
        self.k = ctx.linear(CLIP_WIDTH, CLIP_WIDTH, bias=False)
        self.v = ctx.linear(CLIP_WIDTH, CLIP_WIDTH, bias=False)
        self.q_bias = ctx.vector(CLIP_WIDTH)
        self.k_bias = ctx.vector(CLIP_WIDTH)
        self.v_bias = ctx.vector(CLIP_WIDTH)
        self.proj = ctx.linear(CLIP_WIDTH, CLIP_OUT)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Args: query (N, Q, C), key and value (N, L, C). Returns (N, Q, out)."""

        def heads(linear: nnx.Linear, bias: nnx.Param, x: jax.Array) -> jax.Array:
            x = linear(x)
            x += along_channels(bias, x)
            return x.reshape(*x.shape[:2], _HEADS, -1)  # (N, L, heads, C / heads)

        q = heads(self.q, self.q_bias, query)
        k = heads(self.k, self.k_bias, key)
        v = heads(self.v, self.v_bias, value)
        scores = jnp.einsum("nqhc,nlhc->nhql", q * q.shape[-1] ** -0.5, k)
        weights = jax.nn.softmax(widened(scores)).astype(v.dtype)
        x = jnp.einsum("nhql,nlhc->nqhc", weights, v)
        return self.proj(x.reshape(*x.shape[:2], CLIP_WIDTH))


class AttentionPoolingBlock(nnx.Module):
    """Pools tokens by attention, with their mean as the query."""

    def __init__(self, ctx: Context):
        self.norm1_q = ctx.norm(CLIP_WIDTH)
        self.norm1_k = ctx.norm(CLIP_WIDTH)
        self.norm1_v = ctx.norm(CLIP_WIDTH)
        self.cross_dcn = CrossAttention(ctx)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Args: x (N, L, C). Returns (N, out)."""
        query = self.norm1_q(x.mean(axis=1, keepdims=True))
        return self.cross_dcn(query, self.norm1_k(x), self.norm1_v(x))[:, 0]


class ClipHead(nnx.Module):
    """Joins the last two maps and pools them by attention.

    The last map is brought to the third one's size by a pointwise convolution to four times the
    channels and a pixel shuffle.
    """

    def __init__(self, ctx: Context):
        third, last = ctx.config.level_channels(2), ctx.config.level_channels(3)
        self.channels = CLIP_OUT
        self.dcnv3_head_x4 = ctx.linear(last, 4 * CLIP_WIDTH)
        self.dcnv3_head_x3 = ctx.linear(third, CLIP_WIDTH)
        self.clip_projector = AttentionPoolingBlock(ctx)
        self.fc_norm = ctx.norm(CLIP_OUT)

    def __call__(self, third: jax.Array, last: jax.Array) -> jax.Array:
        """Args: third (N, 2h, 2w, C), last (N, h, w, 2C). Returns (N, channels)."""
        n, h, w, _ = last.shape
        x = self.dcnv3_head_x4(last).reshape(n, h, w, CLIP_WIDTH, 2, 2)
        x = x.transpose(0, 1, 4, 2, 5, 3).reshape(n, 4 * h * w, CLIP_WIDTH)  # pixel shuffle
        x += self.dcnv3_head_x3(third).reshape(n, 4 * h * w, CLIP_WIDTH)
        return self.fc_norm(self.clip_projector(x))
