"""What an InternImage is made of, and the table of the released models."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

NUM_CLASSES_1K, NUM_CLASSES_22K = 1000, 21841  # of ImageNet

ACTIVATIONS = ("GELU", "SiLU", "ReLU")
NORMS = ("LN", "BN")


@dataclasses.dataclass(frozen=True)
class InternImageConfig:
    """The architecture of an InternImage; names and defaults are those of the released models.

    Args:
        channels: Channels of the first level; each of the four levels doubles them.
        depths: Layers of each level.
        groups: Groups of each level's DCNv3; they divide its channels.
        num_classes: Classes of the head; 0 leaves out the head and everything after level 4.
        mlp_ratio: Hidden channels of an MLP, as a multiple of its channels.
        drop_rate: Dropout rate after the stem and in the MLPs, in training.
        drop_path_rate: Rate of stochastic depth in training, of the deepest layer.
        drop_path_type: "linear" grows the rate from 0 with the depth, "uniform" has it everywhere.
        act_layer: "GELU" (exact), "SiLU" or "ReLU".
        norm_layer: Norm of stem, downsampling and depthwise convolution, "LN" or "BN". The norms
            around DCNv3 and MLP are LayerNorms, and the one of `conv_head` is a BatchNorm, always.
        layer_scale: Initial value of the factors on a layer's two branches; None has none.
        offset_scale: Factor on DCNv3's offsets and on its grid.
        post_norm: Norm after DCNv3 and MLP instead of before.
        cls_scale: Channels of `conv_head`, as a multiple of the last level's.
        with_cp: Recomputes a layer in the backward pass instead of keeping what is inside.
        dw_kernel_size: Side of the depthwise convolution; None is 3. Odd.
        use_clip_projector: The attention-pooling head of H and G instead of `conv_head`.
        level2_post_norm: A LayerNorm after some layers of the third level.
        level2_post_norm_block_ids: After which layers; None is after none.
        res_post_norm: A norm after DCNv3 and MLP besides the one before.
        center_feature_scale: Blends DCNv3's output with its input by a learned gate per group.
        remove_center: DCNv3 without its middle point.

    Raises:
        ValueError: A value is out of range, or two contradict each other; the message names them.

    Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.2 and table 1.
    """

    channels: int = 64
    depths: tuple[int, ...] = (4, 4, 18, 4)
    groups: tuple[int, ...] = (4, 8, 16, 32)
    num_classes: int = NUM_CLASSES_1K
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_type: Literal["linear", "uniform"] = "linear"
    act_layer: Literal["GELU", "SiLU", "ReLU"] = "GELU"
    norm_layer: Literal["LN", "BN"] = "LN"
    layer_scale: float | None = None
    offset_scale: float = 1.0
    post_norm: bool = False
    cls_scale: float = 1.5
    with_cp: bool = False
    dw_kernel_size: int | None = None
    use_clip_projector: bool = False
    level2_post_norm: bool = False
    level2_post_norm_block_ids: tuple[int, ...] | None = None
    res_post_norm: bool = False
    center_feature_scale: bool = False
    remove_center: bool = False

    def __post_init__(self) -> None:
        for name in ("depths", "groups", "level2_post_norm_block_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if getattr(value, "shape", None) == ():  # a number of NumPy's, as labels.max() + 1 is
                object.__setattr__(self, field.name, value.item())
            _check_type(field.name, str(field.type), getattr(self, field.name))
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        for name in ("depths", "groups"):
            value = getattr(self, name)
            if len(value) != 4 or min(value) < 1:
                raise ValueError(f"config: {name} must be four integers of at least 1, got {value}")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"config: channels must be even and at least 2, got {self.channels}")
        for level, group in enumerate(self.groups):
            if self.level_channels(level) % group:
                raise ValueError(
                    f"config: groups must divide the channels of their level, got {group} groups "
                    f"for the {self.level_channels(level)} channels of level {level}"
                )
        if self.num_classes < 0:
            raise ValueError(f"config: num_classes must not be negative, got {self.num_classes}")
        for name in ("mlp_ratio", "cls_scale", "offset_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"config: {name} must be positive, got {getattr(self, name)}")
        for name, channels in (("mlp_ratio", self.channels), ("cls_scale", self.level_channels(3))):
            if int(channels * getattr(self, name)) < 1:
                raise ValueError(
                    f"config: {name} must leave at least one of {channels} channels, "
                    f"got {getattr(self, name)}"
                )
        for name in ("drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be in [0, 1), got {getattr(self, name)}")
        for name, allowed in (
            ("drop_path_type", ("linear", "uniform")),
            ("act_layer", ACTIVATIONS),
            ("norm_layer", NORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.dw_kernel_size is not None and (
            self.dw_kernel_size < 1 or self.dw_kernel_size % 2 == 0
        ):
            raise ValueError(f"config: dw_kernel_size must be odd, got {self.dw_kernel_size}")
        ids = self.post_norm_block_ids
        if len(set(ids)) != len(ids) or any(not 0 <= i < self.depths[2] for i in ids):
            raise ValueError(
                f"config: level2_post_norm_block_ids must be different layers of the third level's "
                f"{self.depths[2]}, got {ids}"
            )

    def _check_contradictions(self) -> None:
        if self.res_post_norm and self.post_norm:
            raise ValueError("config: res_post_norm and post_norm exclude each other, got both")
        if self.res_post_norm and self.layer_scale is not None:
            raise ValueError("config: res_post_norm and layer_scale exclude each other, got both")
        if self.use_clip_projector and self.norm_layer != "LN":
            raise ValueError(
                f"config: use_clip_projector needs norm_layer LN, got {self.norm_layer!r}"
            )

    def level_channels(self, level: int) -> int:
        """Channels of level 0 to 3."""
        return self.channels * 2**level

    @property
    def post_norm_block_ids(self) -> tuple[int, ...]:
        """The layers of the third level that a LayerNorm follows."""
        return (self.level2_post_norm_block_ids or ()) if self.level2_post_norm else ()

    @property
    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """The rate of stochastic depth of each layer of each level."""
        total = sum(self.depths)
        if self.drop_path_type == "uniform":
            rates = [self.drop_path_rate] * total
        else:
            rates = [self.drop_path_rate * i / max(1, total - 1) for i in range(total)]
        starts = [sum(self.depths[:level]) for level in range(4)]
        return tuple(
            tuple(rates[start : start + depth])
            for start, depth in zip(starts, self.depths, strict=True)
        )

    def replace(self, **changes: Any) -> InternImageConfig:
        """A copy with some values changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON can hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> InternImageConfig:
        """Reads what `to_dict` wrote, or the architecture part of a released config.json.

        Args:
            values: Names and values; what is absent takes its default, `channels`, `depths` and
                `groups` must be there.
            source: What messages call the values.

        Raises:
            ValueError: A key is unknown or missing, or a value does not fit.
        """
        values = dict(values)
        core_op = values.pop("core_op", "DCNv3")
        if core_op not in ("DCNv3", "DCNv3_pytorch"):
            raise ValueError(f"{source}: core_op must be 'DCNv3', got {core_op!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{source}: unknown keys {', '.join(map(repr, unknown))}")
        missing = [name for name in ("channels", "depths", "groups") if name not in values]
        if missing:
            raise ValueError(f"{source}: missing keys {', '.join(map(repr, missing))}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(str(error).replace("config:", f"{source}:", 1)) from None


def _check_type(name: str, annotation: str, value: Any) -> None:
    if value is None:
        expected = None if "None" in annotation else annotation
    elif "tuple" in annotation:
        integers = isinstance(value, tuple) and all(type(item) is int for item in value)
        expected = None if integers else "a list of integers"
    elif annotation.startswith("bool"):
        expected = None if isinstance(value, bool) else "true or false"
    elif annotation.startswith("int"):
        expected = None if type(value) is int else "an integer"
    elif annotation.startswith("float"):
        expected = None if type(value) in (int, float) else "a number"
    else:
        expected = None if isinstance(value, str) else "a string"
    if expected is not None:
        raise ValueError(f"config: {name} must be {expected}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class ReleasedModel:
    """One of the released models, as its model card tells.

    Args:
        name: The name of its Hugging Face repository, below `OpenGVLab/`.
        config: Its architecture.
        image_size: Side of its input in pixels.
        pretraining: What it was trained on before ImageNet-1K; for the 21,841-class models,
            everything it was trained on.
        accuracy: The card's ImageNet-1K top-1 in percent; None for the 21,841-class models.
    """

    name: str
    config: InternImageConfig
    image_size: int
    pretraining: str
    accuracy: float | None

    license = "MIT"

    @property
    def repository(self) -> str:
        """Its Hugging Face repository."""
        return f"OpenGVLab/{self.name}"


_T = InternImageConfig()
_S = InternImageConfig(
    channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), post_norm=True, layer_scale=1e-5
)
_B = _S.replace(channels=112, groups=(7, 14, 28, 56))
_L = _S.replace(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), offset_scale=2.0)
_XL = _L.replace(channels=192, depths=(5, 5, 24, 5), groups=(12, 24, 48, 96))
_H = InternImageConfig(
    channels=320,
    depths=(6, 6, 32, 6),
    groups=(10, 20, 40, 80),
    res_post_norm=True,
    dw_kernel_size=5,
    use_clip_projector=True,
    level2_post_norm=True,
    level2_post_norm_block_ids=(5, 11, 17, 23, 29),
    center_feature_scale=True,
)
_G = _H.replace(
    channels=512,
    depths=(2, 2, 48, 4),
    groups=(16, 32, 64, 128),
    res_post_norm=False,
    post_norm=True,
    level2_post_norm_block_ids=(5, 11, 17, 23, 29, 35, 41, 47),
)
_JOINT = "427M joint, ImageNet-22K"

RELEASED: dict[str, ReleasedModel] = {
    model.name: model
    for model in (
        ReleasedModel("internimage_t_1k_224", _T, 224, "none", 83.5),
        ReleasedModel("internimage_s_1k_224", _S, 224, "none", 84.2),
        ReleasedModel("internimage_b_1k_224", _B, 224, "none", 84.9),
        ReleasedModel(
            "internimage_l_22k_384",
            _L.replace(num_classes=NUM_CLASSES_22K),
            384,
            "ImageNet-22K",
            None,
        ),
        ReleasedModel("internimage_l_22kto1k_384", _L, 384, "ImageNet-22K", 87.7),
        ReleasedModel(
            "internimage_xl_22k_384",
            _XL.replace(num_classes=NUM_CLASSES_22K),
            384,
            "ImageNet-22K",
            None,
        ),
        ReleasedModel("internimage_xl_22kto1k_384", _XL, 384, "ImageNet-22K", 88.0),
        ReleasedModel(
            "internimage_h_jointto22k_384",
            _H.replace(num_classes=NUM_CLASSES_22K),
            384,
            _JOINT,
            None,
        ),
        ReleasedModel("internimage_h_22kto1k_640", _H, 640, _JOINT, 89.6),
        ReleasedModel(
            "internimage_g_jointto22k_384",
            _G.replace(num_classes=NUM_CLASSES_22K),
            384,
            _JOINT,
            None,
        ),
        ReleasedModel("internimage_g_22kto1k_512", _G, 512, _JOINT, 90.1),
    )
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the released models that match a shell pattern such as "internimage_l*"."""
    import fnmatch

    return [name for name in RELEASED if fnmatch.fnmatchcase(name, pattern)]


def released_model(name: str) -> ReleasedModel:
    """The released model called `name`, with or without `OpenGVLab/`.

    Raises:
        ValueError: There is none; the message lists the closest names.
    """
    bare = name.removeprefix("OpenGVLab/")
    if bare in RELEASED:
        return RELEASED[bare]
    closest = difflib.get_close_matches(bare.lower(), RELEASED, n=3, cutoff=0.4)
    names = f"closest: {', '.join(closest)}" if closest else f"there are {', '.join(RELEASED)}"
    raise ValueError(f"unknown model {name!r}; {names}")
