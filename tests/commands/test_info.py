"""`info`: versions, devices, and what serves there."""

from __future__ import annotations

import json
import os
import re
import sys

import jax

from internimage_jax.__main__ import main
from internimage_jax.commands import info
from tests.commands.running import Capture, run_python


def test_info_tells_versions_devices_and_what_serves(capsys: Capture) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["python"] == sys.version.split()[0]
    assert len(found["devices"]) == len(jax.devices())
    assert found["platform"] == jax.default_backend()
    assert found["kernels"]
    for row in found["kernels"]:
        assert row["implementation"] in ("kernel", "gather")
        assert row["reason"] or row["implementation"] == "kernel"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out
    assert found["kernels"][0]["implementation"] in out


def test_the_table_of_info_has_a_row_for_all_that_was_found(capsys: Capture) -> None:
    found = {
        "versions": {"jax": "0.10.2", "flax": None},
        "machine": "Linux x86_64",
        "devices": [{"id": i, "platform": "gpu", "kind": "H100"} for i in range(2)],
        "devices_error": None,
        "kernels": [
            {"platform": "cpu", "implementation": "kernel", "reason": ""},
            {"platform": "cuda", "implementation": "gather", "reason": "not built"},
        ],
    }
    info._print_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.strip()] == [
        "jax 0.10.2",
        "flax not installed",
        "machine Linux x86_64",
        "device 0 gpu, H100",
        "device 1 gpu, H100",
        "operators on cpu kernel",
        "operators on cuda gather (not built)",
    ]
    info._print_table({**found, "devices": [], "devices_error": "no such platform"})
    assert re.search(r"devices +none: no such platform", capsys.readouterr().out)


def test_info_says_why_there_is_no_device() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}
    process = run_python("-m", "internimage_jax", "info", "--json", env=environment)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(out)
    assert found["devices"] == []
    assert "nothing" in found["devices_error"]
