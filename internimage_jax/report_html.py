"""The report as a page that needs nothing else: figures, charts and the most confident mistakes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from PIL import Image

from internimage_jax.config import RELEASED
from internimage_jax.predictions import ImageResult
from internimage_jax.preprocess import Preprocessing, preprocess
from internimage_jax.report import classes_of

MISTAKES = 25  # shown with their pictures
PICTURE = 200  # pixels of a side
LISTED = 12  # classes and confusions in the short tables


def make_page(
    report: Mapping[str, Any],
    results: Sequence[ImageResult],
    read: Callable[[int], bytes],
) -> str:
    """Makes the page.

    Args:
        report: What `make_report` returns.
        results: The predictions that it was made of.
        read: Returns the encoded image of an index.

    Returns:
        HTML, with style, script and pictures in it.
    """
    wrong = [one for one in results if one.error is None and not one.right]
    names = [one.name for one in classes_of(report)]
    title = f"{report['model']} on {report['dataset']['kind']}"
    parts = [
        f"<h1>{escape(report['model'])}</h1>",
        f'<p class="lead">{_lead(report)}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in report["notes"]),
        _figures(report),
        _by_class(report, wrong, names),
        '<div class="columns">',
        _calibration(report["calibration"]),
        _confusions(wrong, names),
        "</div>",
        _mistakes(wrong, names, read),
        _skipped(report["skipped"]),
        _setup(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_file('report.css')}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(part for part in parts if part) + "\n</main>\n"
        f"<script>\n{_file('report.js')}</script>\n</body>\n</html>\n"
    )


def _lead(report: Mapping[str, Any]) -> str:
    text = (
        f"{report['num_images']:,} images of {report['source']} ({report['dataset']['kind']}), "
        f"{report['image_size']} pixels, {report['dtype']}"
    )
    released = RELEASED.get(report["model"])
    of_imagenet = report["classes"] == "ImageNet"
    if of_imagenet and released is not None and released.accuracy is not None:
        text += f". The model card gives {released.accuracy:.1f} % top-1 on ImageNet-1K validation"
    return escape(text + ".")


def _figures(report: Mapping[str, Any]) -> str:
    boxes = []
    for key, name in (("top1", "Top-1 accuracy"), ("top5", "Top-5 accuracy")):
        low, high = report[f"{key}_interval"]
        width = max(high - low, 0.6)
        scale = (
            '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            '<rect class="track" x="0" y="3" width="100" height="4" rx="1"/>'
            f'<rect class="range" x="{low:.2f}" y="0" width="{width:.2f}" height="10" rx="1"/>'
            "</svg>"
        )
        more = (
            f"95 % interval {low:.2f} to {high:.2f}<br>"
            f"{report[f'correct_{key}']:,} of {report['num_images']:,}"
        )
        boxes.append((name, f"{report[key]:.2f} <small>%</small>", scale, more))
    skipped = f"{report['num_skipped']:,} skipped" if report["num_skipped"] else "none skipped"
    boxes.append(("Images", f"{report['num_images']:,}", "", skipped))
    error = report["calibration"]["expected_calibration_error"]
    boxes.append(("Calibration error", f"{error:.2f} <small>%</small>", "", "ECE, 15 bins"))
    speed = report["images_per_second"]
    shown = "&ndash;" if speed is None else f"{speed:,.{1 if speed < 1000 else 0}f}"
    devices = f"images/s on {_devices(report['devices'], report['processes'])}"
    boxes.append(("Speed", shown, "", escape(devices)))
    return (
        '<section class="figures">'
        + "".join(
            f'<div class="figure"><div class="name">{name}</div><div class="value">{value}</div>'
            f'{extra}<div class="more">{more}</div></div>'
            for name, value, extra, more in boxes
        )
        + "</section>"
    )


def _by_class(report: Mapping[str, Any], wrong: Sequence[ImageResult], names: Sequence[str]) -> str:
    classes = report["per_class"]
    rising = sorted(classes, key=lambda one: (one["top1"], one["top5"], one["index"]))
    taken_for: dict[int, Counter[int]] = {}
    for one in wrong:
        for label in one.labels:
            taken_for.setdefault(label, Counter())[one.top5[0]] += 1
    perfect = sum(one["top1"] == 100 for one in classes)
    below = sum(one["top1"] < 50 for one in classes)
    rows = []
    for one in rising[:LISTED]:
        if one["top1"] == 100:
            break
        usual = taken_for.get(one["index"], Counter()).most_common(1)
        confused = f"{escape(names[usual[0][0]])} ({usual[0][1]})" if usual else ""
        rows.append(
            f"<tr><td>{escape(one['name'])}</td><td>{_meter(one['top1'])}</td>"
            f'<td class="number">{one["correct_top1"]} of {one["images"]}</td>'
            f"<td>{confused}</td></tr>"
        )
    hardest = (
        "<h3>Hardest classes</h3><table><thead><tr><th>class</th><th>top-1</th>"
        '<th class="number">right</th><th>most often taken for</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        if rows
        else ""
    )
    return _card(
        "Accuracy by class",
        f"Top-1 of each of {len(classes):,} classes, lowest first: "
        f"{perfect:,} without a mistake, {below:,} below 50 %. The dotted line is all images.",
        f'{_class_chart(rising, report["top1"])}<div style="height:20px"></div>{hardest}'
        f"{_all_classes(classes)}",
    )


def _class_chart(rising: Sequence[Mapping[str, Any]], mean: float) -> str:
    left, width, height = 34, 1000, 170
    step = width / len(rising)
    outline, bars = [f"M{left} {height}"], []
    for i, one in enumerate(rising):
        x, y = left + i * step, height * (1 - one["top1"] / 100)
        gap = 1 if step > 4 else 0  # bars where there is room for them, or else one shape
        outline.append(f"V{y:.1f}H{x + step - gap:.2f}" + (f"V{height}h{gap}" if gap else ""))
        bars.append(
            f'<rect class="over" x="{x:.2f}" y="0" width="{step:.2f}" height="{height}">'
            f"<title>{escape(one['name'])}: {one['top1']:.1f} % "
            f"({one['correct_top1']} of {one['images']})</title></rect>"
        )
    y = height * (1 - mean / 100)
    return (
        f'<svg viewBox="0 0 {left + width} {height + 6}" role="img" '
        'aria-label="top-1 accuracy of each class, sorted">'
        f"{_percent_axis(left, width, height, (0, 50, 100))}"
        f'<path class="bar" d="{"".join(outline)}V{height}Z"/>'
        f'<line class="mean" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f"{''.join(bars)}</svg>"
    )


def _all_classes(classes: Sequence[Mapping[str, Any]]) -> str:
    have_wnids = any(one["wnid"] for one in classes)
    rows = "".join(
        f'<tr><td class="number">{one["index"]}</td><td>{escape(one["name"])}</td>'
        + f"<td><code>{escape(one['wnid'] or '')}</code></td>" * have_wnids
        + f'<td class="number">{one["images"]}</td>'
        f'<td class="number">{one["top1"]:.1f}</td><td class="number">{one["top5"]:.1f}</td></tr>'
        for one in classes
    )
    return (
        "<details><summary>All classes</summary>"
        '<div class="scroll"><table><thead><tr><th class="number">index</th><th>class</th>'
        + "<th>WordNet id</th>"
        * have_wnids
        + '<th class="number">images</th><th class="number">top-1 %</th>'
        f'<th class="number">top-5 %</th></tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _calibration(calibration: Mapping[str, Any]) -> str:
    left, top, width, height, below = 34, 8, 440, 330, 60
    bins = calibration["bins"]
    most = max(one["images"] for one in bins)
    bottom = top + height
    floor = bottom + 34 + below  # of the lower chart
    shapes = []
    for one in bins:
        if not one["images"]:
            continue
        x, wide = left + width * one["low"], width * (one["high"] - one["low"]) - 1.5
        accuracy, confidence = (
            top + height * (1 - one[key] / 100) for key in ("accuracy", "confidence")
        )
        rows = (
            ("bar", accuracy, bottom),
            ("over-sure" if confidence < accuracy else "under-sure", accuracy, confidence),
            ("quiet", floor - max(below * one["images"] / most, 1), floor),
        )
        text = (
            f"<title>probability {one['low']:.2f} to {one['high']:.2f}: {one['images']:,} images, "
            f"accuracy {one['accuracy']:.1f} %, mean probability {one['confidence']:.1f} %</title>"
        )
        shapes += [
            f'<rect class="{kind}" x="{x:.1f}" y="{min(start, end):.1f}" width="{wide:.1f}" '
            f'height="{abs(end - start):.1f}">{text}</rect>'
            for kind, start, end in rows
        ]
    ticks = "".join(
        f'<text x="{left + width * at:.1f}" y="{bottom + 18}" text-anchor="middle">{at:g}</text>'
        for at in (0, 0.25, 0.5, 0.75, 1)
    )
    return _card(
        "Calibration",
        "Accuracy (%) of the images whose first class has a given probability, "
        "beside the mean of that probability, which is the dashed line: red is too sure, pale is "
        "not sure enough. Below, how many images there are. Expected calibration error "
        f"{calibration['expected_calibration_error']:.2f} %.",
        f'<svg viewBox="0 0 {left + width + 8} {floor}" role="img" '
        'aria-label="reliability diagram">'
        f"{_percent_axis(left, width, height, (0, 25, 50, 75, 100), top)}{''.join(shapes)}{ticks}"
        f'<line class="axis" x1="{left}" x2="{left + width}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{left - 6}" y="{floor - below + 8}" text-anchor="end">{most:,}</text>'
        f'<path class="ideal" d="M{left} {bottom}L{left + width} {top}"/></svg>',
    )


def _confusions(wrong: Sequence[ImageResult], names: Sequence[str]) -> str:
    if not wrong:
        return ""
    pairs = Counter((one.labels[0], one.top5[0]) for one in wrong)
    rows = "".join(
        f'<tr><td>{escape(names[label])}</td><td class="said">{escape(names[said])}</td>'
        f'<td class="number">{count:,}</td></tr>'
        for (label, said), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[
            : LISTED + 4
        ]
    )
    return _card(
        "Most common confusions",
        f"{len(wrong):,} images were wrong, in {len(pairs):,} pairs of classes.",
        '<table><thead><tr><th>class</th><th>taken for</th><th class="number">images</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>",
    )


def _mistakes(
    wrong: Sequence[ImageResult], names: Sequence[str], read: Callable[[int], bytes]
) -> str:
    if not wrong:
        return ""
    worst = sorted(wrong, key=lambda one: (-one.probabilities[0], one.index))[:MISTAKES]
    figures = "".join(
        f"<figure>{_picture(one, read)}<figcaption>"
        f'<b class="said">{escape(names[one.top5[0]])}</b> {100 * one.probabilities[0]:.1f} %<br>'
        f'is <b class="is">{escape(", ".join(names[i] for i in one.labels))}</b>{_chance(one)}'
        f'<span class="file">{escape(one.file)}</span></figcaption></figure>'
        for one in worst
    )
    return _card(
        "Most confident mistakes",
        "What the model took these images for, and how sure it was of it; then their label, with "
        "its own probability where it is among the first five.",
        f'<div class="mistakes">{figures}</div>',
    )


def _chance(one: ImageResult) -> str:
    for index, probability in zip(one.top5, one.probabilities, strict=True):
        if index in one.labels:
            return f" {100 * probability:.1f} %"
    return ""


def _picture(one: ImageResult, read: Callable[[int], bytes]) -> str:
    try:
        pixels = preprocess(read(one.index), Preprocessing(PICTURE), one.file)
    except (ValueError, OSError):  # it was there a moment ago
        return '<div class="none"></div>'
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(one.file)}" loading="lazy">'


def _skipped(skipped: Sequence[Mapping[str, str]]) -> str:
    if not skipped:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(one['file'])}</code></td><td>{escape(one['error'])}</td></tr>"
        for one in skipped
    )
    return _card(
        "Skipped images",
        f"{len(skipped):,} could not be decoded; no figure counts them.",
        '<div class="scroll"><table><thead><tr><th>file</th><th>why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    )


def _setup(report: Mapping[str, Any]) -> str:
    prep = report["preprocessing"]
    short = prep["resize_size"] or prep["image_size"]
    of_all = f"{report['batch_size']} images on each of {len(report['devices'])} devices"
    rows = {
        "Model": f"{report['model']}, {report['num_classes']:,} classes",
        "Weights": "\n".join(
            f"{one['file']}  SHA-256 {one['sha256']}" for one in report["weights"]
        ),
        "Preprocessing": f"short side to {short} pixels (bicubic), middle {prep['image_size']} x "
        f"{prep['image_size']}, mean {prep['mean']}, deviation {prep['std']}",
        "Arithmetic": f"{report['dtype']}, matrix products at "
        f"{report['matmul_precision'] or 'default'} precision, DCNv3: {report['implementation']}",
        "Devices": f"{_devices(report['devices'], report['processes'])}, {report['parallel']}",
        "Batch": of_all if len(report["devices"]) > 1 else f"{report['batch_size']} images",
        "Data": f"{report['source']}: {report['dataset']['kind']}, {report['dataset']['images']:,} "
        f"images; names and labels SHA-256 {report['dataset']['names_and_labels_sha256']}",
        "Damaged images": {"fail": "end the evaluation", "skip": "are skipped"}[report["on_error"]],
        "Versions": ", ".join(
            f"{name} {version}" for name, version in report["versions"].items() if version
        ),
        "Finished": report["finished"],
    }
    cells = "".join(
        f"<tr><th>{name}</th><td>{escape(text).replace(chr(10), '<br>')}</td></tr>"
        for name, text in rows.items()
    )
    table = f'<table class="setup"><tbody>{cells}</tbody></table>'
    return _card("How it was measured", "", table) + (
        "<footer>Intervals are Wilson's score intervals. All figures are computed from "
        "predictions.jsonl, and are in report.json.</footer>"
    )


def _card(title: str, lead: str, body: str) -> str:
    lead = f'<p class="soft">{lead}</p>' if lead else ""
    return f'<section class="card"><h2>{title}</h2>{lead}{body}</section>'


def _percent_axis(left: int, width: int, height: int, ticks: Sequence[int], top: int = 0) -> str:
    lines = []
    for tick in ticks:
        y = top + height * (1 - tick / 100)
        lines.append(
            f'<line class="axis" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
        )
    return "".join(lines)


def _meter(percent: float) -> str:
    return f'<span class="meter"><i style="width:{percent:.1f}%"></i></span>{percent:.1f} %'


def _devices(devices: Sequence[str], processes: int) -> str:
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(devices).items())
    return kinds if processes == 1 else f"{processes} processes with {kinds} each"


def _file(name: str) -> str:
    return (resources.files("internimage_jax") / "data_files" / name).read_text("utf-8")
