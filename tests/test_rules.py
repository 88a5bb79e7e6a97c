"""The table of names and transposes: it covers every model, exactly, in both directions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.rules import BATCH_COUNTER, TABLE, from_huggingface, rules, to_huggingface
from internimage_jax.config import RELEASED, InternImageConfig, list_models
from internimage_jax.model import InternImage
from internimage_jax.shapes import num_parameters, parameter_shapes
from tests.recipe_checkpoints import as_flax
from tests.reference.recipe import to_hf_name
from tests.support import TINY, layout, reference_config

SMALL = InternImageConfig(channels=8, depths=(1, 2, 3, 1), groups=(1, 2, 4, 8), num_classes=3)
# One model for every option that adds, removes or resizes a parameter.
OPTIONS = {
    "plain": {},
    "batch norm": {"norm_layer": "BN"},
    "activation": {"act_layer": "SiLU"},
    "post-norm": {"post_norm": True},
    "layer scale": {"layer_scale": 1e-5},
    "res-post-norm": {"res_post_norm": True},
    "post-norm with centre scale": {"post_norm": True, "center_feature_scale": True},
    "level-2 post-norms": {"level2_post_norm": True, "level2_post_norm_block_ids": (0, 2)},
    "unused level-2 ids": {"level2_post_norm_block_ids": (0, 2)},
    "no level-2 ids": {"level2_post_norm": True},
    "centre scale": {"center_feature_scale": True},
    "without centre": {"remove_center": True},
    "wide depthwise kernel": {"dw_kernel_size": 7},
    "wide MLP": {"mlp_ratio": 2.6},
    "narrow head": {"cls_scale": 0.7},
    "CLIP head": {"use_clip_projector": True},
    "no head": {"num_classes": 0},
    "no CLIP head": {"num_classes": 0, "use_clip_projector": True},
    "recomputed": {"with_cp": True, "drop_rate": 0.1, "drop_path_rate": 0.2},
}


def model_shapes(config: InternImageConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.to_flat_state(nnx.state(InternImage(config)))
    return {".".join(map(str, path)): variable.shape for path, variable in state}


@pytest.mark.parametrize("name", [*TINY, *RELEASED])
def test_names_and_shapes_are_those_of_the_official_model(name: str) -> None:
    official = {n: tuple(shape) for n, shape in layout(name)["tensors"].items()}
    table = {rule.torch: rule.torch_shape for rule in rules(reference_config(name))}
    assert table == {n: shape for n, shape in official.items() if not n.endswith(BATCH_COUNTER)}
    counters = {n for n in official if n.endswith(BATCH_COUNTER)}
    assert counters == {n.replace("running_var", BATCH_COUNTER) for n in table if "_var" in n}


@pytest.mark.parametrize("name", [*TINY, *RELEASED])
def test_huggingface_names_are_found_both_ways(name: str) -> None:
    config = reference_config(name) if name in TINY else RELEASED[name].config
    for rule in rules(config):
        assert to_huggingface(rule.torch) == to_hf_name(rule.torch)
        assert from_huggingface(to_huggingface(rule.torch)) == rule.torch


@pytest.mark.parametrize("option", OPTIONS)
def test_a_rule_read_in_both_directions_is_the_identity(option: str) -> None:
    table = rules(SMALL.replace(**OPTIONS[option]))
    assert len({rule.flax for rule in table}) == len({rule.torch for rule in table}) == len(table)
    for rule in table:
        array = np.arange(np.prod(rule.torch_shape, dtype=int)).reshape(rule.torch_shape)
        flax = as_flax(array, len(rule.flax_shape))
        assert flax.shape == rule.flax_shape
        if rule.axes is None:
            assert array.ndim == 1
            continue
        there = array.reshape(array.shape[: len(rule.axes)]).transpose(rule.axes)
        np.testing.assert_array_equal(there, flax)
        back = there.transpose(np.argsort(rule.axes)).reshape(rule.torch_shape)
        np.testing.assert_array_equal(back, array)


def test_every_row_of_the_table_has_a_use() -> None:
    paths = {
        path for changes in OPTIONS.values() for path in parameter_shapes(SMALL.replace(**changes))
    }
    for flax, _, _ in TABLE:
        row = re.compile(re.escape(flax).replace(r"\#", r"\d+") + r"(\.[a-z]+)?")
        assert any(map(row.fullmatch, paths)), flax


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_has_the_shapes_of_the_model_that_is_built(option: str) -> None:
    config = SMALL.replace(**OPTIONS[option])
    shapes = model_shapes(config)
    assert parameter_shapes(config) == shapes
    assert {rule.flax: rule.flax_shape for rule in rules(config)} == shapes


@pytest.mark.parametrize("kind", ["t", "l", "h", "g"])  # the others differ in width and depth
def test_the_shapes_of_a_released_model_are_those_of_the_model_that_is_built(kind: str) -> None:
    config = next(RELEASED[name].config for name in list_models(f"internimage_{kind}_*1k_*"))
    assert parameter_shapes(config) == model_shapes(config)
    wide = config.replace(num_classes=21841)
    assert parameter_shapes(wide)["head.bias"] == (21841,)


@given(
    channels=st.sampled_from([8, 24]),
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    norm_layer=st.sampled_from(["LN", "BN"]),
    norms=st.sampled_from([{}, {"post_norm": True}, {"res_post_norm": True}, {"layer_scale": 0.1}]),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("center_feature_scale", "remove_center")}
    ),
    num_classes=st.integers(0, 2),
)
@settings(max_examples=10, deadline=None, database=None)
def test_options_together_have_the_shapes_of_the_model_that_is_built(
    channels, depths, norm_layer, norms, flags, num_classes
) -> None:
    config = InternImageConfig(
        channels=channels,
        depths=depths,
        groups=(2, 4, 8, 8),
        norm_layer=norm_layer,
        num_classes=num_classes,
        level2_post_norm=True,
        level2_post_norm_block_ids=(0,),
        **norms,
        **flags,
    )
    assert {rule.flax: rule.flax_shape for rule in rules(config)} == model_shapes(config)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("internimage_t_1k_224", 29.9),
        ("internimage_s_1k_224", 50.1),
        ("internimage_b_1k_224", 97.5),
        ("internimage_l_22kto1k_384", 223.3),
        ("internimage_xl_22kto1k_384", 334.8),
        ("internimage_h_22kto1k_640", 1089.6),
        ("internimage_g_22kto1k_512", 3076.4),
    ],
)
def test_the_number_of_parameters_is_the_released_models(name: str, millions: float) -> None:
    assert round(num_parameters(RELEASED[name].config) / 1e6, 1) == millions
