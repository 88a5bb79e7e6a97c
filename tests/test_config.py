"""Configs: what is accepted, what is refused and how, and the table of released models."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internimage_jax.config import RELEASED, InternImageConfig, list_models, released_model
from internimage_jax.initial import initial_values
from internimage_jax.model import InternImage
from internimage_jax.shapes import multiply_adds, num_parameters, parameter_shapes
from tests.support import TINY, reference, reference_config

# Of the model cards: parameters in millions, FLOPs in billions of multiply-adds.
CARDS = {
    "internimage_t_1k_224": (30, 5),
    "internimage_s_1k_224": (50, 8),
    "internimage_b_1k_224": (97, 16),
    "internimage_l_22kto1k_384": (223, 108),
    "internimage_xl_22kto1k_384": (335, 163),
    "internimage_h_22kto1k_640": (1080, 1478),
    "internimage_g_22kto1k_512": (3000, 2700),
}


@pytest.mark.parametrize("name", CARDS)
def test_parameters_and_multiply_adds_agree_with_the_model_card(name):
    parameters, flops = CARDS[name]
    model = RELEASED[name]
    # The cards round 1.0896 and 3.0764 billion parameters to 1.08 and 3.
    assert abs(num_parameters(model.config) / 1e6 - parameters) <= max(1, 0.026 * parameters)
    counted = multiply_adds(model.config, model.image_size) / 1e9
    assert abs(counted - flops) <= max(0.5, 0.011 * flops)


@pytest.mark.parametrize("name", TINY)
def test_shapes_are_those_of_the_model(name):
    config = reference_config(name)
    state = nnx.to_flat_state(nnx.state(InternImage(config)))
    assert parameter_shapes(config) == {".".join(map(str, p)): v.shape for p, v in state}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_the_released_ones(name):
    assert reference(f"layouts/{name}.json").exists()
    assert reference_config(name) == RELEASED[name].config


def test_a_config_survives_json():
    config = RELEASED["internimage_g_22kto1k_512"].config
    assert InternImageConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(hash(config), int)


def test_names_are_found_with_their_owner_and_by_pattern():
    assert released_model("OpenGVLab/internimage_t_1k_224") is RELEASED["internimage_t_1k_224"]
    assert list_models("internimage_l*") == ["internimage_l_22k_384", "internimage_l_22kto1k_384"]
    assert list_models() == list(RELEASED)
    assert len(RELEASED) == 11


def test_a_wrong_name_lists_the_closest():
    with pytest.raises(ValueError, match=r"'internimage-t'; closest: internimage_t_1k_224"):
        released_model("internimage-t")
    with pytest.raises(ValueError, match=r"unknown model 'xyz'; there are internimage_t_1k_224, "):
        released_model("xyz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 63}, "channels must be even"),
        ({"channels": "64"}, "channels must be an integer, got '64'"),
        ({"channels": True}, "channels must be an integer, got True"),
        ({"depths": [4, 4, 18]}, "depths must be four integers"),
        ({"depths": 4}, "depths must be a list of integers, got 4"),
        ({"groups": [3, 8, 16, 32]}, "groups must divide the channels of their level, got 3"),
        ({"num_classes": -1}, "num_classes must not be negative"),
        ({"mlp_ratio": 1e-3}, "mlp_ratio must leave at least one of 64 channels, got 0.001"),
        ({"cls_scale": 1e-3}, "cls_scale must leave at least one of 512 channels, got 0.001"),
        ({"offset_scale": 0}, "offset_scale must be positive"),
        ({"offset_scale": float("nan")}, "offset_scale must be positive"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
        ({"act_layer": "Swish"}, "act_layer must be one of GELU, SiLU, ReLU, got 'Swish'"),
        ({"norm_layer": "GN"}, "norm_layer must be one of LN, BN"),
        ({"dw_kernel_size": 4}, "dw_kernel_size must be odd, got 4"),
        ({"post_norm": 1}, "post_norm must be true or false, got 1"),
        ({"res_post_norm": True, "post_norm": True}, "exclude each other"),
        ({"res_post_norm": True, "layer_scale": 1.0}, "exclude each other"),
        (
            {"use_clip_projector": True, "norm_layer": "BN"},
            "use_clip_projector needs norm_layer LN",
        ),
        (
            {"level2_post_norm": True, "level2_post_norm_block_ids": [18]},
            "level2_post_norm_block_ids must be different layers",
        ),
        ({"chanels": 64}, "unknown keys 'chanels'"),
        ({"core_op": "DCNv4"}, "core_op must be 'DCNv3', got 'DCNv4'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(
        ValueError, match=f"file.json: {message}" if "exclude" not in message else message
    ):
        InternImageConfig.from_dict(InternImageConfig().to_dict() | changes, "file.json")


def test_numbers_may_be_numpys():
    given = InternImageConfig(num_classes=np.int64(3) + 1, drop_path_rate=np.float32(0.5))
    assert given == InternImageConfig(num_classes=4, drop_path_rate=0.5)
    json.dumps(given.to_dict())


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="missing keys 'depths', 'groups'"):
        InternImageConfig.from_dict({"channels": 64})


def test_building_shapes_draws_nothing_and_tracing_agrees():
    config = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(2, 4, 8, 16))
    bare = nnx.state(InternImage(config))
    traced = nnx.eval_shape(lambda: nnx.state(InternImage(config, rngs=nnx.Rngs(0))))
    values = nnx.state(InternImage(config, rngs=nnx.Rngs(0)))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (bare, traced, values)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_values_drawn_within_a_program_are_those_drawn_before_it():
    config = InternImageConfig(channels=64, depths=(1, 1, 1, 1))  # with arrays of several blocks
    plain = nnx.state(InternImage(config, rngs=nnx.Rngs(0)))
    within = jax.jit(lambda: nnx.state(InternImage(config, rngs=nnx.Rngs(0))))()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(within), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    key = jax.random.key(0)  # from outside
    jax.eval_shape(lambda: initial_values(config, key, jnp.float32))
