"""The one table of names and transposes between PyTorch checkpoints and the Flax model.

A row maps a module; what kind of module it is says what its leaves are called on either side and
how their axes are permuted. It is read in both directions. `#` stands for an index, the same on
both sides, and `{norm}` for the place of the norm within a small sequence that the official code
builds: it differs between LayerNorm and BatchNorm. PyTorch names are those of the released .pth
files; those of the Hugging Face files differ as `from_huggingface` tells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from internimage_jax.config import InternImageConfig
from internimage_jax.shapes import Shape, parameter_shapes


@dataclass(frozen=True)
class Leaf:
    """How one array of a module is kept on either side.

    Args:
        flax: Its name in the Flax module; empty where the path itself is the array.
        torch: Its name in the PyTorch module.
        axes: The permutation of its axes from PyTorch to Flax; None where it has one axis.
        pointwise: Whether PyTorch keeps it with two more axes of size 1, at the end.
    """

    flax: str
    torch: str
    axes: tuple[int, ...] | None = None
    pointwise: bool = False


_BIAS = Leaf(".bias", ".bias")
CONV = (Leaf(".kernel", ".weight", (2, 3, 1, 0)), _BIAS)  # (O, I, H, W) and (H, W, I, O)
LINEAR = (Leaf(".kernel", ".weight", (1, 0)), _BIAS)  # (O, I) and (I, O)
POINTWISE = (Leaf(".kernel", ".weight", (1, 0), pointwise=True), _BIAS)  # (O, I, 1, 1) and (I, O)
UNDERSCORED = (Leaf(".kernel", "_weight", (1, 0)), Leaf(".bias", "_bias"))
NORM = (
    Leaf(".scale", ".weight"),
    _BIAS,
    Leaf(".mean", ".running_mean"),
    Leaf(".var", ".running_var"),
)
ARRAY = (Leaf("", ""),)

_BLOCK = "levels.#.blocks.#"
_POOL = "clip_projector"
TABLE: tuple[tuple[str, str, tuple[Leaf, ...]], ...] = (
    # Flax module, PyTorch module, kind
    ("patch_embed.conv#", "patch_embed.conv#", CONV),
    ("patch_embed.norm#", "patch_embed.norm#.{norm}", NORM),
    (f"{_BLOCK}.norm#", f"{_BLOCK}.norm#.0", NORM),
    (f"{_BLOCK}.res_post_norm#", f"{_BLOCK}.res_post_norm#.0", NORM),
    (f"{_BLOCK}.gamma#", f"{_BLOCK}.gamma#", ARRAY),
    (f"{_BLOCK}.mlp.fc#", f"{_BLOCK}.mlp.fc#", LINEAR),
    (f"{_BLOCK}.dcn.dw_conv.conv", f"{_BLOCK}.dcn.dw_conv.0", CONV),
    (f"{_BLOCK}.dcn.dw_conv.norm", f"{_BLOCK}.dcn.dw_conv.1.{{norm}}", NORM),
    (f"{_BLOCK}.dcn.offset", f"{_BLOCK}.dcn.offset", LINEAR),
    (f"{_BLOCK}.dcn.mask", f"{_BLOCK}.dcn.mask", LINEAR),
    (f"{_BLOCK}.dcn.input_proj", f"{_BLOCK}.dcn.input_proj", LINEAR),
    (f"{_BLOCK}.dcn.output_proj", f"{_BLOCK}.dcn.output_proj", LINEAR),
    (
        f"{_BLOCK}.dcn.center_feature_scale_proj",
        f"{_BLOCK}.dcn.center_feature_scale_proj",
        UNDERSCORED,
    ),
    ("levels.#.norm", "levels.#.norm.0", NORM),
    ("levels.#.post_norms.#", "levels.#.post_norms.#.0", NORM),
    ("levels.#.downsample.conv", "levels.#.downsample.conv", CONV),
    ("levels.#.downsample.norm", "levels.#.downsample.norm.{norm}", NORM),
    ("conv_head.conv", "conv_head.0", POINTWISE),
    ("conv_head.norm", "conv_head.1.0", NORM),
    ("clip_head.dcnv3_head_x4", "dcnv3_head_x4.0", POINTWISE),
    ("clip_head.dcnv3_head_x3", "dcnv3_head_x3", POINTWISE),
    *((f"clip_head.{_POOL}.norm1_{x}", f"{_POOL}.norm1_{x}.0", NORM) for x in "qkv"),
    *((f"clip_head.{_POOL}.cross_dcn.{x}", f"{_POOL}.cross_dcn.{x}", LINEAR) for x in "qkv"),
    *(
        (f"clip_head.{_POOL}.cross_dcn.{x}_bias", f"{_POOL}.cross_dcn.{x}_bias", ARRAY)
        for x in "qkv"
    ),
    (f"clip_head.{_POOL}.cross_dcn.proj", f"{_POOL}.cross_dcn.proj", LINEAR),
    ("clip_head.fc_norm", "fc_norm.0", NORM),
    ("head", "head", LINEAR),
)

# A counter that PyTorch's BatchNorm keeps; nothing here reads it.
BATCH_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Rule:
    """Where one array of a model is found on either side.

    Args:
        flax: Its path in the Flax model.
        torch: Its name in a released .pth file.
        flax_shape: Its shape in the Flax model.
        torch_shape: Its shape in PyTorch.
        axes: The permutation of its axes from PyTorch to Flax, after axes of size 1 at the end of
            the PyTorch shape are dropped; None where nothing moves.
    """

    flax: str
    torch: str
    flax_shape: Shape
    torch_shape: Shape
    axes: tuple[int, ...] | None


def rules(config: InternImageConfig) -> list[Rule]:
    """Returns a rule for every array of the model of `config`, in the order of its layers."""
    return [_rule(path, shape, config) for path, shape in parameter_shapes(config).items()]


def _rule(path: str, shape: Shape, config: InternImageConfig) -> Rule:
    # A path without a row is a bug here: the tests go through every architecture.
    match, name, leaf = next(
        (match, name, leaf)
        for pattern, name, leaf in _PATTERNS
        if (match := pattern.fullmatch(path))
    )
    torch_shape = shape
    if leaf.axes is not None:
        torch_shape = tuple(shape[leaf.axes.index(axis)] for axis in range(len(shape)))
    if leaf.pointwise:
        torch_shape += (1, 1)
    torch = name.format(*match.groups(), norm=1 if config.norm_layer == "LN" else 0)
    return Rule(path, torch, shape, torch_shape, leaf.axes)


def _patterns() -> list[tuple[re.Pattern[str], str, Leaf]]:
    """One pattern, format string and leaf for every kind of array in the table."""
    return [
        (
            re.compile(re.escape(flax + leaf.flax).replace(r"\#", r"(\d+)")),
            (torch + leaf.torch).replace("#", "{}"),
            leaf,
        )
        for flax, torch, kind in TABLE
        for leaf in kind
    ]


_PATTERNS = _patterns()


def from_huggingface(name: str) -> str:
    """The .pth name of a tensor of a Hugging Face file."""
    return re.sub(r"\.layer_scale([12])$", r".gamma\1", name.removeprefix("model."))


def to_huggingface(name: str) -> str:
    """The name in a Hugging Face file of a tensor of a .pth file."""
    return "model." + re.sub(r"\.gamma([12])$", r".layer_scale\1", name)
