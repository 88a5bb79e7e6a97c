"""Released models come from the hub once, are converted once, and work offline from then on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internimage_jax.cache import cache_folder
from internimage_jax.config import RELEASED, ReleasedModel
from internimage_jax.pretrained import from_pretrained
from tests.hub_server import COMMIT, Hub, serving
from tests.recipe_checkpoints import CONFIG, assert_same, flax_arrays, weights, write
from tests.support import arrays_of

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parent.parent
NAME = "internimage_t_1k_224"
CONVERTED = f"{NAME}-{COMMIT[:12]}"
TINY = ReleasedModel(NAME, CONFIG, 64, "none", None)


def forget_hub_modules() -> None:
    """Makes the next import of huggingface_hub read the environment, which it does only then."""
    for name in list(sys.modules):
        if name.split(".")[0] == "huggingface_hub":
            del sys.modules[name]


@pytest.fixture
def repository(tmp_path: Path) -> dict[str, bytes]:
    folder = write(tmp_path / "repository", "hf", settings={"_name_or_path": f"OpenGVLab/{NAME}"})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "README.md": b"# InternImage", "internimage_t_1k_224.pth": b"x"}


@pytest.fixture
def hub(
    repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A hub with the tiny model under a released name."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("INTERNIMAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RELEASED, NAME, TINY)
    forget_hub_modules()
    with serving(f"OpenGVLab/{NAME}", repository) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served
    forget_hub_modules()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget_hub_modules()


def error_of(**options: Any) -> str:
    """Returns why the model cannot be fetched, checked to be one line that names it."""
    with pytest.raises(OSError, match=NAME) as caught:
        from_pretrained(NAME, **options)
    text = str(caught.value)
    assert text.startswith(f"{NAME}: cannot be fetched from OpenGVLab/{NAME}: ")
    assert len(text.splitlines()) == 1
    return text


def test_a_model_is_fetched_once_and_converted_once(hub: Hub, tmp_path: Path) -> None:
    model = from_pretrained(NAME)
    assert_same(arrays_of(model), flax_arrays(CONFIG))
    assert (model.name, model.config, model.preprocessing.image_size) == (NAME, CONFIG, 64)
    wanted = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(hub.downloads()) == wanted  # and not the .pth
    converted = tmp_path / "cache" / CONVERTED / "model.safetensors"
    made, count = converted.stat(), len(hub.requests)

    again = from_pretrained(f"OpenGVLab/{NAME}", num_classes=3)
    assert again.config.num_classes == 3
    assert sorted(hub.downloads()) == wanted
    assert all("/api/" in request for request in hub.requests[count:])
    assert converted.stat() == made


def test_offline_a_fetched_model_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from_pretrained(NAME)
    hub.requests.clear()
    go_offline(monkeypatch)
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))
    assert hub.requests == []


def test_offline_a_model_that_was_not_fetched_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    assert "HF_HUB_OFFLINE" in error_of()
    assert hub.requests == []
    assert not (tmp_path / "cache").exists()


def test_a_repository_with_pytorch_files_alone_serves_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "bin", "hf-bin")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = from_pretrained(NAME)
    assert_same(arrays_of(model), flax_arrays(CONFIG))
    assert model.name == NAME  # though its config.json does not say it
    assert sorted(hub.downloads()) == [
        "config.json",
        "preprocessor_config.json",
        "pytorch_model.bin",
    ]
    go_offline(monkeypatch)
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))


def test_shards_are_fetched_together(hub: Hub, tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", "hf-shards")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))
    assert sorted(hub.downloads()) == sorted(hub.files)


def test_a_new_release_is_converted_anew(hub: Hub, tmp_path: Path) -> None:
    from_pretrained(NAME)
    hub.commit = hub.commit[::-1]
    twice = {n: 2 * a for n, a in flax_arrays(CONFIG).items()}
    arrays = {name: 2 * array for name, array in weights(CONFIG).items()}
    folder = write(tmp_path / "new", "hf", arrays=arrays)
    hub.files["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    assert_same(arrays_of(from_pretrained(NAME)), twice)


def test_a_hub_that_is_down_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    forget_hub_modules()
    error_of()


def test_a_repository_that_is_gone_is_one_line(hub: Hub) -> None:
    hub.repository = "OpenGVLab/another"
    assert "404" in error_of()


def test_a_connection_that_breaks_is_one_line_and_the_next_call_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the hub's client tries again
    hub.broken_after = 1000
    error_of()
    assert not (tmp_path / "cache").exists()
    hub.broken_after = None
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))


def test_a_damaged_release_is_one_line_and_leaves_nothing_in_the_cache(
    hub: Hub, tmp_path: Path
) -> None:
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-4]
    with pytest.raises(ValueError, match=r"model\.safetensors: .*truncated"):
        from_pretrained(NAME)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{CONVERTED}.lock"]


def test_a_release_that_is_another_model_is_an_error(hub: Hub, tmp_path: Path) -> None:
    other = write(tmp_path / "other", "hf", CONFIG.replace(offset_scale=2.0))
    hub.files = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(ValueError, match=rf"another model than {NAME}: offset_scale 2\.0, not 1"):
        from_pretrained(NAME)


def test_what_a_killed_conversion_left_in_the_cache_is_removed(hub: Hub, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    half = tmp_path / "cache" / f".{CONVERTED}.{socket.gethostname()}.{process.pid}-0.unfinished"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock") == [
        CONVERTED
    ]


def test_two_processes_at_once_convert_once(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys, convert.conversion, internimage_jax.pretrained as p;"
        "from tests.test_pretrained_hub import RELEASED, NAME, TINY;"
        "RELEASED[NAME] = TINY;"
        "count = [];"
        "original = p.convert;"
        "p.convert = lambda *a, **k: (count.append(1), original(*a, **k));"
        "print('ready', flush=True); sys.stdin.readline();"
        "p.from_pretrained(NAME); print(len(count))"
    )
    command = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    both = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    for process in both:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    counts = [int(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(counts) == [0, 1]
    assert_same(arrays_of(from_pretrained(NAME)), flax_arrays(CONFIG))


def test_the_cache_is_below_the_users_unless_said_otherwise(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INTERNIMAGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    from_pretrained(NAME)
    assert (tmp_path / "home" / ".cache" / "internimage_jax" / CONVERTED).is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    from_pretrained(NAME)
    assert (tmp_path / "xdg" / "internimage_jax" / CONVERTED).is_dir()
    monkeypatch.setenv("INTERNIMAGE_CACHE", "")  # as if it were not set
    assert cache_folder() == tmp_path / "xdg" / "internimage_jax"


def test_without_huggingface_hub_the_error_says_how_to_get_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match="to fetch it, pip install huggingface_hub"):
        from_pretrained(NAME)
