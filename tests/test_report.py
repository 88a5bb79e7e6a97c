"""Reports, predictions files and comparisons: figures against values worked out by hand."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convert.export import FORMAT
from internimage_jax.__main__ import main
from internimage_jax.commands.evaluate import print_table
from internimage_jax.comparison import compare, mcnemar
from internimage_jax.evaluation_settings import conversion_notes, differences
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.predictions import ImageResult, from_lines, read_predictions, to_lines
from internimage_jax.report import calibration, make_report, per_class, wilson_interval
from internimage_jax.report_html import MISTAKES, make_page

SETTINGS: dict[str, Any] = {
    "model": "a <b> & c",
    "num_classes": 1000,
    "classes": "ImageNet",
    "weights": [{"file": "w.safetensors", "sha256": "0" * 64}],
    "image_size": 32,
    "preprocessing": {"image_size": 32, "resize_size": None, "mean": [0.5] * 3, "std": [1.0] * 3},
    "dtype": "float32",
    "matmul_precision": None,
    "implementation": "kernel",
    "backend": "cpu",
    "devices": ["cpu"],
    "dataset": {"kind": "class folders", "images": 3, "names_and_labels_sha256": "1" * 64},
    "batch_size": 2,
    "parallel": "pmap",
    "on_error": "skip",
    "processes": 1,
    "versions": {"jax": "0.10.2", "internimage-jax": None},
}


def result(
    index: int, top5: tuple[int, ...], labels: tuple[int, ...] = (0,), first: float = 0.5
) -> ImageResult:
    probabilities = (first, *[(1 - first) / 10] * (len(top5) - 1))
    return ImageResult(index, f"{index}.jpg", labels, top5, probabilities)


RIGHT, FIFTH, WRONG = (0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (1, 2, 3, 4, 5)


def test_the_first_place_and_the_first_five_places_are_counted() -> None:
    results = [result(0, RIGHT), result(1, FIFTH), result(2, WRONG), result(3, WRONG, (7, 2))]
    results.append(ImageResult(4, "4.jpg", (0,), error="4.jpg: the file is empty"))
    report = make_report(results, SETTINGS, source="val", notes=["a note"])
    assert (report["correct_top1"], report["correct_top5"], report["num_images"]) == (1, 3, 4)
    assert (report["top1"], report["top5"]) == (25, 75)
    assert report["num_skipped"] == 1
    assert report["skipped"] == [{"file": "4.jpg", "error": "4.jpg: the file is empty"}]
    assert report["notes"] == ["a note"]
    assert SETTINGS.items() <= report.items()
    assert json.loads(json.dumps(report)) == report


def test_a_report_without_any_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="val: no image could be evaluated, 1 were skipped"):
        make_report([ImageResult(0, "0.jpg", (0,), error="bad")], SETTINGS, source="val")


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [  # from Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (25.53, 36.62)),
        (15, 148, (6.24, 16.05)),
        (0, 20, (0.0, 16.11)),
        (1, 29, (0.61, 17.18)),
    ],
)
def test_intervals_are_those_of_the_literature(
    right: int, count: int, interval: tuple[float, float]
) -> None:
    assert wilson_interval(right, count) == pytest.approx(interval, abs=0.006)
    mirrored = wilson_interval(count - right, count)
    assert mirrored == pytest.approx([100 - interval[1], 100 - interval[0]], abs=0.006)


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    results = [
        result(0, RIGHT, first=0.95),  # bin 14: confidence 0.95 and 0.97, accuracy 1/2
        result(1, WRONG, first=0.97),
        result(2, RIGHT, first=0.5),  # bin 7: confidence 0.5, accuracy 1
        result(3, WRONG, first=0.2),  # the upper bound of bin 2: confidence 0.2, accuracy 0
    ]
    found = calibration(results)
    wanted = (2 * abs(0.96 - 0.5) + abs(0.5 - 1) + abs(0.2 - 0)) / 4
    assert found["expected_calibration_error"] == pytest.approx(100 * wanted)
    assert len(found["bins"]) == 15
    filled = {i: one["images"] for i, one in enumerate(found["bins"]) if one["images"]}
    assert filled == {2: 1, 7: 1, 14: 2}
    assert found["bins"][14]["confidence"] == pytest.approx(96)
    assert found["bins"][14]["accuracy"] == 50
    assert found["bins"][0]["accuracy"] is None
    assert "15 bins" in found["method"]


def test_probabilities_at_the_ends_have_a_bin() -> None:
    found = calibration([result(0, RIGHT, first=1.0), result(1, RIGHT, first=0.0)])
    assert [one["images"] for one in found["bins"]] == [1, *[0] * 13, 1]


def test_an_image_counts_for_each_of_its_labels() -> None:
    results = [result(0, RIGHT, (0, 9)), result(1, WRONG, (9,)), result(2, RIGHT)]
    rows = per_class(results, imagenet1k_classes())
    assert [(one["index"], one["images"], one["correct_top1"]) for one in rows] == [
        (0, 2, 2),
        (9, 2, 1),
    ]
    assert rows[1]["top1"] == 50
    assert rows[0]["name"] == imagenet1k_classes()[0].name


# Predictions


def test_predictions_come_back_as_they_were_written() -> None:
    results = [
        ImageResult(3, 'a "b"\n\u00e9\udcff.jpg', (1, 2), RIGHT, (0.1, 1e-9, 1e-30, 0.0, 0.0)),
        ImageResult(4, "c", (5,), error="c: \u00fc"),
    ]
    lines = to_lines(results)
    assert lines.count(b"\n") == 2
    assert from_lines(lines, "p") == results


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_only_a_torn_last_line_is_left_out(cut: int) -> None:
    lines = to_lines([result(0, RIGHT), result(1, WRONG)])
    assert from_lines(lines[:-cut], "p", torn=True) == [result(0, RIGHT)]
    with pytest.raises(ValueError, match="p, line 2: ends in the middle"):
        from_lines(lines[:-cut], "p")
    with pytest.raises(ValueError, match="p, line 1: got"):
        from_lines(lines[cut:], "p")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"index": 0, "file": "a", "labels": [0]}',
        b'{"index": 0, "file": "a", "labels": [], "top5": [1], "probabilities": [1]}',
        b'{"index": 0, "file": "a", "labels": [0], "top5": [1], "probabilities": []}',
        b'{"index": 0, "file": "a", "labels": [0], "top5": "x", "probabilities": [1]}',
        b'{"index": 0, "file": "a", "labels": [0], "top5": [-1], "probabilities": [1]}',
        b'{"index": 0, "file": "a", "labels": [0], "top5": [1], "probabilities": [NaN]}',
        b'{"index": 0, "file": "a", "labels": [0], "error": 3}',
        b'{"index": 1e999, "file": "a", "labels": [0], "top5": [1], "probabilities": [1]}',
    ],
)
def test_a_line_that_is_no_prediction_is_named(line: bytes) -> None:
    good = to_lines([result(0, RIGHT)])
    with pytest.raises(ValueError, match=r"p, line 2: got .* expected an object with index"):
        from_lines(good + line + b"\n", "p")


def test_differences_are_named_by_their_path() -> None:
    before = {"dtype": "float32", "dataset": {"images": 3, "kind": "tar"}, "only": 1}
    now = {"dtype": "bfloat16", "dataset": {"images": 4, "kind": "tar"}}
    assert differences(before, now) == [
        'dtype was "float32" and is "bfloat16"',
        "dataset.images was 3 and is 4",
        "only was 1 and is null",
    ]
    assert differences(before, json.loads(json.dumps(before))) == []


def test_what_the_converter_noted_is_told(tmp_path: Path) -> None:
    assert conversion_notes(str(tmp_path)) == ()
    settings: dict[str, Any] = {"format": "another", "notes": ["class 850 is masked"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert conversion_notes(str(tmp_path)) == ()
    (tmp_path / "config.json").write_text(json.dumps(settings | {"format": FORMAT}))
    assert conversion_notes(str(tmp_path)) == ("The weights' conversion: class 850 is masked.",)
    assert conversion_notes(str(tmp_path / "config.json")) == ()  # a file, such as a .pth


# The page


class Checker(HTMLParser):
    """Checks that elements are closed in order, and collects what a test asks for."""

    VOID = ("meta", "img", "br", "rect", "path", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"] or "")
        elif "src" in values or "href" in values:
            self.links.append(tag)
        if tag not in self.VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID or tag == "rect":
            assert self.open.pop() == tag, self.getpos()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def encoded(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), color).save(file, "PNG")
    return file.getvalue()


def page(results: list[ImageResult], **settings: Any) -> tuple[str, Checker]:
    report = make_report(results, {**SETTINGS, **settings}, source="<i>val</i>", notes=["<u>n</u>"])
    text = make_page(report, results, lambda i: encoded((i, 0, 0)) if i != 1 else b"broken")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert checker.links == []
    return text, checker


def test_the_page_shows_the_most_confident_mistakes_with_their_pictures() -> None:
    results = [result(i, WRONG, first=0.2 + 0.01 * i) for i in range(40)]
    results.append(result(40, RIGHT, first=0.99))
    text, checker = page(results)
    assert len(checker.images) == MISTAKES
    shown = []
    for source in checker.images:
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64"
        shown.append(Image.open(io.BytesIO(base64.b64decode(data))).getpixel((5, 5)))
    assert [round(one[0]) for one in shown] == pytest.approx(range(39, 39 - MISTAKES, -1), abs=2)
    assert "2.44 <small>%</small>" in text  # 1 of 41
    assert "39.jpg" in text and "40.jpg" not in text


def test_whatever_comes_from_files_is_escaped() -> None:
    hostile = "<script>alert(1)</script>\"'&.jpg"
    results = [
        ImageResult(0, hostile, (0,), WRONG, (0.9, 0.1, 0.0, 0.0, 0.0)),
        ImageResult(1, hostile, (0,), WRONG, (0.9, 0.1, 0.0, 0.0, 0.0)),
        ImageResult(2, hostile, (0,), error=hostile),
    ]
    text, _ = page(results)
    assert text.count("<script>") == 1
    assert "<b>" not in text.split("<h1>")[1].split("</h1>")[0]
    for raw in ("<i>val", "<u>n", "alert(1)</script>"):
        assert raw not in text
    assert text.count("&lt;script&gt;") >= 3


def test_the_page_of_a_faultless_model_is_whole() -> None:
    text, checker = page([result(0, RIGHT, first=1.0)])
    assert checker.images == []
    assert "Most confident mistakes" not in text
    assert "Hardest classes" not in text
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", "".join(checker.text))
    assert "http" not in text


# compare


def test_images_are_matched_by_name_and_counted_by_who_was_right() -> None:
    a = [result(0, RIGHT), result(1, RIGHT), result(2, WRONG), result(3, WRONG), result(9, RIGHT)]
    b = [result(3, FIFTH), result(2, RIGHT), result(1, WRONG), result(0, RIGHT)]
    b.append(ImageResult(9, "9.jpg", (0,), error="damaged"))
    found = compare(a, b)
    keys = ("both_right", "only_a_right", "only_b_right", "both_wrong", "same_class", "num_images")
    assert [found[key] for key in keys] == [1, 1, 1, 1, 2, 4]
    assert (found["only_in_a"], found["only_in_b"]) == (1, 0)
    assert (found["top1_a"], found["top1_b"], found["p_value"]) == (50, 50, 1)
    assert [one["file"] for one in found["differences"]] == ["1.jpg", "2.jpg"]
    assert found["differences"][0]["a"] == {"class": 0, "probability": 0.5}


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 15, 43400 / 2**20),  # 2 sum_{k<=5} C(20, k) / 2^20
        (0, 10, 2 / 1024),
        # The normal distribution's, with the correction for continuity, is close for large counts.
        (1000, 1100, pytest.approx(math.erfc((100 - 1) / math.sqrt(2 * 2100)), rel=3e-3)),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, p: Any) -> None:
    count, smaller = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, k) for k in range(smaller + 1))
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == min(1, 2 * tail / 2**count)
    assert mcnemar(only_a, only_b) == p


def test_different_labels_or_images_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="no image in common"):
        compare([result(0, RIGHT)], [result(1, RIGHT)])
    with pytest.raises(ValueError, match=r"0\.jpg: its labels are \[0\] in the one and \[3\]"):
        compare([result(0, RIGHT)], [result(0, RIGHT, (3,))])


def test_the_command_takes_folders_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, first in (("a", RIGHT), ("b", WRONG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_bytes(to_lines([result(0, first)]))
    a, b = str(tmp_path / "a"), str(tmp_path / "b" / "predictions.jsonl")
    assert main(["compare", a, b]) == 0
    assert "class 0" in capsys.readouterr().out  # whose class is not known
    settings = tmp_path / "b" / "settings.json"
    settings.write_text(json.dumps(SETTINGS))
    assert main(["compare", a, b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["only_a_right"], found["num_images"], found["a"]) == (1, 1, a)
    assert main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "A alone right" in out and "tench" in out and "goldfish" in out
    assert "the evaluation is not finished" in out  # there is no report.json
    (tmp_path / "a" / "report.json").touch()
    assert main(["compare", a, b]) == 0
    assert "not finished" not in capsys.readouterr().out
    (tmp_path / "a" / "settings.json").write_text('{"classes": ["this", "that"]}')
    assert main(["compare", a, b]) == 1
    assert capsys.readouterr().err == f"error: {a} and {b}: are of different classes\n"
    settings.write_text('{"classes": ["this", "that"]}')
    assert main(["compare", a, b]) == 0
    assert re.search(r"this +this 50.0% +that 50.0%", capsys.readouterr().out)
    settings.write_text("[]")
    assert main(["compare", a, b]) == 1
    assert "settings.json: is damaged" in capsys.readouterr().err
    assert main(["compare", a, str(tmp_path)]) == 1
    assert re.fullmatch(r"error: .*predictions\.jsonl: no such file; .*\n", capsys.readouterr().err)
    assert read_predictions(a) == [result(0, RIGHT)]


def test_the_comparisons_table_has_each_figure_on_its_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of four images in both, A is right about three, B about one of these; A has two more, B one.
    ours = [result(i, RIGHT if i < 3 else WRONG, first=0.625) for i in range(6)]
    theirs = [result(i, RIGHT if i == 0 else WRONG, first=0.25) for i in (0, 1, 2, 3, 9)]
    for name, results in (("a", ours), ("b", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_bytes(to_lines(results))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def said(*options: str) -> str:
        assert main(["compare", a, b, *options]) == 0
        return re.sub(" +", " ", capsys.readouterr().out)

    out = said()
    for row in (
        f"A {a}",
        f"B {b}",
        "images 4 in both; 2 more in A, 1 more in B",
        "top-1 A 75.000 %, B 25.000 %",
        "same class 2 (50.00 %)",
        "both right 1",
        "A alone right 2",
        "B alone right 0",
        "both wrong 1",
        "McNemar's test p = 0.5 (exact, two-sided)",
        "1.jpg class 0 class 0 62.5% class 1 25.0%",
        f"{a}: the evaluation is not finished; --resume goes on with it",
    ):
        assert f" {row} " in f" {out} ".replace("\n", " "), row
    assert "2.jpg" in out and "more; --show" not in out
    out = said("--show", "1")
    assert "1.jpg" in out and "2.jpg" not in out and "and 1 more; --show 2 lists them all" in out
    assert ".jpg" not in said("--show", "0")
    (tmp_path / "a" / "report.json").touch()
    assert json.loads(said("--json"))["unfinished"] == [b]
    assert main(["compare", a, b, "--show", "-1"]) == 1
    assert capsys.readouterr().err == "error: --show: expected at least 0, got -1\n"


# The table of the command `evaluate`


def test_the_table_names_figures_notes_and_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    results = [result(0, RIGHT), result(1, FIFTH), ImageResult(2, "2", (0,), error="bad")]
    report = make_report(
        results, SETTINGS, source="[val]", notes=["a note"], images_per_second=1234.5
    )
    print_table(report, "out")
    out = capsys.readouterr().out
    for text in ("50.000 %", "9.45 to 90.55", "100.000 %", "2, 1 skipped", "1,234.5 images/s"):
        assert text in out
    for text in (
        "a <b> & c, float32, kernel",
        "[val] (class folders)",
        "a note",
        "out/report.html",
    ):
        assert text in out

    print_table({**report, "num_skipped": 0, "images_per_second": None}, None)
    out = capsys.readouterr().out
    assert "skipped" not in out and "speed" not in out and "report.html" not in out
