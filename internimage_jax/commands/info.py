"""Show versions, devices, and where kernels serve and why not elsewhere."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from internimage_jax.commands import no_devices, output
from internimage_jax.evaluation_settings import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    found = {
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}",
        **_devices(),
        "kernels": _kernels(),
    }
    if args.json:
        print(json.dumps(found))
    else:
        _print_table(found)


def _devices() -> dict[str, Any]:
    import jax

    if reason := no_devices():
        return {"platform": None, "devices": [], "devices_error": reason}
    devices = [
        {"id": one.id, "platform": one.platform, "kind": one.device_kind} for one in jax.devices()
    ]
    return {"platform": jax.default_backend(), "devices": devices, "devices_error": None}


def _kernels() -> list[dict[str, str]]:
    import xla_ops

    return [
        {"platform": name, "implementation": implementation, "reason": reason}
        for name, (implementation, reason) in xla_ops.status().items()
    ]


def _print_table(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for package, version in found["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("machine", found["machine"])
    table.add_section()
    for device in found["devices"]:
        table.add_row(f"device {device['id']}", f"{device['platform']}, {device['kind']}")
    if found["devices_error"]:
        table.add_row("devices", f"none: {found['devices_error']}")
    table.add_section()
    for row in found["kernels"]:
        reason = f" ({row['reason']})" if row["reason"] else ""
        table.add_row(f"operators on {row['platform']}", f"{row['implementation']}{reason}")
    output().print(table)
