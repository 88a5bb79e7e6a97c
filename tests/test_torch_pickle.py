"""Nothing in a pickle is executed, and a damaged or hostile one is one clear error."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import pickle
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import torch_pickle, torch_tensors
from convert.torch_file import CheckpointError, Inert, LazyTensor, open_checkpoint
from tests import checkpoint_files as make

EXTENSION = 0x7E


class Touches:
    """Leaves a file behind whatever is done with it."""

    marker: Path

    def __new__(cls, *args: object, **kwargs: object) -> Touches:
        cls.marker.touch()
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.marker.touch()


class Quiet:
    """Leaves a file behind when a state is put on it, or an item in it."""

    def __setstate__(self, state: object) -> None:
        Touches.marker.touch()

    def append(self, item: object) -> None:
        Touches.marker.touch()

    def __setitem__(self, key: object, value: object) -> None:
        Touches.marker.touch()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


HERE = __name__.encode()
TOUCH = text("__import__('pathlib').Path({marker!r}).touch()")
QUIET = b"c" + HERE + b"\nQuiet\n)\x81"

# Each leaves {marker} behind where Python's own unpickler reads it.
ATTACKS = {
    "os.system": b"cos\nsystem\n" + text("touch {marker}") + b"\x85R.",
    "posix.system": b"cposix\nsystem\n" + text("touch {marker}") + b"\x85R.",
    "subprocess": b"csubprocess\ncall\n](" + text("touch") + text("{marker}") + b"e\x85R.",
    "builtins.eval": b"cbuiltins\neval\n" + TOUCH + b"\x85R.",
    "builtins.exec": b"cbuiltins\nexec\n" + TOUCH + b"\x85R.",
    "python 2 name": b"c__builtin__\neval\n" + TOUCH + b"\x85R.",
    "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93"
    + text("touch {marker}") + b"\x85R.",
    "dotted name": b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93"
    + text("touch {marker}") + b"\x85R.",
    "getattr": b"cbuiltins\ngetattr\ncposix\n__spec__\n" + text("__class__") + b"\x86R0"
    + b"cbuiltins\ngetattr\ncpathlib\nos\n" + text("system") + b"\x86R"
    + text("touch {marker}") + b"\x85R.",
    "class of a package": b"c" + HERE + b"\nTouches\n)R.",
    "NEWOBJ": b"c" + HERE + b"\nTouches\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04c" + HERE + b"\nTouches\n)}\x92.",
    "INST": b"(" + text("touch {marker}") + b"ios\nsystem\n.",
    "OBJ": b"(c" + HERE + b"\nTouches\no.",
    "EXT1": b"\x82" + bytes([EXTENSION]) + TOUCH + b"\x85R.",
    "EXT2": b"\x83" + bytes([EXTENSION, 0]) + TOUCH + b"\x85R.",
    "EXT4": b"\x84" + bytes([EXTENSION, 0, 0, 0]) + TOUCH + b"\x85R.",
    "BUILD": QUIET + b"}b.",
    "APPEND": QUIET + b"Na.",
    "SETITEM": QUIET + b"NNs.",
    "SETITEMS": QUIET + b"(NNu.",
    "in a tensor's arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\n"
    + text("touch {marker}") + b"\x85RNNNNNtR.",
    "reduce of partial": b"cfunctools\npartial\ncos\nsystem\n\x85R" + text("touch {marker}")
    + b"\x85R.",
}  # fmt: skip


def read_tree(folder: Path, data_pkl: bytes, storages: dict[str, bytes] | None = None) -> Any:
    path = make.write(folder / "x.pth", make.torch_zip(data_pkl, storages or {}))
    with open_checkpoint(path) as checkpoint:
        return checkpoint.tree


def error_of(folder: Path, data_pkl: bytes, storages: dict[str, bytes] | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tree(folder, data_pkl, storages)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'x.pth'}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(folder)) + 400
    return message


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("builtins", "eval", EXTENSION)
    yield
    copyreg.remove_extension("builtins", "eval", EXTENSION)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(attack, tmp_path, extension, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setattr(Touches, "marker", marker, raising=False)
    # Lengths stand before the text, so the marker's name is put in before it is written.
    program = ATTACKS[attack]
    for template in (text("touch {marker}"), TOUCH, text("{marker}")):
        filled = template[5:].decode().format(marker=str(marker))
        program = program.replace(template, text(filled))

    with contextlib.suppress(Exception):
        pickle.loads(program)
    harmful = marker.exists()
    marker.unlink(missing_ok=True)
    needs_torch = attack == "in a tensor's arguments"
    assert harmful or needs_torch, "this attack would prove nothing"

    with contextlib.suppress(CheckpointError):
        tree = read_tree(tmp_path, program)
        assert isinstance(tree, Inert)
    assert not marker.exists()


def test_no_module_is_imported(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    plain = builtins.__import__
    imported = []

    def spy(name: str, *args: Any, **kwargs: Any) -> object:
        imported.append(name)
        return plain(name, *args, **kwargs)

    path = make.write(tmp_path / "x.pth", make.torch_zip(b"(cthis\ns\nctorch\nTensor\nt.", {}))
    monkeypatch.setattr(builtins, "__import__", spy)
    with open_checkpoint(path) as checkpoint:
        names = [inert.name for inert in checkpoint.tree]
    assert names == ["this.s", "torch.Tensor"]
    assert "this" not in sys.modules
    assert "torch" not in imported


@pytest.mark.parametrize(
    "program",
    [
        b"cpkg\nThing\n)R.",
        b"cpkg\nThing\n)\x81.",
        b"\x80\x04cpkg\nThing\nN\x85}\x92.",
        b"(ipkg\nThing\n.",
        b"(cpkg\nThing\nNo.",
        b"cpkg\nThing\n)\x81}b.",
        b"cpkg\nThing\n)\x81(NNu.",
        b"cpkg\nThing\n)\x81NNs.",
        b"cpkg\nThing\n)\x81(NNNe.",
        b"cpkg\nThing\n)\x81Na.",
        b"cpkg\nThing\n)\x81(NN\x90.",
        b"cpkg\nThing\n)R)R)R.",
    ],
)
def test_an_object_of_an_unknown_class_takes_whatever_its_pickle_does_to_it(program, tmp_path):
    tree = read_tree(tmp_path, program)
    assert isinstance(tree, Inert)
    assert tree.name == "pkg.Thing()"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_objects_of_every_protocol_come_back_equal(protocol, tmp_path):
    shared = [1]
    tree = {
        "ints": [0, 255, 65536, -1, 2**40, -(2**100)],
        "floats": (1.5, -0.0, float("inf")),
        "text": ["", "a", "ö€😀", "x" * 300, "line\nbreak"],
        "others": (None, True, False, (), [], {}, ((1, 2), (1, 2, 3, 4))),
        "shared": [shared, shared],
        1: {2.5: {None: "keys"}},
    }
    if protocol > 2:  # before, bytes are a call of a codec
        tree["bytes"] = [b"", b"a", b"x" * 300]
    assert read_tree(tmp_path, pickle.dumps(tree, protocol)) == tree


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


DEEP = 20_000
DOUBLED = b"]q\0" + b"".join(b"0(h%ch%ctq%c" % (i, i, i + 1) for i in range(60)) + b"."
PATHOLOGICAL = {
    "empty": b"",
    "no end": b"N",
    "two results": b"NN.",
    "nothing on the stack": b".",
    "open mark": b"(N.",
    "bytes after the end": b"N.N.",
    "stack underflow": b"\x86.",
    "append to nothing": b"Na.",
    "append to a dict": b"}Na.",
    "odd number of items": b"}(Nu.",
    "keys for a list": b"](NNu.",
    "call of a string": b"X\1\0\0\0a)R.",
    "call without a tuple": b"ca\nb\nNR.",
    "unknown instruction": b"\xff.",
    "out-of-band buffer": b"\x97.",
    "memo that is not there": b"h\7.",
    "text memo that is not there": b"g" + b"9" * 4000 + b"\n.",
    "memo of nothing": b"q\0.",
    "a number of 10000 digits": b"I" + b"9" * 10_000 + b"\n.",
    "not UTF-8": b"X\1\0\0\0\xff.",
    "huge text": b"\x8d" + u64(2**62) + b"x.",
    "huge bytes": b"\x8e" + u64(2**62) + b"x.",
    "huge bytes, 32 bits": b"B" + b"\xff" * 4 + b"x.",
    "huge byte array": b"\x96" + u64(2**63) + b"x.",
    "huge integer": b"\x8b\xff\xff\xff\x7f1.",
    "negative length": b"\x8b\xff\xff\xff\xff1.",
    "huge frame": b"\x95" + u64(2**63),
    "nested lists": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "nested tuples": b")" + b"\x85" * DEEP + b".",
    "nested dicts": b"}" + b"N}" * DEEP + b"s" * DEEP + b".",
    "a list in itself": b"]q\0h\0a.",
    "a dict in itself": b"}q\0Nh\0s.",
    "doubled 60 times": DOUBLED,
    "a deep shape": make.pickle(
        make.tensor(make.storage("0", "float32", 1), 0, 7, ())
    ).replace(b"I7\n", b"]" * DEEP + b"a" * (DEEP - 1)),
    "a doubled shape": make.pickle(
        make.tensor(make.storage("0", "float32", 1), 0, 7, ())
    ).replace(b"I7\n", DOUBLED[:-1]),
    "a long global name": b"X\xe8\3\0\0" + b"x" * 1000 + b"\x8c\1a\x93.",
    "a global name that is no text": b"NN\x93.",
    "a reference that is no storage": b"NQ.",
    "a reference to text": b"P0\n.",
    "too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
}  # fmt: skip


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_a_pathological_pickle_is_one_error_in_little_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_tensors, "MAX_OBJECTS", 2**15)
    tracemalloc.start()
    try:
        error_of(tmp_path, PATHOLOGICAL[name], {"0": bytes(4)})
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_hostile_keys_and_memo_indices_cost_nothing(tmp_path):
    deep_key = b"}(" + b")" + b"\x85" * DEEP + b"Nu."
    (key,) = read_tree(tmp_path, deep_key)  # Python would overflow its stack in hash()
    assert isinstance(key, Inert)
    huge_key = b"}\x8b" + (2**16).to_bytes(4, "little") + b"\1" * 2**16 + b"Ns."
    (key,) = read_tree(tmp_path, huge_key)
    assert isinstance(key, Inert)
    assert read_tree(tmp_path, b"Nr\xff\xff\xff\xff.") is None  # pickle would take 64 GB


def test_too_many_instructions_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 1000)
    assert "more than 1000 instructions" in error_of(tmp_path, b"N0" * 1000 + b"N.")


STORE = make.storage("0", "float32", 6)


@pytest.mark.parametrize(
    ("store", "offset", "shape", "strides", "message"),
    [
        (STORE, 0, (7,), (1,), "outside"),
        (STORE, 1, (6,), (1,), "outside"),
        (STORE, 7, (0,), (1,), "outside"),
        (STORE, 0, (2, 3), (4, 1), "outside"),
        (STORE, 0, (2, 2), (2**62, 2**62), "outside"),
        (STORE, -1, (6,), (1,), "impossible"),
        (STORE, 0, (6,), (-1,), "impossible"),
        (STORE, 0, (6,), (1, 1), "impossible"),
        (STORE, 0, (6,), (), "impossible"),
        (STORE, None, (6,), (1,), "impossible"),
        (STORE, 0, (6,), (None,), "impossible"),
        (STORE, 0, (-6,), (1,), "not made of sizes"),
        (STORE, 0, (True,), (1,), "not made of sizes"),
        (STORE, 0, ("6",), (1,), "not made of sizes"),
        (STORE, 0, (2**64,), (0,), "not made of sizes"),
        (STORE, 0, (2**62,), (0,), "impossible shape"),
        (STORE, 0, (0, 2**62, 2**62), (0, 0, 0), "impossible shape"),
        (STORE, 0, (2**40,), (0,), "larger than the whole file"),
        (STORE, 0, (1,) * 33, (1,) * 33, "33 dimensions"),
        (STORE, 0, None, None, "without shape"),
        (make.storage("1", "float32", 6), 0, (6,), (1,), "'1' is not in the file"),
        (make.storage("0", "float32", 5), 0, (5,), (1,), "24 bytes, not 5 times 4"),
        (make.storage("0", "float32", 2**62), 0, (5,), (1,), "24 bytes"),
        (make.storage("0", "int64", 6), 0, (6,), (1,), "24 bytes"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_an_error(
    store, offset, shape, strides, message, tmp_path
):
    data_pkl = make.pickle({"x": make.tensor(store, offset, shape, strides)}).replace(
        b"I18446744073709551616\n", b"L18446744073709551616L\n"
    )
    assert message in error_of(tmp_path, data_pkl, {"0": bytes(24)})


def test_a_strided_tensor_is_read_from_its_part_of_the_storage(tmp_path):
    values = np.arange(6, dtype=np.float32)
    views = {
        "rows": ((2, 2), (3, 1), 1),
        "transposed": ((3, 2), (1, 3), 0),
        "repeated": ((4, 2), (0, 1), 4),
        "scalar": ((), (), 5),
        "empty": ((0, 3), (9, 9), 6),
        "ones": ((1, 6, 1), (99, 1, 7), 0),
    }
    tree = {
        n: make.tensor(STORE, start, shape, steps) for n, (shape, steps, start) in views.items()
    }
    content = make.torch_zip(make.pickle(tree), {"0": values.tobytes()})
    with open_checkpoint(make.write(tmp_path / "x.pth", content)) as checkpoint:
        got = {name: tensor.read().tolist() for name, tensor in checkpoint.tree.items()}
    assert got == {
        "rows": [[1, 2], [4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "repeated": [[4, 5]] * 4,
        "scalar": 5,
        "empty": [],
        "ones": [[[0], [1], [2], [3], [4], [5]]],
    }


def test_a_storage_of_an_unknown_type_and_a_tensor_in_it_are_inert(tmp_path):
    store = make.Reference(("storage", make.Name("torch", "QInt8Storage"), "0", "cpu", 6))
    tree = read_tree(tmp_path, make.pickle({"a": make.tensor(store, 0, (6,), (1,)), "b": store}))
    assert isinstance(tree["a"], Inert)
    assert tree["b"].name == "torch.QInt8Storage()"


def test_the_state_of_an_ordered_dict_is_dropped_and_its_items_are_kept(tmp_path):
    program = b"ccollections\nOrderedDict\n)R(X\1\0\0\0aK\1u}X\t\0\0\0_metadataNsb."
    assert read_tree(tmp_path, program) == {"a": 1}


def test_a_tensor_has_the_name_that_is_nearest_above_it(tmp_path):
    one = make.tensor(STORE, 0, (6,), (1,))
    tree = read_tree(tmp_path, make.pickle({"model": {"w": one}, "list": [one]}), {"0": bytes(24)})
    assert isinstance(tree["model"]["w"], LazyTensor)
    assert tree["model"]["w"].name == "w"
    assert tree["list"][0].name == "list"
