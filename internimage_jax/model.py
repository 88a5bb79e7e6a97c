"""InternImage in Flax NNX, its layers in reading order.

An attribute's path is its parameter's path, so `levels.0.blocks.2.dcn.offset.kernel` is found here
by reading along. All maps are (N, H, W, C). Reference: Wang et al., InternImage (CVPR 2023, arXiv
2211.05778), section 3.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

import xla_ops
from internimage_jax.clip_head import ClipHead
from internimage_jax.common import (
    Context,
    activation,
    add_normalize,
    along_channels,
    apply,
    at_least_float32,
    convolve,
    drop_path,
    dropout,
    linear_of,
    normalize,
    normalize_add,
    on_host,
    operand,
    scaled,
    split,
)
from internimage_jax.config import InternImageConfig
from internimage_jax.initial import fill, initial_values
from internimage_jax.preprocess import Preprocessing
from xla_ops.custom_call import forward_mode_named


class StemLayer(nnx.Module):
    """Two convolutions that bring an image to a quarter of its sides."""

    def __init__(self, ctx: Context):
        channels, kind = ctx.config.channels, ctx.config.norm_layer
        self.conv1 = ctx.conv(3, channels // 2, 3, strides=2)
        self.norm1 = ctx.norm(channels // 2, kind)
        self.conv2 = ctx.conv(channels // 2, channels, 3, strides=2)
        self.norm2 = ctx.norm(channels, kind)
        self.activation = activation(ctx.config)
        self.fused = ctx.config.act_layer == "GELU"
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = convolve(self.conv1, x, self.implementation)  # (N, H/2, W/2, C/2)
        x = normalize(self.norm1, x, train, self.implementation)
        if self.fused:  # the norm has added its bias, but the kernel's GELU is the shorter one
            none = jnp.zeros(x.shape[-1], x.dtype)
            x = xla_ops.bias_gelu(x, none, implementation=self.implementation)
        else:
            x = self.activation(x)
        x = convolve(self.conv2, x, self.implementation)  # (N, H/4, W/4, C)
        return normalize(self.norm2, x, train, self.implementation)


class DownsampleLayer(nnx.Module):
    """A convolution that halves the sides and doubles the channels."""

    def __init__(self, ctx: Context, channels: int):
        self.conv = ctx.conv(channels, 2 * channels, 3, bias=False, strides=2)
        self.norm = ctx.norm(2 * channels, ctx.config.norm_layer)
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = convolve(self.conv, x, self.implementation)  # (N, H/2, W/2, 2C)
        return normalize(self.norm, x, train, self.implementation)


class MLPLayer(nnx.Module):
    """The feed-forward half of a layer."""

    def __init__(self, ctx: Context, channels: int):
        hidden = int(channels * ctx.config.mlp_ratio)
        self.fc1 = ctx.linear(channels, hidden)
        self.fc2 = ctx.linear(hidden, channels)
        self.activation = activation(ctx.config)
        self.drop_rate = ctx.config.drop_rate
        self.fused = ctx.config.act_layer == "GELU"
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        key1, key2 = split(key, 2)
        if self.fused:  # bias and activation, and maybe the product, in one pass
            x = apply(self.fc1, x, self.implementation, gelu=True)
        else:
            x = self.activation(apply(self.fc1, x, self.implementation))
        x = dropout(x, self.drop_rate, key1)
        return dropout(apply(self.fc2, x, self.implementation), self.drop_rate, key2)


class DepthwiseLayer(nnx.Module):
    """The depthwise convolution, norm and activation that DCNv3 reads its offsets from."""

    def __init__(self, ctx: Context, channels: int):
        size = ctx.config.dw_kernel_size or 3
        self.conv = ctx.conv(channels, channels, size, feature_group_count=channels)
        self.norm = ctx.norm(channels, ctx.config.norm_layer)
        self.activation = activation(ctx.config)
        # As one operator where it is the released models' kind.
        self.fused = (ctx.config.norm_layer, ctx.config.act_layer) == ("LN", "GELU")
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = x.astype(self.conv.dtype)
        kernel = operand(x, self.conv.kernel)[:, :, 0]  # (size, size, C)
        bias = operand(x, self.conv.bias)
        if self.fused:
            scale, offset = operand(x, self.norm.scale), operand(x, self.norm.bias)
            return xla_ops.dwconv_norm_gelu(
                *(x, kernel, bias, scale, offset),
                epsilon=self.norm.epsilon,
                implementation=self.implementation,
            )
        x = xla_ops.depthwise_convolution(x, kernel.astype(x.dtype))
        x = x + along_channels(self.conv.bias, x)
        return self.activation(normalize(self.norm, x, train, self.implementation))


class DCNv3(nnx.Module):
    """Deformable convolution version 3 with the projections around it (section 3.1)."""

    def __init__(self, ctx: Context, channels: int, group: int):
        config = ctx.config
        points = 9 - config.remove_center
        self.dw_conv = DepthwiseLayer(ctx, channels)
        self.offset = ctx.linear(channels, group * points * 2)
        self.mask = ctx.linear(channels, group * points)
        self.input_proj = ctx.linear(channels, channels)
        self.output_proj = ctx.linear(channels, channels)
        if config.center_feature_scale:
            self.center_feature_scale_proj = ctx.linear(channels, group)
        self.center_feature_scale = config.center_feature_scale
        self.group = group
        self.dtype = ctx.dtype
        self.offset_scale = float(config.offset_scale)
        self.remove_center = config.remove_center
        self.implementation: xla_ops.Implementation | None = ctx.implementation
        self.implementation_of_products: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        features = self.dw_conv(x, train=train)
        product = functools.partial(apply, implementation=self.implementation_of_products)
        x = product(self.input_proj, x)
        y = xla_ops.dcnv3_fused(
            x,
            product(self._record(), features),
            group=self.group,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            center_feature_scale=self.center_feature_scale,
            implementation=self.implementation,
        )
        return product(self.output_proj, y)

    def fuse(self) -> None:
        """Joins the products that offsets, masks and centre scales are made by, for good."""
        if hasattr(self, "record"):
            return
        self.record = self._record()
        del self.offset, self.mask
        if self.center_feature_scale:
            del self.center_feature_scale_proj

    def _record(self) -> nnx.Linear:
        """The products that make offsets, mask logits and centre-scale logits, as one."""
        if hasattr(self, "record"):
            return self.record
        layout = xla_ops.Record(self.group, 9 - self.remove_center)
        parts = [self.offset, self.mask]
        if self.center_feature_scale:
            parts.append(self.center_feature_scale_proj)
        kernel = layout.join(*(on_host(part.kernel) for part in parts))  # (C, width)
        bias = layout.join(*(on_host(part.bias) for part in parts))
        return linear_of(jnp.asarray(kernel), jnp.asarray(bias), self.dtype)


class InternImageLayer(nnx.Module):
    """DCNv3 and MLP, each a residual branch with its norms (section 3.2, "Basic block")."""

    def __init__(self, ctx: Context, channels: int, group: int):
        config = ctx.config
        self.norm1 = ctx.norm(channels)
        self.dcn = DCNv3(ctx, channels, group)
        self.norm2 = ctx.norm(channels)
        self.mlp = MLPLayer(ctx, channels)
        self.layer_scale = config.layer_scale is not None
        if self.layer_scale:
            self.gamma1, self.gamma2 = ctx.vector(channels), ctx.vector(channels)
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers
        self.post_norm = config.post_norm
        self.res_post_norm = config.res_post_norm
        if self.res_post_norm:
            self.res_post_norm1 = ctx.norm(channels)
            self.res_post_norm2 = ctx.norm(channels)

    def __call__(
        self,
        x: jax.Array,
        normalized: jax.Array | None = None,
        following: nnx.LayerNorm | None = None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        drop_path_rate: jax.Array | float | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the layer's map, and what the norm `following` makes of it, if there is one.

        `normalized` is what `norm1` makes of `x`, where the layer before has made it, since a sum
        and the norm after it can be one pass.
        """
        key1, key2, key3 = split(key, 3)
        if normalized is None:
            normalized = x if self.post_norm else self._normalize(self.norm1, x)
        y = self.dcn(normalized, train=train)
        own1, own2 = None, None
        if self.post_norm:
            own1, own2 = self.norm1, self.norm2
        elif self.res_post_norm:
            own1, own2 = self.res_post_norm1, self.res_post_norm2
        gamma1, gamma2 = (self.gamma1, self.gamma2) if self.layer_scale else (None, None)
        norm2 = None if self.post_norm else self.norm2
        x, normalized = self._add(x, y, own1, gamma1, norm2, drop_path_rate, key1)
        y = self.mlp(x if normalized is None else normalized, key=key2)
        return self._add(x, y, own2, gamma2, following, drop_path_rate, key3)

    def _add(
        self,
        x: jax.Array,
        y: jax.Array,
        norm: nnx.LayerNorm | None,
        gamma: nnx.Param | None,
        following: nnx.LayerNorm | None,
        drop_path_rate: jax.Array | float | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds a branch's map y, by its own norm and gamma, to x; returns that as a call does.

        One pass has the addition and a norm: the branch's own, if it has one, or else `following`.
        Drop path comes between the own norm and the addition.
        """
        if norm is not None and (key is None or drop_path_rate is None):
            x = normalize_add(norm, y, x, gamma, self.implementation)
            return x, None if following is None else self._normalize(following, x)
        if norm is not None:
            y = self._normalize(norm, y)
        if gamma is not None:
            y *= along_channels(gamma, y)
        y = drop_path(y, drop_path_rate, key)
        return add_normalize(following, x, y, self.implementation)

    def _normalize(self, norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
        return normalize(norm, x, implementation=self.implementation)

    def fuse(self) -> None:
        """Joins products, and multiplies the norms of branches by their gammas, for good."""
        self.dcn.fuse()
        if not self.post_norm or not self.layer_scale:
            return
        for norm, gamma in ((self.norm1, self.gamma1), (self.norm2, self.gamma2)):
            scale, bias = scaled(norm, gamma)
            norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
        self.layer_scale = False
        del self.gamma1, self.gamma2


@functools.partial(jax.jit, static_argnames=("graphdef", "with_cp", "train"))
def _traced_once(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    normalized: jax.Array | None,
    key: jax.Array | None,
    drop_path_rate: np.ndarray | None,
    *,
    with_cp: bool,
    train: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], nnx.State]:
    """Calls a layer, split with the norm that follows; returns its results and batch statistics.

    `jit` keeps what it traced, so the layers of a level that are alike are traced once: all but the
    first, which has no norm's result to begin with, and the last, which another norm follows.
    """

    def call(state, x, normalized, key, drop_path_rate):
        layer, following = nnx.merge(graphdef, state)
        results = layer(
            *(x, normalized, following), train=train, key=key, drop_path_rate=drop_path_rate
        )
        return results, nnx.state(layer, nnx.BatchStat)

    # With `with_cp` nothing is kept for the backward pass but the layer's input.
    return (jax.checkpoint(call) if with_cp else call)(state, x, normalized, key, drop_path_rate)


class InternImageBlock(nnx.Module):
    """One of the four levels: its layers, its norm, and the downsampling to the next."""

    def __init__(self, ctx: Context, level: int):
        config = ctx.config
        channels, group = config.level_channels(level), config.groups[level]
        self.blocks = nnx.List(
            [InternImageLayer(ctx, channels, group) for _ in range(config.depths[level])]
        )
        self.drop_path_rates = config.drop_path_rates[level]
        self.post_norm_block_ids = config.post_norm_block_ids if level == 2 else ()
        if self.post_norm_block_ids:
            self.post_norms = nnx.List([ctx.norm(channels) for _ in self.post_norm_block_ids])
        self.post_norm = config.post_norm
        self.has_norm = not config.post_norm or config.center_feature_scale
        if self.has_norm:
            self.norm = ctx.norm(channels)
        if level < 3:
            self.downsample = DownsampleLayer(ctx, channels)
        self.with_cp = config.with_cp
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(
        self, x: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the level's map, which `downsample` takes to the next level."""
        keys = split(key, len(self.blocks))
        normalized = None
        for i, block in enumerate(self.blocks):
            graphdef, state = nnx.split((block, self._following(i)))
            rate = self.drop_path_rates[i] if train else 0
            (x, normalized), statistics = _traced_once(
                *(graphdef, state, x, normalized, keys[i], np.float32(rate) if rate else None),
                with_cp=self.with_cp,
                train=train,
            )
            if train:
                nnx.update(block, statistics)
            if i in self.post_norm_block_ids:
                assert normalized is not None
                x, normalized = normalized, None
        if normalized is None and self.has_norm:
            return normalize(self.norm, x, train, self.implementation)
        return x if normalized is None else normalized

    def _following(self, i: int) -> nnx.LayerNorm | None:
        """The norm that layer `i` is to apply to its map, for what follows."""
        if i in self.post_norm_block_ids:
            return self.post_norms[self.post_norm_block_ids.index(i)]
        if i + 1 == len(self.blocks):
            return self.norm if self.has_norm else None
        # With `with_cp` it would be one map more to keep for each layer.
        return None if self.post_norm or self.with_cp else self.blocks[i + 1].norm1


class ConvHead(nnx.Module):
    """The pooling of T to XL: pointwise convolution, BatchNorm, activation, mean over the map."""

    def __init__(self, ctx: Context):
        channels = ctx.config.level_channels(3)
        self.channels = int(channels * ctx.config.cls_scale)
        self.conv = ctx.linear(channels, self.channels, bias=False)
        self.norm = ctx.norm(self.channels, "BN")
        self.activation = activation(ctx.config)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = self.activation(normalize(self.norm, self.conv(x), train))
        return x.mean(axis=(1, 2))  # (N, channels)


class InternImageOutput(NamedTuple):
    """Everything a forward pass gives; the names are those of the released models.

    Under `jax.jit`, what is not used is not computed.
    """

    logits: jax.Array | None  # (N, num_classes); None without a head
    pooler_output: jax.Array | None  # (N, channels of the pooled features); None without a head
    hidden_states: tuple[jax.Array, ...]  # four maps, (N, H/4, W/4, C) to (N, H/32, W/32, 8C)
    last_hidden_state: jax.Array  # the last of them


class InternImage(nnx.Module):
    """The InternImage backbone with its classifier.

    Args:
        config: The architecture.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
        implementation: Of DCNv3: "kernel", "gather" or None, see `xla_ops.dcnv3`.
        rngs: Source of the initial values; None leaves the parameters without values, as
            `nnx.eval_shape` around the constructor would, but much faster.
        name: What reports call the model.
        preprocessing: How its images are made; None is ImageNet's at 224 pixels.

    Raises:
        ValueError: `implementation` is none of these.
    """

    def __init__(
        self,
        config: InternImageConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: xla_ops.Implementation | None = None,
        rngs: nnx.Rngs | None = None,
        name: str = "internimage",
        preprocessing: Preprocessing | None = None,
    ):
        if implementation not in ("kernel", "gather", None):
            raise ValueError(
                f"implementation: expected 'kernel', 'gather' or None, got {implementation!r}"
            )
        ctx = Context(config, dtype, param_dtype, implementation)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.name = name
        self.preprocessing = preprocessing or Preprocessing(224)
        self.patch_embed = StemLayer(ctx)
        self.levels = nnx.List([InternImageBlock(ctx, level) for level in range(4)])
        if config.num_classes:
            if config.use_clip_projector:
                self.clip_head = ClipHead(ctx)
                pooled = self.clip_head.channels
            else:
                self.conv_head = ConvHead(ctx)
                pooled = self.conv_head.channels
            self.head = ctx.linear(pooled, config.num_classes)
        fill(self, {} if rngs is None else initial_values(config, rngs.params(), param_dtype))

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits of `images`; for a model without classes, the last map.

        Args:
            images: (N, H, W, 3), normalised as in `internimage_jax.preprocess`; any floating dtype.
                H and G want sides that are multiples of 32.
            train: Uses batch statistics in BatchNorms, and updates the running ones; drops out at
                the rates of the config.
            key: Source of the dropout, a JAX PRNG key; needed in training if a rate is above 0.

        Returns:
            (N, num_classes), at least float32.

        Raises:
            ValueError: `images` or `key` does not fit.
        """
        output = self.outputs(images, train=train, key=key)
        return output.last_hidden_state if output.logits is None else output.logits

    def outputs(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> InternImageOutput:
        """Returns logits, pooled features and feature maps; the arguments are those of a call."""
        self._check(images, train, key)
        with_clip_head = self.config.num_classes and self.config.use_clip_projector
        if with_clip_head and any(side % 32 for side in images.shape[1:3]):
            raise ValueError(
                f"images: this head needs sides that are multiples of 32, got {images.shape}"
            )
        maps = self.features(images, train=train, key=key)
        if not self.config.num_classes:
            return InternImageOutput(None, None, maps, maps[-1])
        if with_clip_head:
            pooled = self.clip_head(maps[2], maps[3])
        else:
            pooled = self.conv_head(maps[3], train=train)
        return InternImageOutput(at_least_float32(self.head(pooled)), pooled, maps, maps[-1])

    def features(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns the maps of the four levels; the arguments are those of a call."""
        self._check(images, train, key)
        # By then `jit` has taken the call out of the operators' hands.
        with forward_mode_named("gather"):
            return self._features(images, train, key)

    def _features(
        self, images: jax.Array, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        keys = split(key if train else None, 5)
        x = self.patch_embed(images.astype(self.dtype), train=train)
        x = dropout(x, self.config.drop_rate, keys[0])
        maps = [self.levels[0](x, train=train, key=keys[1])]
        for i in range(1, 4):
            x = self.levels[i - 1].downsample(maps[-1], train=train)
            maps.append(self.levels[i](x, train=train, key=keys[i + 1]))
        return tuple(maps)

    def fused(self) -> InternImage:
        """Returns the model as it is best run: the same function, with fewer and larger products.

        Training and files want the parameters as the released models have them, and a model that
        has them so joins some of them on each call. This does it once, and so also multiplies the
        norms of branches by their gammas, in float32 at least. The two share all other parameters.
        """
        fused = nnx.merge(*nnx.split(self))
        for level in fused.levels:
            for block in level.blocks:
                block.fuse()
        return fused

    def _check(self, images: jax.Array, train: bool, key: jax.Array | None) -> None:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected shape (N, H, W, 3), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images: expected normalised floats, got {images.dtype}")
        if 0 in images.shape[1:3]:
            raise ValueError(f"images: expected sides of at least 1, got {images.shape}")
        if train and key is None and (self.config.drop_rate or self.config.drop_path_rate):
            raise ValueError(
                "key: training with drop_rate or drop_path_rate needs a PRNG key, got None"
            )
