"""What InternImage is made of: stem, downsampling, DCNv3, MLP, and the layer that has these two.

Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

import xla_ops
from internimage_jax.common import (
    Context,
    activate,
    add_normalize,
    along_channels,
    apply,
    apply_mlp,
    as_built,
    bias_of,
    called,
    cast,
    convolve,
    drop_path,
    dropout,
    linear_of,
    normalize,
    normalize_add,
    on_device,
    on_host,
    operand,
    put_in_panels,
    scaled,
    split,
    whole,
)


def fuse(module: nnx.Module) -> None:
    """Brings a part of a model into its fastest form; one that a user has put there stays."""
    if isinstance(module, StemLayer | DownsampleLayer | MLPLayer | DCNv3 | InternImageLayer):
        module.fuse()


class StemLayer(nnx.Module):
    """Two convolutions that bring an image to a quarter of its sides."""

    def __init__(self, ctx: Context):
        channels, kind = ctx.config.channels, ctx.config.norm_layer
        self.conv1 = ctx.conv(3, channels // 2, 3, strides=2)
        self.norm1 = ctx.norm(channels // 2, kind)
        self.conv2 = ctx.conv(channels // 2, channels, 3, strides=2)
        self.norm2 = ctx.norm(channels, kind)
        self.act_layer = ctx.config.act_layer
        self.fused = ctx.config.act_layer == "GELU"
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = convolve(self.conv1, x, self.implementation)  # (N, H/2, W/2, C/2)
        x = normalize(self.norm1, x, train, self.implementation)
        if self.fused:  # the norm has added its bias, but the kernel's GELU is the shorter one
            none = jnp.zeros(x.shape[-1], x.dtype)
            x = xla_ops.bias_gelu(x, none, implementation=self.implementation)
        else:
            x = activate(self.act_layer, x)
        x = convolve(self.conv2, x, self.implementation)  # (N, H/4, W/4, C)
        return normalize(self.norm2, x, train, self.implementation)

    def fuse(self) -> None:
        """Brings kernels into their fastest layout, for good."""
        for conv in (self.conv1, self.conv2):
            put_in_panels(conv, self.implementation)


class DownsampleLayer(nnx.Module):
    """A convolution that halves the sides and doubles the channels."""

    def __init__(self, ctx: Context, channels: int):
        self.conv = ctx.conv(channels, 2 * channels, 3, bias=False, strides=2)
        self.norm = ctx.norm(2 * channels, ctx.config.norm_layer)
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = convolve(self.conv, x, self.implementation)  # (N, H/2, W/2, 2C)
        return normalize(self.norm, x, train, self.implementation)

    def fuse(self) -> None:
        """Brings the kernel into its fastest layout, for good."""
        put_in_panels(self.conv, self.implementation)


class MLPLayer(nnx.Module):
    """The feed-forward half of a layer."""

    def __init__(self, ctx: Context, channels: int):
        hidden = int(channels * ctx.config.mlp_ratio)
        self.fc1 = ctx.linear(channels, hidden)
        self.fc2 = ctx.linear(hidden, channels)
        self.act_layer = ctx.config.act_layer
        self.drop_rate = ctx.config.drop_rate
        self.fused = ctx.config.act_layer == "GELU"
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        if self.fused and (key is None or self.drop_rate == 0):
            return apply_mlp(self.fc1, self.fc2, x, self.implementation)
        key1, key2 = split(key, 2)
        if self.fused:  # bias and activation, and maybe the product, in one pass
            x = apply(self.fc1, x, self.implementation, gelu=True)
        else:
            x = activate(self.act_layer, apply(self.fc1, x, self.implementation))
        x = dropout(x, self.drop_rate, key1)
        return dropout(apply(self.fc2, x, self.implementation), self.drop_rate, key2)

    def fuse(self) -> None:
        """Brings kernels into their fastest layout, for good."""
        for layer in (self.fc1, self.fc2):
            put_in_panels(layer, self.implementation)


class DepthwiseLayer(nnx.Module):
    """The depthwise convolution, norm and activation that DCNv3 reads its offsets from."""

    def __init__(self, ctx: Context, channels: int):
        size = ctx.config.dw_kernel_size or 3
        self.conv = ctx.conv(channels, channels, size, feature_group_count=channels)
        self.norm = ctx.norm(channels, ctx.config.norm_layer)
        self.act_layer = ctx.config.act_layer
        # As one operator where it is the released models' kind.
        self.fused = (ctx.config.norm_layer, ctx.config.act_layer) == ("LN", "GELU")
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        if not as_built(self.conv, depthwise=True):
            x = called(self.conv, x)
            return activate(self.act_layer, normalize(self.norm, x, train, self.implementation))
        x = cast(x, self.conv)
        kernel = operand(x, self.conv.kernel)[:, :, 0]  # (size, size, C)
        bias = bias_of(self.conv, x)
        if self.fused and as_built(self.norm):
            scale, offset = operand(x, self.norm.scale), operand(x, self.norm.bias)
            return xla_ops.dwconv_norm_gelu(
                *(x, kernel, bias, scale, offset),
                epsilon=self.norm.epsilon,
                implementation=self.implementation,
            )
        x = xla_ops.depthwise_convolution(x, kernel.astype(x.dtype))
        x = x + bias.astype(x.dtype)[None, None, None]
        return activate(self.act_layer, normalize(self.norm, x, train, self.implementation))


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
        y = xla_ops.dcnv3_fused(
            product(self.input_proj, x).astype(self.dtype),
            self._record(features).astype(self.dtype),
            group=self.group,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            center_feature_scale=self.center_feature_scale,
            implementation=self.implementation,
        )
        return product(self.output_proj, y)

    def fuse(self) -> None:
        """Joins the products that offsets, masks and centre scales are made by, for good.

        And brings all kernels into their fastest layout.
        """
        if not hasattr(self, "record") and (joined := self._joined()):
            self.record = joined
            del self.offset, self.mask
            if self.center_feature_scale:
                del self.center_feature_scale_proj
        for layer in (getattr(self, "record", None), self.input_proj, self.output_proj):
            if layer is not None:
                put_in_panels(layer, self.implementation_of_products)

    def _record(self, features: jax.Array) -> jax.Array:
        """Offsets, mask logits and centre-scale logits (N, H, W, width), by one product."""
        product = functools.partial(apply, implementation=self.implementation_of_products)
        layer = getattr(self, "record", None) or self._joined()
        if layer is not None:
            return product(layer, features)
        return on_device(self._layout().join(*(product(one, features) for one in self._parts())))

    def _joined(self) -> nnx.Linear | None:
        """The products that make offsets, masks and centre scales as one, if they can be joined."""
        parts = self._parts()
        if not all(as_built(part) and part.bias is not None for part in parts):
            return None
        kernel = self._layout().join(*(on_host(part.kernel) for part in parts))  # (C, width)
        bias = self._layout().join(*(on_host(part.bias) for part in parts))
        return linear_of(on_device(kernel), on_device(bias), self.dtype)

    def _parts(self) -> list[nnx.Linear]:
        parts = [self.offset, self.mask]
        return [*parts, self.center_feature_scale_proj] if self.center_feature_scale else parts

    def _layout(self) -> xla_ops.Record:
        return xla_ops.Record(self.group, 9 - self.remove_center)


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
        factors: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the layer's map, and what the norm `following` makes of it, if there is one.

        `normalized` is what `norm1` makes of `x`, where the layer before has made it, since a sum
        and the norm after it can be one pass. `key` is of the dropout, and `factors` (2, N) are
        what the branches' images are multiplied by.
        """
        factors1, factors2 = (None, None) if factors is None else (factors[0], factors[1])
        if normalized is None:
            normalized = x if self.post_norm else self._normalize(self.norm1, x, train)
        y = self.dcn(normalized, train=train)
        own1, own2 = None, None
        if self.post_norm:
            own1, own2 = self.norm1, self.norm2
        elif self.res_post_norm:
            own1, own2 = self.res_post_norm1, self.res_post_norm2
        gamma1, gamma2 = (self.gamma1, self.gamma2) if self.layer_scale else (None, None)
        norm2 = None if self.post_norm else self.norm2
        x, normalized = self._add(x, y, own1, gamma1, norm2, factors1, train)
        y = self.mlp(x if normalized is None else normalized, key=key)
        return self._add(x, y, own2, gamma2, following, factors2, train)

    @classmethod
    def one_call(cls, layers: Sequence[InternImageLayer], x: jax.Array) -> jax.Array | None:
        """What all `layers` of a level make of `x` without training, by `xla_ops.layers`.

        None where that does not pay, or they are of another form than `fuse` makes of the released
        models' layers, those of H and G aside.
        """
        if not all(layer._as_built() for layer in layers):
            return None
        one = layers[0]
        dcn, depthwise, mlp = one.dcn, one.dcn.dw_conv, one.mlp
        other = dcn.center_feature_scale or dcn.remove_center or one.res_post_norm
        norms = [
            norm for each in layers for norm in (each.norm1, each.norm2, each.dcn.dw_conv.norm)
        ]
        is_one_call = (
            one.implementation is None
            and dcn.implementation is None
            and dcn.record.kernel.ndim == 2  # not in panels
            and dcn.record.kernel.dtype == dcn.dtype  # nothing to convert
            and depthwise.fused
            and mlp.fused
            and not (other or one.layer_scale)
            and len({norm.epsilon for norm in norms}) == 1
            and xla_ops.layers_pay(jax.ShapeDtypeStruct(x.shape, dcn.dtype), dcn.group)
        )
        if not is_one_call:
            return None
        x = x.astype(dcn.dtype)
        return xla_ops.layers(
            *(x, [layer._parameters(x) for layer in whole(layers)]),
            group=dcn.group,
            offset_scale=dcn.offset_scale,
            post_norm=one.post_norm,
            epsilon=one.norm1.epsilon,
        )

    def _as_built(self) -> bool:
        """Whether it is fused, and no part of it was replaced by another kind."""
        dcn, mlp = self.dcn, self.mlp
        if not (type(dcn) is DCNv3 and hasattr(dcn, "record") and type(mlp) is MLPLayer):
            return False
        depthwise = dcn.dw_conv
        if type(depthwise) is not DepthwiseLayer or not as_built(depthwise.conv, depthwise=True):
            return False
        norms = [self.norm1, self.norm2, depthwise.norm]
        products = [dcn.input_proj, dcn.record, dcn.output_proj, mlp.fc1, mlp.fc2]
        biases = [product.bias for product in products if as_built(product)]
        whole = len(biases) == len(products) and None not in (*biases, depthwise.conv.bias)
        return whole and all(map(as_built, norms))

    def _parameters(self, x: jax.Array) -> xla_ops.LayerParameters:
        dcn, mlp, depthwise = self.dcn, self.mlp, self.dcn.dw_conv
        vector = functools.partial(operand, x)

        def product(layer: nnx.Linear) -> list[jax.Array]:
            return [layer.kernel[...].astype(x.dtype), vector(layer.bias)]

        def norm(layer: nnx.LayerNorm | nnx.BatchNorm) -> list[jax.Array]:
            return [vector(layer.scale), vector(layer.bias)]

        parameters = [
            *norm(self.norm1),
            *(vector(depthwise.conv.kernel)[:, :, 0], vector(depthwise.conv.bias)),
            *norm(depthwise.norm),
            *(*product(dcn.input_proj), *product(dcn.record), *product(dcn.output_proj)),
            *norm(self.norm2),
            *(*product(mlp.fc1), *product(mlp.fc2)),
        ]
        return xla_ops.LayerParameters._make(parameters)

    def _add(
        self,
        x: jax.Array,
        y: jax.Array,
        norm: nnx.LayerNorm | None,
        gamma: nnx.Param | None,
        following: nnx.LayerNorm | None,
        factors: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds a branch's map y, by its own norm and gamma, to x; returns that as a call does.

        One pass has the addition and a norm: the branch's own, if it has one, or else `following`.
        Drop path comes between the own norm and the addition.
        """
        if norm is not None and factors is None:
            x = normalize_add(norm, y, x, gamma, train, self.implementation)
            return x, None if following is None else self._normalize(following, x, train)
        if norm is not None:
            y = self._normalize(norm, y, train)
        if gamma is not None:
            y *= along_channels(gamma, y)
        y = drop_path(y, factors)
        return add_normalize(following, x, y, train, self.implementation)

    def _normalize(self, norm: nnx.LayerNorm, x: jax.Array, train: bool) -> jax.Array:
        return normalize(norm, x, train, self.implementation)

    def fuse(self) -> None:
        """Joins products, and multiplies the norms of branches by their gammas, for good.

        And brings kernels into their fastest layout.
        """
        fuse(self.dcn)
        fuse(self.mlp)
        if not self.post_norm or not self.layer_scale:
            return
        if not (as_built(self.norm1) and as_built(self.norm2)):
            return
        for norm, gamma in ((self.norm1, self.gamma1), (self.norm2, self.gamma2)):
            scale, bias = scaled(norm, gamma)
            norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
        self.layer_scale = False
        del self.gamma1, self.gamma2
