"""Draws what guidance costs in one call, class accuracy against Frechet distance: the scores of configs/recipes/one_step_frontier.yaml.

    python benchmarks/frontier.py                                  # runs/one_step_frontier: a table, and docs/one_step_frontier.svg
    python benchmarks/frontier.py DIRECTORY --out FIGURE.svg       # of another recipe, whose samples are called "NAME; w = GUIDANCE"

A point is a set of samples, its bars the intervals of `evaluate`; a line joins the points of one name in the order of w.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ACCURACY, DISTANCE, GUIDANCE = "class accuracy, ", "Frechet distance, ", "; w = "
Point = tuple[float, dict[str, Any], dict[str, Any]]  # guidance, accuracy, distance

app = typer.Typer(add_completion=False)


def points_of(metrics: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Name -> its points, w rising. Samples whose name tells no w are left out."""
    found = {metric["name"]: metric for metric in metrics}
    lines: dict[str, list[Point]] = {}
    for name, distance in found.items():
        of, told, guidance = name.removeprefix(DISTANCE).partition(GUIDANCE)
        if name.startswith(DISTANCE) and told and (accuracy := found.get(ACCURACY + name.removeprefix(DISTANCE))):
            lines.setdefault(of, []).append((float(guidance), accuracy, distance))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def row(name: str, point: Point) -> str:
    told = "{value:.3f} ({low:.3f} to {high:.3f}) | ", "{value:.1f} ({low:.1f} to {high:.1f})"
    return f"| {name} | {point[0]:g} | {told[0].format(**point[1])}{told[1].format(**point[2])} |"


def bars(metrics: list[dict[str, Any]]) -> list[list[float]]:
    """How far below and above their values the intervals reach."""
    return [[abs(each["value"] - each[end]) for each in metrics] for end in ("low", "high")]


def draw(lines: dict[str, list[Point]], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, points in lines.items():
        accuracies, distances = [point[1] for point in points], [point[2] for point in points]
        x, y = ([each["value"] for each in metrics] for metrics in (distances, accuracies))
        axes.errorbar(x, y, xerr=bars(distances), yerr=bars(accuracies), marker="o", label=name, linewidth=1, elinewidth=0.4, markersize=4)
        for point, place in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{point[0]:g}", place, textcoords="offset points", xytext=(3, 3), fontsize=7)
    axes.set(xlabel="Frechet distance to held-out data", ylabel="class accuracy")
    axes.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


@app.command()
def main(
    directory: Annotated[Path, typer.Argument(help="Of the recipe, or of its scores.")] = Path("runs/one_step_frontier"),
    out: Annotated[Path, typer.Option(help="The figure.")] = Path(__file__).parents[1] / "docs" / "one_step_frontier.svg",
) -> None:
    place = next((each for each in (directory / "scores" / "metrics.json", directory / "metrics.json") if each.is_file()), None)
    if place is None:
        raise SystemExit(f"{directory} has no scores yet; run: gentrain run configs/recipes/one_step_frontier.yaml")
    lines = points_of(json.loads(place.read_text(encoding="utf-8"))["metrics"])
    if not lines:
        raise SystemExit(f'{place} tells of no samples that are called "NAME; w = GUIDANCE" with a class accuracy and a Frechet distance')
    print("| samples | w | class accuracy | Frechet distance |\n|---|---|---|---|")
    print("\n".join(row(name, point) for name, points in lines.items() for point in points))
    draw(lines, out)


if __name__ == "__main__":
    app()
