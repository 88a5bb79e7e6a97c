"""Puts measured figures into docs/performance.md: tables between its markers, plots beside it.

    python -m benchmarks.page benchmarks/results/*.jsonl

A result is a line of JSON that a benchmark has printed. The page's text is written by hand; what
stands between `<!-- table NAME -->` and `<!-- end -->` is made here. Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PLOTS = PAGE.parent / "plots"

Row = dict[str, Any]
# Heading and what stands below it; a row for which one raises KeyError is left out of the table.
Columns = dict[str, Callable[[Row], str]]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _with_range(row: Row, name: str) -> str:
    low, high = row[f"{name}_ms_range"]
    return f"{_number(row[f'{name}_ms'])} ({_number(low)} to {_number(high)})"


def _cell(key: str, otherwise: str | None = None) -> Callable[[Row], str]:
    """What the row has of that name; `otherwise`, if it is given, where it has none."""

    def cell(row: Row) -> str:
        value = row[key] if otherwise is None else row.get(key, otherwise)
        return _number(value) if isinstance(value, float) else str(value)

    return cell


MODEL: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch_size"),
    "dtype": _cell("dtype"),
    "implementation": _cell("implementation"),
    "ours, ms": lambda row: _with_range(row, "ours"),
    "official, ms": lambda row: _with_range(row, "official"),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "part of the 2048-cube rate": lambda row: f"{row['part_of_matmul_rate']:.2f}",
    "largest difference": lambda row: f"{row['difference']:.0e}",
    "temporaries, MB": _cell("temporary_megabytes"),
}
TRAINING: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch_size"),
    "dtype": lambda row: row["dtype"] + (", recomputing" if row["with_cp"] else ""),
    "ours, ms": lambda row: _with_range(row, "ours"),
    "official, ms": lambda row: _with_range(row, "official"),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "part of the 2048-cube rate": lambda row: f"{row['part_of_matmul_rate']:.2f}",
    "difference": lambda row: f"{row['difference']:.0e}",
    "temporaries, GB": lambda row: _number(row["temporary_megabytes"] / 1e3),
}
OPERATOR: Columns = {
    "stage": _cell("stage"),
    "batch": _cell("batch"),
    "": lambda row: {"forward": "forward", "both": "forward and backward"}[row["direction"]],
    "kernel, ms": _cell("kernel_ms"),
    "fused kernel, ms": _cell("fused_ms"),
    "jnp form / kernel": _cell("gather/kernel"),
    "official / kernel": _cell("official/kernel"),
    "official / fused": lambda row: _number(row["official_ms"] / row["fused_ms"]),
}
STARTUP: Columns = {
    "import jax and flax, s": _cell("import_jax_and_flax"),
    "import beyond them, s": lambda row: (
        f"{row['import_internimage_jax_too'] - row['import_jax_and_flax']:.2f}"
    ),
    "convert T, s": _cell("convert"),
    "first prediction, cold, s": _cell("predict_cold"),
    "first prediction, warm, s": _cell("predict_warm"),
    "trace T, s": _cell("trace_t"),
    "compile T, s": _cell("compile_t"),
    "trace G, s": _cell("trace_g"),
    "compile G, s": _cell("compile_g"),
    "Python's share of a call, us": _cell("python_microseconds"),
}
SIZES: Columns = {
    "model": _cell("model"),
    "image side": _cell("image_size"),
    "ms": _cell("ms"),
    "GFLOP/s": _cell("gflops"),
}
DEVICES: Columns = {
    "devices": _cell("devices"),
    "cores": _cell("cores"),
    "ms": _cell("ms"),
    "ms a device": _cell("ms_per_device"),
    "collectives": _cell("collectives"),
}

PROGRAMS: Columns = {
    "model": _cell("model"),
    "": _cell("program"),
    "batch": _cell("batch_size"),
    "parameters, GB": _cell("parameters_gb", ""),
    "temporaries, GB": _cell("temporaries_gb"),
    "steps": _cell("steps"),
    "command buffers": _cell("command_buffers"),
    "steps outside": _cell("outside"),
    "products": _cell("products"),
    "our calls": _cell("calls"),
    "convolutions": _cell("convolutions"),
    "copies, transposes": lambda row: str(row["copies"] + row["transposes"]),
}

GPU_TIMES: Columns = {
    "ms": lambda row: (
        f"{_number(row['milliseconds_in_a_row'])}"
        f" ({_number(row['range_in_a_row'][0])} to {_number(row['range_in_a_row'][1])})"
    ),
    "images/s": lambda row: f"{row['images_per_second']:.0f}",
    "parameters, GB": _cell("parameters_gb", ""),
    "temporaries, GB": _cell("temporaries_gb", ""),
}
GPU_MODELS: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch"),
    **GPU_TIMES,
    "steps": _cell("steps", ""),
    "command buffers": _cell("command_buffers", ""),
    "steps outside": _cell("outside", ""),
    "copies, transposes": lambda row: (
        str(row["copies"] + row["transposes"]) if "copies" in row else ""
    ),
}
GPU_TRAINING: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch"),
    "form": lambda row: row["form"] + (", recomputing" if row["recomputing"] else ""),
    **GPU_TIMES,
    "gradients finite": lambda row: "yes" if row["finite"] else "no",
    "bits differ in": lambda row: f"{row['differ_from_call_to_call']} of {row['gradients']}",
}


def _ratio(peer: str, direction: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        theirs = row.get(peer, {}).get(f"{direction}_us")
        if theirs is None:
            return ""
        graph = row[peer][f"{direction}_as_graph"]  # else Python's time is in it
        return _number(theirs / row["fused"][f"{direction}_us"]) + ("" if graph else "*")

    return cell


def _far(row: Row, name: str) -> str:
    return _number(row["far"][name]) if name in row["far"] else ""


GPU_OPERATOR: Columns = {
    "shape": lambda row: (
        f"{row['name']}: {row['batch']}x{row['side']}x{row['side']}x{row['channels']}, "
        f"{row['group']} groups"
    ),
    "dtype": _cell("dtype"),
    "forward, us": lambda row: _number(row["fused"]["forward_us"]),
    "offsets of 20 pixels, us": lambda row: _far(row, "forward_us"),
    "floor, us": lambda row: _number(max(row["taps_us"], row.get("dram_us", 0))),
    "official": _ratio("official", "forward"),
    "DCNv4": _ratio("dcnv4", "forward"),
    "deformops": _ratio("deformops", "forward"),
    "backward, us": lambda row: _number(row["fused"]["backward_us"]),
    "20 pixels, us": lambda row: _far(row, "backward_us"),
    "official ": _ratio("official", "backward"),
    "DCNv4 ": _ratio("dcnv4", "backward"),
    "deformops ": _ratio("deformops", "backward"),
}
GPU_PROFILE: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch"),
    "kernels": _cell("kind"),
    "launches": _cell("launches"),
    "us": lambda row: f"{row['us']:.0f}",
}
KERNELS = ("dcnv3", "dcnv3 backward", "dwconv_norm_gelu", "linear with GELU", "bias_gelu")
KERNELS += ("layer_norm", "add_norm", "norm_add", "linear", "mlp")
GPU_KERNELS: Columns = {
    "shape": lambda row: (
        f"{row['shape']}: {row['batch']}x{row['side']}x{row['side']}x{row['channels']}"
    ),
    **{name: lambda row, name=name: _number(row[name]) if name in row else "" for name in KERNELS},
}
GPU_PEERS: Columns = {
    "model": _cell("model"),
    "batch": _cell("batch"),
    "official, setting": _cell("setting"),
    "ms": _cell("milliseconds"),
    "images/s": lambda row: f"{row['images_per_second']:.0f}",
}


def _by(cpu_kernels: str, key: str) -> Callable[[Row], bool]:
    """Results that have that key, timed on a CPU by the kernels that `info` calls so.

    Those that do not tell are of a Xeon with AMX.
    """
    of_xeon = "avx512 and amx"
    return lambda row: (
        key in row
        and row.get("benchmark") != "training"
        and row.get("cpu_kernels", of_xeon) == cpu_kernels
    )


# Of each table: its columns, and which results are its rows.
TABLES: dict[str, tuple[Columns, Callable[[Row], bool]]] = {
    "model": (MODEL, _by("avx512 and amx", "part_of_matmul_rate")),
    "model avx512bf16": (MODEL, _by("avx512bf16", "part_of_matmul_rate")),
    "model avx2": (MODEL, _by("avx2", "part_of_matmul_rate")),
    "training": (TRAINING, lambda row: row.get("benchmark") == "training"),
    "operator": (OPERATOR, _by("avx512 and amx", "direction")),
    "operator avx512bf16": (OPERATOR, _by("avx512bf16", "direction")),
    "startup": (STARTUP, lambda row: row.get("benchmark") == "startup"),
    "sizes": (SIZES, lambda row: row.get("series") == "model"),
    "programs": (PROGRAMS, lambda row: row.get("benchmark") == "programs"),
    "gpu models": (GPU_MODELS, lambda row: row.get("section") == "models"),
    "gpu training": (GPU_TRAINING, lambda row: row.get("section") == "training"),
    "gpu operator": (GPU_OPERATOR, lambda row: row.get("section") == "operator"),
    "gpu profile": (GPU_PROFILE, lambda row: row.get("section") == "profile"),
    "gpu kernels": (GPU_KERNELS, lambda row: row.get("benchmark") == "kernels"),
    "gpu peers": (GPU_PEERS, lambda row: row.get("section") == "official model"),
    "devices": (DEVICES, lambda row: row.get("series") == "devices"),
}


def table(columns: Columns, rows: Sequence[Row]) -> str:
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for row in rows:
        try:
            lines.append(" | ".join(cell(row) for cell in columns.values()))
        except KeyError:
            continue
    return "".join(f"| {line} |\n" for line in lines)


def by_shape(rows: Sequence[Row]) -> list[Row]:
    """Rows of a kernel each as rows of a shape each."""
    found: dict[tuple, Row] = {}
    for row in rows:
        shape = {key: row[key] for key in ("shape", "batch", "side", "channels")}
        found.setdefault(tuple(shape.values()), shape)[row["kernel"]] = row["us"]
    return list(found.values())


def by_spread(rows: Sequence[Row]) -> list[Row]:
    """Rows of offsets of a pixel, each with what the same takes with offsets far apart."""
    near, far = (
        [row for row in rows if row.get("spread") == spread and "fused" in row]
        for spread in (1.0, 20.0)
    )
    key = lambda row: tuple(row[k] for k in ("name", "batch", "side", "channels", "dtype"))  # noqa: E731
    found = {key(row): row["fused"] for row in far}
    return [row | {"far": found.get(key(row), {})} for row in near]


JOINED = {"gpu kernels": by_shape, "gpu operator": by_spread}


def plot(rows: Sequence[Row]) -> None:
    """Draws time an image against batch size and against pixels."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "internimage"  # the same file from the same figures
    for series, x, label in (
        ("batch", lambda row: row["batch_size"], "batch size"),
        ("side", lambda row: row["image_size"] ** 2 / 1e3, "pixels, thousands"),
    ):
        points = [(x(row), row["ms_per_image"]) for row in rows if row.get("series") == series]
        if not points:
            continue
        figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
        axes.loglog(*zip(*points, strict=True), "o-", color="#2a6f97", markersize=4)
        axes.set_xlabel(label)
        axes.set_ylabel("ms an image")
        axes.grid(which="both", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        PLOTS.mkdir(exist_ok=True)
        figure.savefig(PLOTS / f"{series}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables that there are results for."""
    for name, (columns, wanted) in TABLES.items():
        chosen = [row for row in rows if wanted(row)]
        if not chosen:
            continue
        joined = JOINED.get(name)
        made = table(columns, joined(chosen) if joined else chosen)
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], page, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE.name}: {count} places for table {name}, expected 1")
    return page


def read(paths: Sequence[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files of JSON lines")
    options = parser.parse_args()
    rows = read(options.results)
    PAGE.write_text(with_tables(PAGE.read_text(), rows))
    plot(rows)


if __name__ == "__main__":
    main()
