"""A checkpoint that is truncated or damaged anywhere is a clear error, never a wrong tensor."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.torch_file import CheckpointError, open_checkpoint
from tests import checkpoint_files as make

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7, np.int64)}
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]},
}
TORCH = make.torch_file(ARRAYS)
SAFETENSORS = make.safetensors_file(HEADER, bytes(range(22)))


def real_torch_file(path: Path) -> bytes:
    """Returns a file of torch itself, with padding, 64-bit directory and data descriptors."""
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)
    return path.read_bytes()


def opens(path: Path) -> bool:
    """Says whether a checkpoint opens; if not, the error is as it should be."""
    try:
        with open_checkpoint(path):
            return True
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 400
    return False


def shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Returns each tensor's shape, all being read; None if the checkpoint does not open."""
    if not opens(path):
        return None
    with open_checkpoint(path) as checkpoint:
        return {name: tensor.read().shape for name, tensor in checkpoint.tree.items()}


@pytest.mark.parametrize("kind", ["torch", "handmade", "safetensors"])
def test_a_file_truncated_at_any_byte_is_an_error_that_names_it(kind, tmp_path):
    path = tmp_path / "x"
    content = {"handmade": TORCH, "safetensors": SAFETENSORS}.get(kind) or real_torch_file(path)
    assert shapes(make.write(path, content)) is not None
    for size in range(len(content)):
        assert shapes(make.write(path, content[:size])) is None, size


@pytest.mark.parametrize("kind", ["torch", "handmade", "safetensors"])
@pytest.mark.parametrize("garbage", [b"\0", b"PK\5\6", bytes(22), bytes(4096), TORCH])
def test_a_file_with_anything_after_its_end_is_an_error(kind, garbage, tmp_path):
    path = tmp_path / "x"
    content = {"handmade": TORCH, "safetensors": SAFETENSORS}.get(kind) or real_torch_file(path)
    assert shapes(make.write(path, content + garbage)) is None


@pytest.mark.parametrize("garbage", [b"\0", b"PK\3\4", TORCH])
def test_a_torch_file_with_anything_before_it_is_an_error(garbage, tmp_path):
    assert shapes(make.write(tmp_path / "x", garbage + TORCH)) is None


# ---- random damage

FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "insert", "cut", "repeat"]),
        st.integers(0, 2**16),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    for kind, position, value in changes:
        at = position % (len(content) + 1)
        before, after = content[:at], content[at:]
        match kind:
            case "set":
                content = before + bytes([value]) + after[1:]
            case "delete":
                content = before + after[1:]
            case "insert":
                content = before + bytes([value]) + after
            case "cut":
                content = before + after[value:]
            case "repeat":
                content = before + after[:value] + after
    return content


@pytest.fixture(scope="module")
def torch_contents(tmp_path_factory):
    contents = [TORCH]
    with contextlib.suppress(pytest.skip.Exception):
        contents.append(real_torch_file(tmp_path_factory.mktemp("torch") / "x"))
    return contents


@FUZZ
@given(changes=edits)
def test_a_damaged_torch_file_is_an_error_or_has_the_same_tensors(
    changes, torch_contents, tmp_path
):
    for content in torch_contents:
        got = shapes(make.write(tmp_path / "x", damaged(content, changes)))
        assert got is None or got == {name: array.shape for name, array in ARRAYS.items()}


@FUZZ
@given(changes=edits)
def test_a_damaged_pickle_is_an_error_or_an_object(changes, tmp_path):
    # A valid checksum, unlike above: any program at all reaches the machine.
    for tree in (
        {"a": make.tensor(make.storage("0", "float32", 2), 0, (2,), (1,))},
        {"b": [1, {}]},
    ):
        data_pkl = damaged(make.pickle(tree), changes)
        path = make.write(tmp_path / "x", make.torch_zip(data_pkl, {"0": bytes(8)}))
        tracemalloc.start()
        try:
            opens(path)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**22


@FUZZ
@given(changes=edits)
def test_a_damaged_safetensors_file_is_an_error_or_describes_all_its_bytes(changes, tmp_path):
    content = damaged(SAFETENSORS, changes)
    path = make.write(tmp_path / "x", content)
    header_end = len(SAFETENSORS) - 22
    got = shapes(path)
    if content[:header_end] == SAFETENSORS[:header_end] and len(content) == len(SAFETENSORS):
        assert got == {"a": (2, 2), "b": (3,)}
    elif got is not None:  # the header has no checksum: a changed name is a name
        with open_checkpoint(path) as checkpoint:
            assert sum(tensor.nbytes for tensor in checkpoint.tree.values()) == len(content) - (
                8 + int.from_bytes(content[:8], "little")
            )


BEGINNINGS = [b"PK\3\4", b"\x40" + b"\0" * 7 + b"{", b"{", b"\x80\2", b""]


@FUZZ
@given(content=st.binary(max_size=300), prefix=st.sampled_from(BEGINNINGS))
def test_random_bytes_are_an_error(content, prefix, tmp_path):
    assert shapes(make.write(tmp_path / "x", prefix + content)) is None


# ---- a zip that lies


def central(content: bytes, name: bytes) -> int:
    """Returns where the directory's entry of a file begins."""
    return content.rindex(name) - 46


@pytest.mark.parametrize("field", [20, 24])
@pytest.mark.parametrize("size", [0, 1, 23, 25, 2**31, 2**32 - 1])
def test_an_entry_whose_size_lies_is_an_error(field, size, tmp_path):
    at = central(TORCH, b"weights/data/0") + field
    content = TORCH[:at] + size.to_bytes(4, "little") + TORCH[at + 4 :]
    assert shapes(make.write(tmp_path / "x", content)) is None
    both = central(TORCH, b"weights/data/0") + 20
    content = TORCH[:both] + size.to_bytes(4, "little") * 2 + TORCH[both + 8 :]
    assert shapes(make.write(tmp_path / "x", content)) is None


def test_a_storage_that_overlaps_the_next_is_an_error(tmp_path):
    other = make.storage("0", "float32", 100)
    tree = {"a": make.tensor(other, 0, (100,), (1,))}
    content = make.torch_zip(make.pickle(tree), {"0": bytes(24), "1": bytes(400)})
    at = central(content, b"weights/data/0") + 20
    content = content[:at] + (400).to_bytes(4, "little") * 2 + content[at + 8 :]
    path = make.write(tmp_path / "x", content)
    with pytest.raises(CheckpointError, match="entry 'weights/data/0'"), open_checkpoint(path):
        pass


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The number of entries, the length of a comment that is not there, and the size of both.
        (patched(TORCH, len(TORCH) - 12, b"\7"), "4 entries; 7 are announced"),
        (patched(TORCH, len(TORCH) - 2, b"\1"), "does not end as a zip"),
        (patched(TORCH, len(TORCH) - 10, b"\xff\xff\xff\x7f"), "does not end as a zip"),
        (patched(TORCH, TORCH.index(b"weights/data/1"), b"weights/data/2"), "no 'weights/data/1'"),
        (patched(TORCH, TORCH.index(b"weights/data/1") - 30, b"PK\3\5"), "no 'weights/data/1'"),
        (patched(TORCH, TORCH.index(b"weights/data/1") - 4, b"\x0d"), "entry 'weights/data/1'"),
        (patched(TORCH, TORCH.index(b"weights/data/1") - 2, b"\1"), "entry 'weights/data/1'"),
        # Marked as compressed or encrypted, though the size stays the same.
        (patched(TORCH, TORCH.index(b"weights/data/1") - 22, b"\x08"), "entry 'weights/data/1'"),
        (patched(TORCH, TORCH.rindex(b"weights/data/1") - 36, b"\x08"), "compressed or encrypted"),
        (patched(TORCH, TORCH.rindex(b"weights/data/1") - 38, b"\1"), "compressed or encrypted"),
    ],
)
def test_a_zip_whose_parts_disagree_is_an_error(content, message, tmp_path):
    path = make.write(tmp_path / "x", content)
    with pytest.raises(CheckpointError, match=message), open_checkpoint(path):
        pass


def test_a_compressed_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", b"N" + b"0N" * 100 + b".")
    with pytest.raises(CheckpointError, match="compressed"), open_checkpoint(tmp_path / "x"):
        pass


def test_two_entries_of_one_name_are_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("weights/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("weights/data.pkl", b"N.")
    assert shapes(tmp_path / "x") is None


def test_an_archive_of_the_64_bit_form_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)  # as if each entry had more than 4 GiB
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    content = make.torch_file(ARRAYS)
    assert b"PK\6\6" in content
    assert b"PK\6\7" in content
    path = make.write(tmp_path / "x", content)
    assert shapes(path) == {name: array.shape for name, array in ARRAYS.items()}
    for size in range(len(content)):
        assert shapes(make.write(path, content[:size])) is None, size


# ---- a safetensors header that lies

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff{}",
        b'{"\xff": 1}',
        b"{" + b'"a":[' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": {"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"a": {"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
        {"a": 1},
        {"a": {}},
        {"a": {**GOOD, "dtype": "F8"}},
        {"a": {**GOOD, "dtype": 3}},
        {"a": {**GOOD, "dtype": "F16"}},
        {"a": {**GOOD, "shape": [2, 3]}},
        {"a": {**GOOD, "shape": [-2, -2]}},
        {"a": {**GOOD, "shape": [2.0, 2]}},
        {"a": {**GOOD, "shape": [True, 4]}},
        {"a": {**GOOD, "shape": "22"}},
        {"a": {**GOOD, "shape": [2**63, 2**63, 0]}},
        {"a": {**GOOD, "shape": [1] * 40 + [4]}},
        {"a": {**GOOD, "shape": [10**3000] * 30}},
        {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {**GOOD, "data_offsets": [0, 15]}},
        {"a": {**GOOD, "data_offsets": [0, 17]}},
        {"a": {**GOOD, "data_offsets": [1, 17]}},
        {"a": {**GOOD, "data_offsets": [16, 0]}},
        {"a": {**GOOD, "data_offsets": [-16, 0]}},
        {"a": {**GOOD, "data_offsets": [2**64, 2**64 + 16]}},
        {"a": {**GOOD, "data_offsets": [0.0, 16.0]}},
        {"a": GOOD, "b": GOOD},
        {"a": {**GOOD, "shape": [2], "data_offsets": [0, 8]}},
        {
            "a": {**GOOD, "shape": [1], "data_offsets": [0, 4]},
            "b": {**GOOD, "shape": [2], "data_offsets": [8, 16]},
        },
        {
            "a": {**GOOD, "shape": [3], "data_offsets": [0, 12]},
            "b": {**GOOD, "shape": [2], "data_offsets": [8, 16]},
        },
    ],
)
def test_a_safetensors_header_that_lies_is_an_error(header, tmp_path):
    path = make.write(tmp_path / "x", make.safetensors_file(header, bytes(16)))
    assert shapes(path) is None


@pytest.mark.parametrize("length", [0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_safetensors_length_that_lies_is_an_error_in_little_memory(length, tmp_path):
    path = make.write(tmp_path / "x", length.to_bytes(8, "little") + SAFETENSORS[8:])
    tracemalloc.start()
    try:
        assert shapes(path) is None
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_file_that_ends_within_its_header_says_what_is_missing(tmp_path):
    path = make.write(tmp_path / "x", SAFETENSORS[:40])
    length = int.from_bytes(SAFETENSORS[:8], "little")
    message = f"has 40 bytes; {length} at 8 are needed"
    with pytest.raises(CheckpointError, match=message), open_checkpoint(path):
        pass


def test_a_header_of_more_than_its_limit_is_refused_unread(tmp_path):
    path = make.write(tmp_path / "x", (2**30).to_bytes(8, "little") + b"{")
    os.truncate(path, 2**30 + 8)  # a hole: it takes no space
    with pytest.raises(CheckpointError, match="at most 16777216"), open_checkpoint(path):
        pass


def test_empty_and_scalar_safetensors_are_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
    }
    path = make.write(tmp_path / "x", make.safetensors_file(header, bytes(8)))
    assert shapes(path) == {"empty": (0, 3), "scalar": ()}
    assert shapes(make.write(path, make.safetensors_file(b"{}      ", b""))) == {}
