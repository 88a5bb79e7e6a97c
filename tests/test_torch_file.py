"""Checkpoints in every layout are told apart by their content and read tensor by tensor."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.torch_file import CheckpointError, Inert, LazyTensor, open_checkpoint
from tests import checkpoint_files as make

REFERENCE = os.environ.get("INTERNIMAGE_REFERENCE")
WEIGHTS = {
    "levels.0.gamma1": np.arange(6, dtype=np.float32).reshape(2, 3),
    "norm.num_batches_tracked": np.array(7, np.int64),
    "half": np.array([1.5, -2], np.float16),
    "empty": np.zeros((0, 3), np.float32),
}
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
DATA = np.arange(4, dtype=np.float32).tobytes() + np.ones(3, ml_dtypes.bfloat16).tobytes()


def values(tree: object) -> dict[str, np.ndarray]:
    assert isinstance(tree, dict)
    return {name: tensor.read() for name, tensor in tree.items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].flags.c_contiguous, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def error_of(path: Path) -> str:
    """Returns what is wrong with a checkpoint, after the name, which comes first."""
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(path)) + 400
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


# ---- the layouts of released checkpoints, with the recipe's values


def write_layout(folder: Path, name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes a checkpoint as make_checkpoint.py does and returns its path."""
    monkeypatch.syspath_prepend(REFERENCE)
    maker = importlib.import_module("make_checkpoint")
    config, tensors = maker.load_layout(name)
    items = maker.state_dict(tensors, {})
    out = folder / "weights"
    if layout.startswith("hf"):
        maker.write_hf(config, name, items, out, 1 if layout == "hf-shards" else 0, "bin" in layout)
    else:
        maker.write_torch(layout, config, items, out)
        for module in ("yacs_not_installed", "yacs_not_installed.config"):
            sys.modules.pop(module, None)
    return out


@pytest.mark.skipif(not REFERENCE, reason="INTERNIMAGE_REFERENCE is not set")
@pytest.mark.parametrize("layout", ["pth", "trainer", "dense", "hf", "hf-shards", "hf-bin"])
def test_every_tensor_of_a_released_layout_has_the_recipes_values(layout, tmp_path, monkeypatch):
    if layout in ("pth", "trainer", "dense", "hf-bin"):
        pytest.importorskip("torch")
    name = "tiny_h_like" if layout == "hf-shards" else "tiny_prenorm"
    path = write_layout(tmp_path, name, layout, monkeypatch)
    recipe = importlib.import_module("recipe")
    shapes = json.loads((Path(str(REFERENCE)) / "layouts" / f"{name}.json").read_text())["tensors"]
    want = {n: np.asarray(recipe.recipe_tensor(n, tuple(s))) for n, s in shapes.items()}
    with open_checkpoint(path) as checkpoint:
        tree = checkpoint.tree
        assert isinstance(tree, dict)
        if layout.startswith("hf"):
            assert len(checkpoint.files) > 2 or layout != "hf-shards"
            hf_names = {recipe.to_hf_name(n): v for n, v in want.items()}
            assert_same({n: values(tree)[n] for n in hf_names}, hf_names)
            assert len(tree) == len(want)
        elif layout == "dense":
            head = ("head.", "conv_head.", "dcnv3_head", "clip_projector.", "fc_norm.")
            got = values(tree["state_dict"])
            assert got.pop("decode_head.conv_seg.weight").shape == (150, 8, 1, 1)
            assert_same(
                got, {f"backbone.{n}": v for n, v in want.items() if not n.startswith(head)}
            )
        else:
            assert_same(values(tree["model"]), want)
        if layout == "trainer":
            assert tree["epoch"] == 299
            assert tree["max_accuracy"] == 83.5
            assert tree["config"].name == "yacs_not_installed.config.CfgNode()"
            ema = values(tree["model_ema"])
            assert all(np.array_equal(ema[n], v * np.float32(1.01)) for n, v in want.items()
                       if v.dtype == np.float32)  # fmt: skip


# ---- what torch writes


def saved(value: object, path: Path, **options: object) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(value, path, **options)
    return path


def test_views_of_one_storage_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:, ::2, 1:3],
        "column": base[:, 1, 4],
        "scalar": base[2, 3, 4],
        "repeated": base[0, 0].expand(4, 5),
        "empty": base[:, :0],
        "empty_transposed": base[:, :0].permute(1, 2, 0),
    }
    with open_checkpoint(saved(tensors, tmp_path / "x.pth")) as checkpoint:
        assert_same(values(checkpoint.tree), {n: t.numpy() for n, t in tensors.items()})


def test_every_dtype_is_read_as_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    kinds = "float64 float32 float16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"
    tensors = {kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds.split()}
    tensors["complex64"] = torch.tensor([1 + 2j])
    want = {name: tensor.numpy() for name, tensor in tensors.items()}
    tensors["bfloat16"] = torch.tensor([1.5, -3e38]).bfloat16()
    want["bfloat16"] = np.array([1.5, -3e38], ml_dtypes.bfloat16)
    with open_checkpoint(saved(tensors, tmp_path / "x.pth")) as checkpoint:
        assert_same(values(checkpoint.tree), want)


def test_objects_of_torch_that_are_not_dense_tensors_are_inert(tmp_path):
    torch = pytest.importorskip("torch")
    marked = torch.zeros(1)
    marked.source = "an attribute"
    tree = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "with_attribute": marked,
        "state_dict": torch.nn.Linear(2, 1).state_dict(),
        "size": torch.Size([2, 3]),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.zeros(2, device="meta"),
        "negated": torch.tensor([1j]).conj().imag,
        "negated_dtype": torch._neg_view(torch.ones(2, dtype=torch.uint16)),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "storage": torch.ones(1).untyped_storage(),
        "numpy": np.float64(83.5),
        "array": np.ones(3),
        "set": {1, 2},
        "path": Path("x"),
        "module": torch.nn.Linear(1, 1),
        (1, "tuple"): 2,
        "nested": [1, (None, b"bytes", 2.5, 2**100)],
    }
    with open_checkpoint(saved(tree, tmp_path / "x.pth")) as checkpoint:
        got = checkpoint.tree
        assert isinstance(got, dict)
        np.testing.assert_array_equal(got["parameter"].read(), [1, 1])
        np.testing.assert_array_equal(got["with_attribute"].read(), [0])
        assert set(got["state_dict"]) == {"weight", "bias"}
        assert got["state_dict"]["weight"].name == "weight"
        assert got["size"] == (2, 3)
        assert got["nested"][1][0] is None
        assert got["nested"][1][2:] == (2.5, 2**100)
        names = "sparse meta negated negated_dtype dtype device storage numpy array set path module"
        assert all(isinstance(got[name], Inert) for name in names.split())
        assert got["module"].name == "torch.nn.modules.linear.Linear()"


def test_a_file_without_checksums_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        path = saved({"a": torch.ones(2)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(path) as checkpoint:
        assert values(checkpoint.tree)["a"].tolist() == [1, 1]


def test_a_file_of_old_torch_says_how_to_save_it_again(tmp_path):
    path = saved({"a": 1}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert "torch.save of torch 1.6 or newer" in error_of(path)


def test_a_torchscript_program_is_refused(tmp_path):
    content = make.torch_zip(make.pickle({}), {}, **{"constants.pkl": b"x"})
    assert "TorchScript" in error_of(make.write(tmp_path / "x.pt", content))


# ---- without torch


def test_handmade_torch_file_gives_its_values(tmp_path):
    path = make.write(tmp_path / "x.pth", make.torch_file(WEIGHTS))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch"
        assert checkpoint.files == (path,)
        assert_same(values(checkpoint.tree), WEIGHTS)


def test_safetensors_file_gives_its_values(tmp_path):
    from safetensors.numpy import save_file

    weights = {
        **WEIGHTS,
        "bfloat16": np.array([1.5, -3e38], ml_dtypes.bfloat16),
        **{
            kind: np.arange(3).astype(kind)
            for kind in ("f8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
        },
    }
    path = tmp_path / "x"
    save_file(weights, path, metadata={"format": "pt"})
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.files == (path,)
        assert_same(values(checkpoint.tree), {name: weights[name] for name in checkpoint.tree})
        assert set(checkpoint.tree) == set(weights)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_in_a_folder_is_told_by_its_content_not_by_its_name(name, tmp_path):
    for content, kind in (
        (make.torch_file(WEIGHTS), "torch"),
        (make.safetensors_file(HEADER, DATA), "safetensors"),
    ):
        make.write(tmp_path / name, content)
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.format == kind
            assert checkpoint.files == (tmp_path / name,)


def test_a_tensor_knows_its_shape_before_it_is_read_and_reads_only_itself(tmp_path, monkeypatch):
    path = make.write(tmp_path / "x.pth", make.torch_file(WEIGHTS))
    reads = []
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tree["levels.0.gamma1"]
        assert isinstance(tensor, LazyTensor)
        assert (tensor.name, tensor.shape, tensor.nbytes) == ("levels.0.gamma1", (2, 3), 24)
        plain = type(tensor.file).read_into
        monkeypatch.setattr(
            type(tensor.file),
            "read_into",
            lambda self, offset, array: (reads.append(array.nbytes), plain(self, offset, array)),
        )
        tensor.read()
    assert reads == [24]


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    path = make.write(tmp_path / "x.safetensors", make.safetensors_file(HEADER, DATA))
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match="early"):
            checkpoint.tree["b"].read()


# ---- shards


def write_shards(folder: Path, kind: str = "safetensors") -> dict[str, str]:
    """Writes two shards and their index; returns its weight_map."""
    names = {"safetensors": "model-{}.safetensors", "torch": "pytorch_model-{}.bin"}[kind]
    one, two = names.format(1), names.format(2)
    arrays = {one: {"a": np.ones(2, np.float32)}, two: {"b": np.zeros(3, np.float32)}}
    for shard, tensors in arrays.items():
        content = make.torch_file(tensors)
        if kind == "safetensors":
            (name, array), = tensors.items()  # fmt: skip
            entry = {"dtype": "F32", "shape": [array.size], "data_offsets": [0, array.nbytes]}
            content = make.safetensors_file({name: entry}, array.tobytes())
        make.write(folder / shard, content)
    weight_map = {"b": two, "a": one}
    write_index(folder, weight_map, kind)
    return weight_map


def write_index(folder: Path, weight_map: object, kind: str = "safetensors") -> Path:
    stem = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}[kind]
    content = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    return make.write(folder / f"{stem}.index.json", content.encode())


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_shards_are_joined(kind, tmp_path):
    write_shards(tmp_path, kind)
    index = next(tmp_path.glob("*.index.json"))
    for path in (tmp_path, index):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.format == kind
            assert len(checkpoint.files) == 3
            assert checkpoint.files[0] == index
            got = values(checkpoint.tree)
            assert_same(got, {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)})


def test_a_shard_may_be_a_link_as_in_the_cache_of_huggingface_hub(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-1.safetensors").rename(tmp_path.parent / f"{tmp_path.name}.blob")
    (tmp_path / "model-1.safetensors").symlink_to(f"../{tmp_path.name}.blob")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tree) == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": "model-3.safetensors"}, "'model-3.safetensors', which is not in its folder"),
        ({"c": "model-1.safetensors"}, "lacks 'c'"),
        ({"b": "model-1.safetensors"}, "lacks 'b'"),
        ({"b": None}, "'b' into a file outside of its folder"),
        ({"b": ""}, "outside of its folder"),
        ({"b": "."}, "outside of its folder"),
        ({"b": "../model-2.safetensors"}, "outside of its folder"),
        ({"b": "sub/../model-2.safetensors"}, "outside of its folder"),
        ({"b": "/etc/passwd"}, "outside of its folder"),
        ({"b": "..\\model-2.safetensors"}, "outside of its folder"),
        ({"b": "C:model-2.safetensors"}, "outside of its folder"),
        ({"b": "model-2\0.safetensors"}, "outside of its folder"),
        ({"b": "\ud800"}, "not in its folder"),
        ({"b": "model.safetensors.index.json"}, "index of shards, where a shard is expected"),
    ],
)
def test_an_index_that_lies_is_an_error(change, message, tmp_path):
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {**weight_map, **change})
    with pytest.raises(CheckpointError) as caught, open_checkpoint(tmp_path):
        pass
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors.index.json: ")


def test_a_tensor_in_a_shard_that_the_index_does_not_name_is_an_error(tmp_path):
    weight_map = write_shards(tmp_path)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    more = {"a": entry, "extra": {**entry, "data_offsets": [4, 8]}}
    make.write(tmp_path / weight_map["a"], make.safetensors_file(more, bytes(8)))
    assert "does not put there: 'extra'" in error_of(tmp_path)


@pytest.mark.parametrize(
    "text", [b"{}", b'{"weight_map": 3}', b'{"weight_map": {}}', b"{", b'{"a": 1, "a": 2}',
             b'{"a": ' + b"[" * 100_000, b'{"\xff"}', b'{"a": ' + b"9" * 5000 + b"}"]
)  # fmt: skip
def test_an_index_without_a_weight_map_is_an_error(text, tmp_path):
    error_of(make.write(tmp_path / "x.json", text))


# ---- what is no checkpoint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "is no checkpoint"),
        (b"\n\x1b[31m\xff", "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "torch 1.6"),
        (b"\x80\x04N.", "bare pickle"),
        (b"sys_info".ljust(257, b"\0") + b"ustar  \0".ljust(255, b"\0"), "torch 1.6"),
        (make.torch_zip(b"N.", {}).replace(b"data.pkl", b"data.npy"), "0 data.pkl"),
        (make.torch_zip(b"N.", {}, **{"x": b""}).replace(b"little", b"big..."), "damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(content, message, tmp_path):
    assert message in error_of(make.write(tmp_path / "x.pth", content))


def test_an_error_is_one_line_that_a_terminal_can_show():
    assert str(CheckpointError("x.pth: ö\n\x1b[31m\u2028\ud800")) == (
        r"x.pth: ö\n\x1b[31m\u2028\ud800"
    )


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    make.write(tmp_path / "file", b"")
    for path in (tmp_path / "x.pth", tmp_path / "file" / "x.pth", tmp_path):
        with pytest.raises(FileNotFoundError) as caught, open_checkpoint(path):
            pass
        assert str(caught.value).startswith(f"{path}: ")
        assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    assert "is not a file" in error_of(tmp_path / "x.pth")


def test_big_endian_files_are_refused(tmp_path):
    file = io.BytesIO(make.torch_file(WEIGHTS))
    content = file.getvalue()
    path = make.write(tmp_path / "x.pth", reseal(content, b"little", b"bigbig"))
    assert "byte order" in error_of(path)


def reseal(content: bytes, old: bytes, new: bytes) -> bytes:
    """Replaces bytes of an entry and its checksum, so that the zip is sound."""
    before, after = (zlib.crc32(data).to_bytes(4, "little") for data in (old, new))
    return content.replace(old, new).replace(before, after)


def test_files_are_closed_when_the_context_ends(tmp_path):
    path = make.write(tmp_path / "x.pth", make.torch_file(WEIGHTS))
    with open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tree["half"]
    with pytest.raises(ValueError, match="closed"):
        tensor.read()
    with contextlib.suppress(CheckpointError), open_checkpoint(make.write(path, b"PK\3\4")):
        pass
