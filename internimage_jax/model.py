"""InternImage in Flax NNX: the model, its levels and its head; `layers` has what they are made of.

An attribute's path is its parameter's path: `levels.0.blocks.2.dcn.offset.kernel`, as a converted
folder names it, can be followed through the classes. All maps are (N, H, W, C). Reference: Wang et
al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    activate,
    apply,
    dropout,
    normalize,
    path_factors,
    put_in_panels,
    split,
    whole,
    widened,
)
from internimage_jax.config import InternImageConfig
from internimage_jax.initial import fill, initial_values
from internimage_jax.labels import checked_names
from internimage_jax.layers import DownsampleLayer, InternImageLayer, StemLayer, fuse
from internimage_jax.preprocess import Preprocessing
from xla_ops.custom_call import forward_mode_named
from xla_ops.explicit_axes import undivided
from xla_ops.operands import DTYPES


@functools.partial(jax.jit, static_argnames=("graphdef", "with_cp", "train"))
def _traced_once(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    normalized: jax.Array | None,
    key: jax.Array | None,
    factors: jax.Array | None,
    *,
    with_cp: bool,
    train: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], nnx.State]:
    """Calls a layer, split with the norm that follows; returns results and what is no parameter.

    `jit` keeps what it traced, so the layers of a level that are alike are traced once: all but the
    first, which has no norm's result to begin with, and the last, which another norm follows.
    """

    def call(state, x, normalized, key, factors):
        layer, following = nnx.merge(graphdef, jax.tree.map(undivided, state))
        # By name: `nnx.tabulate` cannot show a None beside a module among positional arguments.
        context = {"normalized": normalized, "following": following, "key": key}
        results = layer(x, **context, train=train, factors=factors)
        return results, nnx.state((layer, following), nnx.Not(nnx.Param))

    # With `with_cp` nothing is kept for the backward pass but the layer's input.
    return (jax.checkpoint(call) if with_cp else call)(state, x, normalized, key, factors)


class InternImageBlock(nnx.Module):
    """One of the four levels: its layers, its norm, and the downsampling to the next."""

    def __init__(self, ctx: Context, level: int):
        config = ctx.config
        channels, group = config.level_channels(level), config.groups[level]
        self.blocks = nnx.List(
            [InternImageLayer(ctx, channels, group) for _ in range(config.depths[level])]
        )
        self.drop_rate = config.drop_rate
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
        path_key, key = split(key if train else None, 2)
        factors = path_factors(self.drop_path_rates, x.shape[0], path_key)
        keys = split(key if self.drop_rate else None, len(self.blocks))
        normalized = None
        if not train and not self.post_norm_block_ids:
            whole = InternImageLayer.one_call(self.blocks, x)
            if whole is not None:
                return self._normalize(whole, train)
        for i, block in enumerate(self.blocks):
            both = (block, self._following(i))
            graphdef, state = nnx.split(both)
            (x, normalized), others = _traced_once(
                *(graphdef, state, x, normalized, keys[i], factors[i]),
                with_cp=self.with_cp,
                train=train,
            )
            if train:
                nnx.update(both, others)
            if i in self.post_norm_block_ids:
                assert normalized is not None
                x, normalized = normalized, None
        return self._normalize(x, train) if normalized is None else normalized

    def _normalize(self, x: jax.Array, train: bool) -> jax.Array:
        """The level's norm of x, or x where it has none."""
        if not self.has_norm:
            return x
        return normalize(whole(self.norm), x, train, self.implementation)

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
        self.act_layer = ctx.config.act_layer
        self.implementation: Literal["jnp"] | None = ctx.implementation_of_layers

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = apply(self.conv, x, self.implementation)
        x = activate(self.act_layer, normalize(self.norm, x, train))
        return x.mean(axis=(1, 2))  # (N, channels)

    def fuse(self) -> None:
        """Brings the kernel into its fastest layout, for good."""
        put_in_panels(self.conv, self.implementation)


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
        implementation: Of DCNv3: "kernel", "gather" or None, see `xla_ops.dcnv3`. With "gather"
            the other operators are in jnp too.
        rngs: Source of the initial values; None leaves the parameters without values, as
            `nnx.eval_shape` around the constructor would, but much faster.
        name: What reports call the model.
        preprocessing: How its images are made; None is ImageNet's at 224 pixels.
        classes: Names of the classes, in the order of the logits; None means ImageNet's, if the
            model has 1,000 or 21,841 classes.

    Raises:
        ValueError: `implementation` is none of these, a dtype none of the four floating ones or
            float64 where JAX has it off, or there is not a name for each class.
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
        classes: Sequence[str] | None = None,
    ):
        if implementation not in ("kernel", "gather", None):
            raise ValueError(
                f"implementation: expected 'kernel', 'gather' or None, got {implementation!r}"
            )
        check_dtypes(dtype, param_dtype)
        if not isinstance(rngs, nnx.Rngs | None):
            raise ValueError(f"rngs: expected nnx.Rngs or None, got {type(rngs).__name__}")
        ctx = Context(config, dtype, param_dtype, implementation)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.name = name
        self.preprocessing = preprocessing or Preprocessing(224)
        self.classes = None if classes is None else checked_names(classes, config.num_classes)
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
        self.is_fused = False
        fill(self, {} if rngs is None else initial_values(config, rngs.params(), param_dtype))

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits of `images`; for a model without classes, the last map.

        Args:
            images: (N, H, W, 3), as `internimage_jax.normalize` makes them; any floating dtype.
                H and G want sides that are multiples of 32.
            train: Uses batch statistics in BatchNorms, and updates the running ones; drops out at
                the rates of the config. NNX's `model.train()` and `model.eval()` have no effect.
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
        maps = self._features(images, train, key)
        if not self.config.num_classes:
            return InternImageOutput(None, None, maps, maps[-1])
        if with_clip_head:
            pooled = whole(self.clip_head)(maps[2], maps[3])
        else:
            pooled = whole(self.conv_head)(maps[3], train=train)
        logits = widened(whole(self.head)(pooled))
        return InternImageOutput(logits, pooled, maps, maps[-1])

    def features(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns the maps of the four levels; the arguments are those of a call."""
        self._check(images, train, key)
        return self._features(images, train, key)

    # Here too: within `jit` forward mode is refused only after the operators have returned.
    @forward_mode_named("gather")
    def _features(
        self, images: jax.Array, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        keys = split(key if train else None, 5)
        x = whole(self.patch_embed)(images.astype(self.dtype), train=train)
        x = dropout(x, self.config.drop_rate, keys[0])
        maps = [self.levels[0](x, train=train, key=keys[1])]
        for i in range(1, 4):
            x = whole(self.levels[i - 1].downsample)(maps[-1], train=train)
            maps.append(self.levels[i](x, train=train, key=keys[i + 1]))
        return tuple(maps)

    def fused(self) -> InternImage:
        """Returns a model for inference: the same function, with fewer and larger products.

        Training and files need the parameters as the released models have them; a model that has
        them so joins some of them on each call. This does it once, and also multiplies the norms of
        branches by their gammas, in float32 at least. On a CPU with kernels it also puts the
        products' weights in panels, the layout that the kernels read fastest; so call it on the
        device where the parameters will be used. The two models share all other parameters.
        """
        fused = whole(nnx.merge(*nnx.split(self)))
        fused.is_fused = True
        fuse(fused.patch_embed)
        for level in fused.levels:
            for block in level.blocks:
                fuse(block)
            if hasattr(level, "downsample"):
                fuse(level.downsample)
        if hasattr(fused, "conv_head"):
            fused.conv_head.fuse()
        return fused

    def _check(self, images: jax.Array, train: bool, key: jax.Array | None) -> None:
        if not isinstance(images, jax.Array | np.ndarray):
            raise ValueError(f"images: expected an array, got {type(images).__name__}")
        # A user may have put another first layer there, or another stem.
        first = getattr(self.patch_embed, "conv1", None)
        channels = getattr(first, "in_features", images.shape[-1] if images.ndim else 3)
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(f"images: expected shape (N, H, W, {channels}), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images: expected normalised floats, got {images.dtype}")
        if 0 in images.shape[1:3]:
            raise ValueError(f"images: expected sides of at least 1, got {images.shape}")
        if key is not None and not isinstance(key, jax.Array | np.ndarray):
            raise ValueError(
                f"key: expected a JAX PRNG key, such as jax.random.key(0), got {type(key).__name__}"
            )
        if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(self.patch_embed)):
            raise ValueError("model: has no values; give it `rngs`, or use create_model")
        if train and self.is_fused:
            raise ValueError("model: is fused, which is not for training; train the one it is of")
        if train and key is None and (self.config.drop_rate or self.config.drop_path_rate):
            raise ValueError(
                "key: training with drop_rate or drop_path_rate needs a PRNG key, got None"
            )


def check_dtypes(dtype: DTypeLike, param_dtype: DTypeLike) -> None:
    """Raises a `ValueError` about a dtype that a model cannot have."""
    for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if not _is_known(value):
            names = ", ".join(map(str, DTYPES))
            raise ValueError(f"{argument}: got {value}, expected one of {names}")
        if jnp.dtype(value) == np.float64 and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"{argument}: float64 wants jax.config.update('jax_enable_x64', True) before"
            )


def check_logits(logits: jax.Array, num_classes: int) -> None:
    """Raises a `ValueError` where a head was replaced by one of other classes than the config's."""
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"model: its head makes {logits.shape[-1]} logits, expected {num_classes} by "
            "model.config.num_classes; from_pretrained and create_model take other classes"
        )


def _is_known(dtype: DTypeLike | None) -> bool:
    """Whether it is one that a model can have; None, to NumPy, is float64."""
    try:
        return dtype is not None and jnp.dtype(dtype) in DTYPES
    except TypeError:
        return False
