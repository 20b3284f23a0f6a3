"""One self-contained HTML page for a run, a recipe or a sweep: results, samples, curves, time, configuration, environment.

The page makes no request: images are data URIs, curves are inline SVG, and its content policy forbids the rest. A piece that is missing
or cannot be read is left out, so a page can be written while a run is still going.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

SWEEP = "sweep.json"  # the record of a sweep: see cluster.sweeps
MAX_GRIDS = 24  # embedded per training stage; evenly picked, first and last included
MAX_POINTS = 400  # per curve
MAX_CURVES = 12  # of a sweep's trials, the best
MAX_TEXT = 2**18  # characters shown of a configuration
MAX_IMAGE = 2**24  # bytes: larger images are left out
CHARTS = {  # prefix in metrics.jsonl -> (title, drawn on a logarithmic axis where its range asks for one)
    "loss": ("Loss", True),
    "grad_norm": ("Gradient norm", True),
    "lr": ("Learning rate", False),
    "samples_per_second": ("Samples per second", False),
}


@dataclass
class Curve:
    """A line of a chart: its points as an SVG path in a 1000 x 1000 box, raw and smoothed, and the values under the pointer."""

    label: str
    raw: str
    smooth: str
    values: list[str]


@dataclass
class Chart:
    """Axis ticks are (position in percent from the left or the top, text); `at` is the samples seen at each of a curve's values."""

    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    at: list[str]
    positions: list[float]


def write_report(directory: Path) -> Path:
    """Writes `report.html` into a run's, a recipe's or a sweep's directory and returns its path.

    Raises:
        FileNotFoundError: there is no such directory, or it is of something else.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"no such run: {directory}")
    states = {name: state for name, state in (_json(directory / "stages.json") or {}).items() if _is_stage(name, state)}
    sweep = _sweep(directory)
    stages = [_stage(name, directory / name, state) for name, state in states.items()] or ([] if sweep else _run(directory))
    seconds = sum(stage["seconds"] for stage in stages)
    recipe = _text(directory / "recipe.yaml")
    page = _template().render(
        title=directory.resolve().name,
        stages=stages,
        sweep=sweep,
        seconds=seconds,
        hero=next((stage["grid"] or stage["grids"][-1] for stage in reversed(stages) if stage["grid"] or stage["grids"]), None),
        headline=next((stage["metrics"][:4] for stage in reversed(stages) if stage["metrics"]), []),
        configs=([("recipe.yaml", recipe)] if recipe else []) + [(stage["name"], stage["config"]) for stage in stages if stage["config"]],
        environments=_environments(stages),
        written=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
    )
    path = directory / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)  # a browser that reloads never meets half a page
    return path


def _run(directory: Path) -> list[dict[str, Any]]:
    """A run that stands alone, and what was drawn from it and measured."""
    if not any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise FileNotFoundError(f"{directory} is neither a run's nor a recipe's directory: it holds no config.yaml and no stages.json")
    parts = [(name, kind) for name, kind in (("generated", "generate"), ("evaluation", "evaluate")) if (directory / name).is_dir()]
    return [_stage(directory.resolve().name, directory, {}), *(_stage(name, directory / name, {"kind": kind}) for name, kind in parts)]


def _sweep(directory: Path) -> dict[str, Any] | None:
    """The trials of a sweep, the best first, and how their metric went; None for what is no sweep."""
    record = _json(directory / SWEEP) or {}
    settings, found = record.get("settings"), record.get("trials")
    if not isinstance(settings, dict) or not isinstance(found, dict):
        return None
    metric, trials, at = str(settings.get("metric")), list[dict[str, Any]](), dict[float, dict[str, float]]()  # at: samples -> values
    for name, trial in ((name, trial) for name, trial in found.items() if _is_stage(name, trial)):
        rungs, parameters = trial.get("rungs"), trial.get("parameters")
        last = rungs[-1] if isinstance(rungs, list) and rungs else None
        samples, value = map(_number, last) if isinstance(last, list) and len(last) == 2 else (None, None)
        parameters = {str(key): str(item) for key, item in parameters.items()} if isinstance(parameters, dict) else {}
        texts = {"name": name, "status": str(trial.get("status", "")), "error": str(trial.get("error", ""))}
        trials.append({**texts, "parameters": parameters, "samples": samples, "value": value})
        for row in _rows(directory / "trials" / name / "metrics.jsonl")[0]:
            at.setdefault(row["samples"], {})[name] = row.get(metric, math.nan)
    sign = -1 if settings.get("best_is") == "highest" else 1
    trials.sort(key=lambda trial: (-(trial["samples"] or 0), math.inf if trial["value"] is None else sign * trial["value"]))
    group = {trial["name"]: [at[x].get(trial["name"], math.nan) for x in sorted(at)] for trial in trials[:MAX_CURVES]}
    drawn = len(at) > 1 and any(math.isfinite(value) for values in group.values() for value in values)
    charts = [_chart(metric, sorted(at), group, logarithmic=True)] if drawn else []
    for curve in itertools.chain.from_iterable(chart.curves for chart in charts):
        curve.values = ["" if value == "not finite" else value for value in curve.values]  # a trial that was over by then
    return {"metric": metric, "best_is": str(settings.get("best_is")), "trials": trials, "charts": charts}


def _template() -> Any:
    import jinja2

    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    env.filters.update(short=short, duration=duration)
    return env.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _stage(name: str, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a stage, whatever its kind; also of a run that stands alone (`state` is empty then)."""
    rows, unreadable = _rows(directory / "metrics.jsonl")
    config = _text(directory / "config.yaml")
    evaluation = _json(directory / "metrics.json") or {}
    grids = _pick(sorted(filter(_is_image, (directory / "samples").glob("*.png"))), MAX_GRIDS)
    settings = evaluation.get("settings")
    info, told = _json(directory / "info.json") or settings, settings if isinstance(settings, dict) else {}
    charts = _charts(rows)
    spent = (_number(state.get("seconds")), rows[-1].get("seconds") if rows else None)
    skipped = sum({key: value for row in rows for key, value in row.items() if key.startswith("skipped/")}.values())  # last of each role
    return {
        "name": name,
        "kind": state.get("kind", "train"),
        "status": state.get("status", ""),
        "error": state.get("error", ""),
        "environment": _json(directory / "environment.json"),
        "seconds": next((s for s in spent if s is not None and 0 < s < 1e12), 0.0),
        "facts": _facts(config),
        "config": config,
        "metrics": _metrics(evaluation.get("metrics")),
        "charts": charts,
        "samples": rows[-1]["samples"] if rows else None,
        "notes": [
            *(["Bold lines are smoothed."] if any(curve.raw for chart in charts for curve in chart.curves) else []),
            *([f"Steps skipped because their loss or gradient was not finite: {skipped:.0f}."] if skipped else []),
            *([f"Unreadable lines of metrics.jsonl left out: {unreadable}."] if unreadable else []),
        ],
        "grids": [_image(path, f"{int(path.stem):,} samples seen" if path.stem.isdecimal() else path.stem) for path in grids],
        "grid": _image(directory / "grid.png", str(told.get("grid", ""))) if _is_image(directory / "grid.png") else None,
        "info": _yaml(info) if info else "",
    }


# --- reading ----------------------------------------------------------------------------------------------------------------
# A run's directory may come from anybody: nothing outside it is read, and what is damaged or absurd is left out.


def _is_stage(name: str, state: Any) -> bool:
    return re.fullmatch(r"[\w-]+", name) is not None and isinstance(state, dict)


def _is_image(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_IMAGE


def _text(path: Path) -> str:
    if not path.is_file() or path.is_symlink():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_TEXT).strip()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _yaml(value: Any) -> str:
    try:
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    except RecursionError:
        return ""


def _number(value: Any) -> float | None:
    """As a float that can be drawn: what is absurdly large is infinite, what is absurdly small zero; None for what is no number."""
    if not isinstance(value, int | float):
        return None
    if not abs(value) < 1e100:
        return math.nan if value != value else math.copysign(math.inf, value)
    return float(value) if abs(value) > 1e-100 else 0.0


def _metrics(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        return []
    numbers, texts = ("value", "low", "high"), ("name", "better", "definition")
    return [
        {**{key: _number(entry.get(key)) for key in numbers}, **{key: str(entry.get(key, "")) for key in texts}}
        for entry in entries
        if isinstance(entry, dict)
    ]


def _environments(stages: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """The stages that ran in each environment, and that environment."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for stage in stages:
        if stage["environment"]:
            same = next((names for names, environment in found if environment == stage["environment"]), None)
            if same is None:
                found.append((same := [], stage["environment"]))
            same.append(stage["name"])
    return found


def _rows(path: Path) -> tuple[list[dict[str, float]], int]:
    """The numbers of metrics.jsonl, and how many lines could not be read (a run that was killed leaves half a line).

    A resumed run logs some steps twice: the later line counts.
    """
    rows: dict[int, dict[str, float]] = {}
    unreadable = 0
    if not path.is_file() or path.is_symlink():
        return [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                numbers = {key: _number(value) for key, value in json.loads(line).items()}
                row = {key: number for key, number in numbers.items() if number is not None}
                rows[int(row["samples"])] = row
            except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
                unreadable += 1
    return [rows[samples] for samples in sorted(rows)], unreadable


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """One list per key, with NaN where a row lacks it, so that all lists run along the same rows."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key, math.nan) for row in rows] for key in keys}


def _facts(config: str) -> list[str]:
    """The names of method, path and data set: what a reader asks first of a run."""
    try:
        values = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    parts = [values.get(key) for key in ("method", "path", "data")] if isinstance(values, dict) else []
    names = [part.get("name") if isinstance(part, dict) else part for part in parts]
    return [str(name).replace("_", " ") for name in names if name]


def _pick(items: list[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _image(path: Path, caption: str) -> dict[str, str]:
    return {"uri": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), "caption": caption}


# --- numbers and curves -----------------------------------------------------------------------------------------------------


def short(value: Any) -> str:
    """A number with three significant digits; other things as text."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e6:
        exponent = 9 if abs(value) >= 1e9 else 6
        return f"{value / 10**exponent:.3g}{'B' if exponent == 9 else 'M'}"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-2:
        return f"{value:#.3g}".rstrip(".")  # trailing zeros stay, so that a value and its interval have the same digits
    mantissa, _, exponent_text = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent_text)}"


def _tick(value: float) -> str:
    """A round number as short as an axis wants it."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    if value and abs(value) < 2e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """1.4 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _charts(rows: list[dict[str, float]]) -> list[Chart]:
    """The four charts every run has, then one for each other thing its method logs."""
    columns = _columns(rows)
    at = columns.pop("samples", [])
    columns.pop("seconds", None)
    groups: dict[str, dict[str, list[float]]] = {prefix: {} for prefix in CHARTS}
    for key, values in columns.items():
        prefix, _, label = key.partition("/")
        if prefix != "skipped" and any(map(math.isfinite, values)):
            groups.setdefault(prefix, {})[label] = values
    charts = []
    for prefix, group in groups.items():
        title, logarithmic = CHARTS.get(prefix, (prefix.replace("_", " ").capitalize(), False))
        if group and len(at) > 1:
            charts.append(_chart(title, at, group, logarithmic))
    return charts


def _chart(title: str, at: list[float], group: dict[str, list[float]], logarithmic: bool) -> Chart:
    kept = _pick(list(range(len(at))), MAX_POINTS)
    finite = [value for values in group.values() for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    logarithmic = logarithmic and low > 0 and high > 20 * low
    scale = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    margin = 0.06 * (top - bottom) or abs(top) or 1.0
    bottom, top = bottom - margin, top + margin
    if low >= 0 and not logarithmic:
        bottom = max(bottom, 0.0)

    def x(samples: float) -> float:
        return (samples - at[0]) / (at[-1] - at[0])

    def y(value: float) -> float:
        return (top - scale(value)) / (top - bottom)

    curves = []
    for label, values in sorted(group.items()):
        smooth = _smooth(values) if len(values) > 60 and title != "Learning rate" else values
        raw_path, smooth_path = (_path([(x(at[i]), y(v[i]) if math.isfinite(v[i]) else math.nan) for i in kept]) for v in (values, smooth))
        curves.append(Curve(label, raw_path if smooth is not values else "", smooth_path, [short(smooth[i]) for i in kept]))
    ticks = [v for v in _ticks(bottom, top, logarithmic) if 0 <= y(v) <= 1]
    x_ticks = [v for v in _ticks(at[0], at[-1], False) if at[0] <= v <= at[-1]]
    return Chart(
        title,
        curves,
        [(100 * x(value), _tick(value)) for value in x_ticks],
        [(100 * y(value), _tick(value)) for value in ticks],
        [f"{at[i]:,.0f}" for i in kept],
        [round(x(at[i]), 4) for i in kept],
    )


def _smooth(values: list[float]) -> list[float]:
    """Centred mean over a fortieth of the run on either side, of what is finite there."""
    reach = max(1, len(values) // 40)
    sums = [0.0, *itertools.accumulate(value if math.isfinite(value) else 0.0 for value in values)]
    counts = [0, *itertools.accumulate(map(math.isfinite, values))]
    windows = [(max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values))]
    return [(sums[b] - sums[a]) / (counts[b] - counts[a]) if counts[b] > counts[a] else math.nan for a, b in windows]


def _path(points: list[tuple[float, float]]) -> str:
    """SVG path data; the pen is lifted where a value is not finite."""
    parts, down = [], False
    for x, y in points:
        if math.isfinite(y):
            parts.append(f"{'L' if down else 'M'}{1000 * x:.1f} {1000 * y:.1f}")
        down = math.isfinite(y)
    return "".join(parts)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Three to six round values between low and high, which are exponents of ten on a logarithmic axis."""
    if logarithmic:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        every = math.ceil((high - low) / 5)
        return [m * 10.0**e for e in exponents if e % every == 0 for m in ((1,) if high - low > 2 else (1, 3))]
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= 0.999 * rough)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]
