"""The report page: complete, self-contained, escaped, and tolerant of what a killed or running job leaves behind."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from gentrain import report
from gentrain.report import write_report


class Page(HTMLParser):
    """Attributes that make a browser load something, and the text a reader sees."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.paths: list[str] = []
        self.charts: list[dict[str, str]] = []
        self.captions: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.links += [values[name] for name in ("src", "href", "action", "srcset", "poster", "data") if name in values]
        self.images += [values["src"]] if tag == "img" else []
        self.captions += [values["data-caption"]] if "data-caption" in values else []
        self.paths += [values["d"]] if tag == "path" else []
        self.charts += [values] if values.get("class") == "chart" else []
        if tag not in ("meta", "img", "br", "hr", "input", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(" ".join(data.split()))

    def __contains__(self, text: str) -> bool:
        return text in " ".join(filter(None, self.text))


def write_metrics(directory: Path, rows: list[dict[str, float]], tail: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def rows(count: int) -> list[dict[str, float]]:
    return [
        {"samples": 64 * i, "seconds": 0.5 * i, "loss/model": 1 / i, "lr/model": 1e-3, "samples_per_second": 128.0}
        for i in range(1, count + 1)
    ]


def picture(path: Path, shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    directory = tmp_path / "digits"
    write_metrics(directory / "generator", rows(100))
    (directory / "generator" / "config.yaml").write_text("method: {name: flow_matching}\ndata: mnist5k\n")
    for samples in (640, 3200, 6400):
        picture(directory / "generator" / "samples" / f"{samples:012d}.png", samples % 200)
    picture(directory / "draw" / "grid.png")
    (directory / "draw" / "info.json").write_text('{"steps": 20, "guidance": 2.0}')
    metric = {
        "name": "class_accuracy",
        "value": 0.98312,
        "low": 0.97,
        "high": 0.99,
        "better": "higher",
        "definition": "share read as asked",
    }
    (directory / "evaluate").mkdir()
    (directory / "evaluate" / "metrics.json").write_text(json.dumps({"metrics": [metric], "settings": {"count": 1000}}))
    (directory / "recipe.yaml").write_text("stages: {}\n")
    (directory / "generator" / "environment.json").write_text(json.dumps({"torch": "1.2.3", "processor": "another one"}))
    stages = {"generator": ("train", 216.0), "draw": ("generate", 25.0), "evaluate": ("evaluate", 9.0)}
    state = {name: {"kind": kind, "status": "finished", "seconds": seconds, "reason": ""} for name, (kind, seconds) in stages.items()}
    (directory / "stages.json").write_text(json.dumps(state))
    return directory


def read(directory: Path) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_recipe_page_has_every_section(recipe: Path) -> None:
    page = read(recipe)
    for text in (
        "digits",
        "flow matching",
        "mnist5k",
        "6,400 samples seen",
        "4 min 10 s",
        "class accuracy",
        "0.983",
        "0.970 – 0.990",
        "share read as asked; higher is better",
        "Samples while training",
        "Learning rate",
        "86 %",
        "guidance",
        "recipe.yaml",
        "Environment generator torch 1.2.3 processor another one",
    ):
        assert text in page, text
    assert len(page.images) == 1 + 1 + 3, "the drawn grid, the viewer, its strip"
    assert page.captions == ["640 samples seen", "3,200 samples seen", "6,400 samples seen"]
    assert len(page.charts) == 3
    assert not page.open, "every element is closed"


def test_page_makes_no_request(recipe: Path) -> None:
    html = write_report(recipe).read_text(encoding="utf-8")
    assert all(link.startswith("data:image/png;base64,") for link in Page(html).links)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", html)
    assert "default-src 'none'" in html


def test_curves_show_the_values(tmp_path: Path) -> None:
    write_metrics(
        tmp_path, [{"samples": 10, "loss/model": 2.0}, {"samples": 20, "loss/model": math.nan}, {"samples": 30, "loss/model": 1.0}]
    )
    page = read(tmp_path)
    (chart,) = page.charts
    assert json.loads(chart["data-at"]) == ["10", "20", "30"]
    assert json.loads(chart["data-positions"]) == [0, 0.5, 1]
    (path,) = page.paths
    (x0, y0), (x1, y1) = ((float(number) for number in point.split()) for point in path.removeprefix("M").split("M"))
    assert (x0, x1) == (0, 1000), "the pen is lifted at the value that is not finite"
    assert 0 < y0 < y1 < 1000, "2 is drawn above 1"


def test_a_wide_positive_loss_gets_a_logarithmic_axis() -> None:
    at = [0.0, 1.0, 2.0]
    wide = report._chart("Loss", at, {"model": [100.0, 1.0, 0.01]}, True)
    assert [text for _, text in wide.y_ticks] == ["0.01", "0.1", "1", "10", "100"]
    gaps = [b[0] - a[0] for a, b in zip(wide.y_ticks, wide.y_ticks[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * 4)
    with_zero = report._chart("Loss", at, {"model": [100.0, 1.0, 0.0]}, True)
    assert [text for _, text in with_zero.y_ticks] == ["0", "50", "100"]


@pytest.mark.parametrize("value, text", [(0, "0"), (0.25, "0.25"), (0.001, "1e-3"), (0.00025, "2.5e-4"), (2500, "2.5k"), (4e6, "4M")])
def test_ticks_are_short(value: float, text: str) -> None:
    assert report._tick(value) == text


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-9, 1e12])
def test_a_constant_curve_can_be_drawn(tmp_path: Path, value: float) -> None:
    write_metrics(tmp_path, [{"samples": i, "lr/model": value} for i in (1, 2)])
    page = read(tmp_path)
    assert all(0 <= float(number) <= 1000 for number in re.findall(r"-?[\d.]+", page.paths[0]))


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    write_metrics(tmp_path, rows(5000))
    for samples in range(100):
        picture(tmp_path / "samples" / f"{samples:012d}.png")
    page = read(tmp_path)
    assert len(json.loads(page.charts[0]["data-at"])) == report.MAX_POINTS
    assert json.loads(page.charts[0]["data-at"])[-1] == "320,000"
    assert "Bold lines are smoothed" in page
    assert page.captions[0] == "0 samples seen"
    assert page.captions[-1] == "99 samples seen"
    assert len(page.images) == 2 + report.MAX_GRIDS


def test_what_a_killed_run_leaves_is_tolerated(tmp_path: Path) -> None:
    log = [*rows(3), {"samples": 128, "seconds": 9.0, "loss/model": 7.0, "skipped/model": 4}]  # resumed at 64: 128 is logged twice
    write_metrics(tmp_path, log, tail='{"samples": 256, "lo')
    (tmp_path / "metrics.json").write_text("{")
    (tmp_path / "config.yaml").write_text("a: [")
    page = read(tmp_path)
    assert "Unreadable lines of metrics.jsonl left out: 1." in page
    assert "not finite: 4." in page
    assert json.loads(page.charts[0]["data-at"]) == ["64", "128", "192"]
    assert "Results" not in page


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither a run's nor a recipe's directory"):
        write_report(tmp_path)


def test_a_run_that_has_just_begun_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: diffusion\n")
    page = read(tmp_path)
    assert not page.charts
    assert not page.images
    assert "Environment" not in page, "that of whoever writes the page says nothing about the run"


def test_stages_are_shown_with_the_environment_each_ran_in(recipe: Path) -> None:
    for name, machine in (("draw", "another one"), ("evaluate", "a third one")):
        (recipe / name / "environment.json").write_text(json.dumps({"torch": "1.2.3", "processor": machine}))
    page = read(recipe)
    assert "Environment generator, draw torch 1.2.3 processor another one Environment evaluate torch 1.2.3 processor a third one" in page


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_an_unfinished_stage_is_said_first(recipe: Path, status: str) -> None:
    states = json.loads((recipe / "stages.json").read_text())
    states["draw"].update(status=status)
    (recipe / "stages.json").write_text(json.dumps(states))
    assert f"draw {status} before it was finished; run the recipe again" in read(recipe)
    states["draw"].update(error="no room <here>")
    (recipe / "stages.json").write_text(json.dumps(states))
    assert f"draw {status} before it was finished: no room <here>; run the recipe again" in read(recipe)


def test_text_is_escaped(tmp_path: Path) -> None:
    nasty = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>'\""
    directory = tmp_path / "a<b>"
    stage = directory / "stage"
    write_metrics(stage, [{"samples": i, f"loss/{nasty}": 1.0 * i} for i in (1, 2)])
    (stage / "config.yaml").write_text(f"# {nasty}\nmethod: {{name: '<b>bold</b>'}}\n")
    metric = {"name": nasty, "value": 1.0, "low": None, "high": None, "better": "lower", "definition": nasty}
    (stage / "metrics.json").write_text(json.dumps({"metrics": [metric], "settings": {nasty: nasty}}))
    (stage / "environment.json").write_text(json.dumps({nasty: nasty}))
    state = {"kind": nasty, "status": "failed", "seconds": 1, "reason": nasty, "error": nasty}
    (directory / "stages.json").write_text(json.dumps({"stage": state}))
    html = write_report(directory).read_text()
    assert "onerror" in html, "it was drawn"
    assert html.count("<script>") == 1
    assert "<b>bold" not in html
    assert "onerror=alert(1)>" not in html
    assert not Page(html).images


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.98, "0.980"),
        (0.98349, "0.983"),
        (1.0, "1"),
        (197.4, "197"),
        (12345, "12,345"),
        (44_800_000, "44.8M"),
        (2.5e9, "2.5B"),
        (0.001, "1.0e-3"),
        (0.00031, "3.1e-4"),
        (-2.5e-7, "-2.5e-7"),
        (math.inf, "not finite"),
        ("euler", "euler"),
        (True, "True"),
    ],
)
def test_short(value: object, text: str) -> None:
    assert report.short(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(1.44, "1.4 s"), (59.97, "60.0 s"), (200, "3 min 20 s"), (3599.9, "1 h 00 min"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
