"""The parameters of an InternImage and what it computes, from its config alone.

Neither needs the model to be built, nor JAX to be imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from internimage_jax.config import InternImageConfig

Shape = tuple[int, ...]


def parameter_shapes(config: InternImageConfig) -> dict[str, Shape]:
    """Returns path and shape of all parameters and BatchNorm statistics of the Flax model."""
    return {path: shape for path, shape, _ in _walk(config)}


def num_parameters(config: InternImageConfig) -> int:
    """Returns how many numbers are trained; BatchNorm's running statistics are not."""
    return sum(
        math.prod(shape)
        for path, shape in parameter_shapes(config).items()
        if not path.endswith((".mean", ".var"))
    )


def multiply_adds(config: InternImageConfig, image_size: int) -> int:
    """Returns the multiply-adds of one image's forward pass, as the model cards count FLOPs.

    Counted are the products by weights, the attention of the CLIP head, and in DCNv3 four
    multiply-adds for each sampled value and one for its weight.
    """
    sides = [-(-image_size // 2)]  # a 3x3 convolution with stride 2 and padding 1 rounds up
    for _ in range(5):
        sides.append(-(-sides[-1] // 2))
    total = 0
    for path, shape, scale in _walk(config):
        if path.endswith("kernel"):
            positions = sides[scale] ** 2 if scale is not None else 1
            total += positions * math.prod(shape)
    for level, depth in enumerate(config.depths):
        values = sides[level + 1] ** 2 * config.level_channels(level) * (9 - config.remove_center)
        total += depth * values * 5
    if config.use_clip_projector and config.num_classes:
        total += 2 * sides[3] ** 2 * CLIP_WIDTH  # scores, and the sum they weight
    return total


CLIP_WIDTH, CLIP_OUT = 1024, 768  # of the CLIP head, the same in every released model

# A path, its shape, and the scale of the map it is applied to: 2^-(scale + 1) of the image's
# sides; None where it is applied once.
_Entry = tuple[str, Shape, int | None]


def _walk(config: InternImageConfig) -> Iterator[_Entry]:
    channels = config.channels
    stem = channels // 2
    yield from _kernel("patch_embed.conv1", (3, 3, 3, stem), 0)
    yield from _norm("patch_embed.norm1", stem, config.norm_layer)
    yield from _kernel("patch_embed.conv2", (3, 3, stem, channels), 1)
    yield from _norm("patch_embed.norm2", channels, config.norm_layer)
    for level in range(4):
        yield from _level(config, level)
    if config.num_classes:
        yield from _clip_head(config) if config.use_clip_projector else _conv_head(config)


def _level(config: InternImageConfig, level: int) -> Iterator[_Entry]:
    channels, scale, path = config.level_channels(level), level + 1, f"levels.{level}"
    for i in range(config.depths[level]):
        yield from _layer(config, level, f"{path}.blocks.{i}")
    if level == 2:
        for i in range(len(config.post_norm_block_ids)):
            yield from _norm(f"{path}.post_norms.{i}", channels)
    if not config.post_norm or config.center_feature_scale:
        yield from _norm(f"{path}.norm", channels)
    if level < 3:
        shape = (3, 3, channels, 2 * channels)
        yield from _kernel(f"{path}.downsample.conv", shape, scale + 1, bias=False)
        yield from _norm(f"{path}.downsample.norm", 2 * channels, config.norm_layer)


def _layer(config: InternImageConfig, level: int, path: str) -> Iterator[_Entry]:
    channels, group, scale = config.level_channels(level), config.groups[level], level + 1
    points, side = 9 - config.remove_center, config.dw_kernel_size or 3
    hidden = int(channels * config.mlp_ratio)
    yield from _norm(f"{path}.norm1", channels)
    yield from _kernel(f"{path}.dcn.dw_conv.conv", (side, side, 1, channels), scale)
    yield from _norm(f"{path}.dcn.dw_conv.norm", channels, config.norm_layer)
    yield from _kernel(f"{path}.dcn.offset", (channels, group * points * 2), scale)
    yield from _kernel(f"{path}.dcn.mask", (channels, group * points), scale)
    yield from _kernel(f"{path}.dcn.input_proj", (channels, channels), scale)
    yield from _kernel(f"{path}.dcn.output_proj", (channels, channels), scale)
    if config.center_feature_scale:
        yield from _kernel(f"{path}.dcn.center_feature_scale_proj", (channels, group), scale)
    yield from _norm(f"{path}.norm2", channels)
    yield from _kernel(f"{path}.mlp.fc1", (channels, hidden), scale)
    yield from _kernel(f"{path}.mlp.fc2", (hidden, channels), scale)
    if config.layer_scale is not None:
        yield f"{path}.gamma1", (channels,), None
        yield f"{path}.gamma2", (channels,), None
    if config.res_post_norm:
        yield from _norm(f"{path}.res_post_norm1", channels)
        yield from _norm(f"{path}.res_post_norm2", channels)


def _conv_head(config: InternImageConfig) -> Iterator[_Entry]:
    channels = config.level_channels(3)
    pooled = int(channels * config.cls_scale)
    yield from _kernel("conv_head.conv", (channels, pooled), 4, bias=False)
    yield from _norm("conv_head.norm", pooled, "BN")
    yield from _kernel("head", (pooled, config.num_classes), None)


def _clip_head(config: InternImageConfig) -> Iterator[_Entry]:
    third, last = config.level_channels(2), config.level_channels(3)
    pool = "clip_head.clip_projector"
    yield from _kernel("clip_head.dcnv3_head_x4", (last, 4 * CLIP_WIDTH), 4)
    yield from _kernel("clip_head.dcnv3_head_x3", (third, CLIP_WIDTH), 3)
    for name in "qkv":
        yield from _norm(f"{pool}.norm1_{name}", CLIP_WIDTH)
    for name, scale in (("q", None), ("k", 3), ("v", 3)):
        shape = (CLIP_WIDTH, CLIP_WIDTH)
        yield from _kernel(f"{pool}.cross_dcn.{name}", shape, scale, bias=False)
        yield f"{pool}.cross_dcn.{name}_bias", (CLIP_WIDTH,), None
    yield from _kernel(f"{pool}.cross_dcn.proj", (CLIP_WIDTH, CLIP_OUT), None)
    yield from _norm("clip_head.fc_norm", CLIP_OUT)
    yield from _kernel("head", (CLIP_OUT, config.num_classes), None)


def _kernel(path: str, shape: Shape, scale: int | None, bias: bool = True) -> Iterator[_Entry]:
    yield f"{path}.kernel", shape, scale
    if bias:
        yield f"{path}.bias", shape[-1:], None


def _norm(path: str, channels: int, kind: str = "LN") -> Iterator[_Entry]:
    yield f"{path}.scale", (channels,), None
    yield f"{path}.bias", (channels,), None
    if kind == "BN":
        yield f"{path}.mean", (channels,), None
        yield f"{path}.var", (channels,), None
