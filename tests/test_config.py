"""Composition, overrides, interpolation, the registry, plugins, and the message a person gets for each kind of mistake."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from pydantic import AllowInfNan, Field, NonNegativeInt, PositiveFloat, PositiveInt

from gentrain import config
from gentrain.config import (
    COMMAND_LINE,
    Component,
    ConfigError,
    Document,
    Fraction,
    build,
    describe,
    load,
    load_plugins,
    option,
    register,
    to_dict,
    to_yaml,
)


class Shape(Component, kind="shape"):
    colour: ClassVar[str] = "red"


Shape._package = "json"  # the shapes are all in this file: any package that is cheap to import will do


@register("circle")
@dataclass
class Circle(Shape):
    radius: PositiveFloat = option(1.0, "of the circle", unit="m")


@register("polygon")
@dataclass
class Polygon(Shape):
    corners: PositiveInt = option(help="number of corners")
    sides: tuple[PositiveFloat, ...] = option((1.0,))

    def __post_init__(self) -> None:
        if len(self.sides) not in (1, self.corners):
            raise ValueError(f"{len(self.sides)} sides for {self.corners} corners; give one per corner, or one for all")


@register("group")
@dataclass
class Group(Shape):
    shapes: list[Shape] = option(list)


@dataclass
class Style:
    fill: bool = False
    opacity: Fraction = 1.0
    kind: Literal["plain", "dashed"] = "plain"


@dataclass
class Drawing:
    shape: Shape
    title: str = "untitled"
    copies: PositiveInt = 1
    scale: float = 1.0
    reach: Annotated[float, Field(gt=0), AllowInfNan()] | None = None
    limit: NonNegativeInt | None = None
    style: Style = option(Style)
    backdrop: Shape | None = None
    margin: Shape = option(lambda: Polygon(corners=4))
    named: dict[str, Shape] = option(dict)
    styles: list[Style] = option(list)
    weights: dict[str, float] = option(dict)
    tags: tuple[str, ...] = ()
    flag: bool | int = False
    extra: dict[str, Any] = option(dict)
    out: Path | None = None


def write(directory: Path, **files: str) -> Path:
    """Writes NAME.yaml for each; returns main.yaml's path."""
    for name, text in files.items():
        path = directory / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory / "main.yaml"


def draw(directory: Path, *overrides: str, **files: str) -> Drawing:
    return build(Drawing, load(write(directory, **files), overrides))


# --- composition ------------------------------------------------------------------------------------------------------------


def test_later_bases_and_then_the_file_win(tmp_path: Path) -> None:
    drawing = draw(
        tmp_path,
        main="base: [one.yaml, two.yaml]\nscale: 3\n",
        one="shape: circle\ntitle: one\ncopies: 1\nscale: 1\n",
        two="title: two\nscale: 2\n",
    )
    assert (drawing.title, drawing.copies, drawing.scale) == ("two", 1, 3.0)


def test_bases_are_relative_to_the_file_that_names_them_and_may_be_nested(tmp_path: Path) -> None:
    drawing = draw(
        tmp_path,
        main="shape: {base: parts/square.yaml, sides: [2]}\nnamed: {a: {base: parts/circle.yaml}}\n",
        parts__square="base: four.yaml\nname: polygon\n",
        parts__four="corners: 4\n",
        parts__circle="name: circle\nradius: 5\n",
    )
    assert drawing.shape == Polygon(4, (2.0,))
    assert drawing.named == {"a": Circle(5.0)}


def test_mappings_merge_deeply_and_lists_are_replaced(tmp_path: Path) -> None:
    drawing = draw(
        tmp_path,
        main="base: one.yaml\nshape: {corners: 3}\ntags: [c]\n",
        one="shape: {name: polygon, corners: 4, sides: [7]}\ntags: [a, b]\n",
    )
    assert drawing.shape == Polygon(3, (7.0,))
    assert drawing.tags == ("c",)


@pytest.mark.parametrize("shape", ["circle", "{name: circle}"])
def test_a_component_whose_name_changes_keeps_nothing_of_the_old_one(tmp_path: Path, shape: str) -> None:
    base = "shape: {name: polygon, corners: 4}\n"
    assert draw(tmp_path, main=f"base: one.yaml\nshape: {shape}\n", one=base).shape == Circle(1.0)
    assert draw(tmp_path, f"shape={shape}", main=base).shape == Circle(1.0)


@pytest.mark.parametrize("shape", ["circle", "{name: circle}", "{radius: 2}", "{name: circle, radius: 2}"])
def test_a_component_whose_name_stays_keeps_its_keys(tmp_path: Path, shape: str) -> None:
    assert draw(tmp_path, main=f"base: one.yaml\nshape: {shape}\n", one="shape: {name: circle, radius: 2}\n").shape == Circle(2.0)


def test_a_bare_name_takes_keys_from_above(tmp_path: Path) -> None:
    assert draw(tmp_path, "shape.radius=2", main="shape: circle\n").shape == Circle(2.0)
    assert draw(tmp_path, main="base: one.yaml\nshape: {radius: 3}\n", one="shape: circle\n").shape == Circle(3.0)


def test_one_base_may_serve_twice(tmp_path: Path) -> None:
    drawing = draw(tmp_path, main="shape: {base: one.yaml}\nbackdrop: {base: one.yaml, radius: 3}\n", one="name: circle\nradius: 2\n")
    assert (drawing.shape, drawing.backdrop) == (Circle(2.0), Circle(3.0))


# --- overrides and interpolation --------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_and_the_last_wins(tmp_path: Path) -> None:
    overrides = ["shape.radius=2", "shape.radius=4.5", "style.opacity=0.5", "tags=[x,y]", "title=a=b", "limit=null", "weights.z=1e-3"]
    drawing = draw(tmp_path, *overrides, main="shape: circle\nlimit: 3\n")
    assert drawing == Drawing(Circle(4.5), title="a=b", style=Style(opacity=0.5), tags=("x", "y"), weights={"z": 1e-3})


@pytest.mark.parametrize("overrides", [["shape.name=circle", "shape.radius=2"], ["shape.radius=2", "shape.name=circle"]])
def test_a_name_and_its_keys_may_be_overridden_in_any_order(tmp_path: Path, overrides: list[str]) -> None:
    assert draw(tmp_path, *overrides, main="shape: {name: polygon}\n").shape == Circle(2.0)


def test_interpolation_sees_overrides_bases_and_what_the_caller_adds(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main="base: one.yaml\nshape: {name: circle, radius: '${scale}'}\ntitle: ${stages.train.output}/${copies}\nbackdrop: ${shape}\n",
        one="scale: 1\ncopies: 7\n",
    )
    document = load(path, ["scale=4"], extra={"stages": {"train": {"output": "runs/a"}}})
    document.values.pop("stages")
    drawing = build(Drawing, document)
    assert (drawing.shape, drawing.title, drawing.backdrop) == (Circle(4.0), "runs/a/7", Circle(4.0))


def test_the_file_beats_what_the_caller_adds(tmp_path: Path) -> None:
    assert load(write(tmp_path, main="title: mine\n"), extra={"title": "theirs"}).values == {"title": "mine"}


def test_without_a_file_the_command_line_is_the_source() -> None:
    document = load(None, ["shape.radius=2"], {"shape": {"name": "circle"}})
    assert build(Drawing, document).shape == Circle(2.0)
    with pytest.raises(ConfigError, match=r"^command line: shape: a value is required"):
        build(Drawing, load(None))


def test_a_registered_class_is_built_without_a_name_and_as_nothing_else() -> None:
    assert build(Circle, load(None, ["radius=2"])) == Circle(2.0)
    assert build(Circle, load(None, ["name=circle"])) == Circle(1.0)
    with pytest.raises(ConfigError, match=r"no shape is called 'polygon'; available: circle"):
        build(Circle, load(None, ["name=polygon", "corners=3"]))


def test_infinity_is_a_number_only_where_it_means_something(tmp_path: Path) -> None:
    assert draw(tmp_path, main="shape: circle\nreach: .inf\n").reach == float("inf")


def test_numbers_read_as_people_write_them(tmp_path: Path) -> None:
    drawing = draw(tmp_path, main="shape: circle\nscale: 1e-3\ncopies: 1e3\nweights: {a: 1}\nflag: true\nout: some/where\n")
    assert (drawing.scale, drawing.copies, drawing.weights, drawing.flag, drawing.out) == (1e-3, 1000, {"a": 1.0}, True, Path("some/where"))


# --- origins ----------------------------------------------------------------------------------------------------------------


def test_every_key_knows_the_file_that_last_set_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        main="base: one.yaml\nshape: {base: two.yaml, corners: 3}\ntags: [a]\n",
        one="title: x\nstyle: {fill: true}\n",
        two="name: polygon\nsides: [1]\n",
    )
    document = load(path, ["style.opacity=1", "copies=2"])
    origins = {key: Path(document.origin(key)).stem for key in ("title", "shape.corners", "shape.sides[0]", "style.fill", "tags[0]")}
    assert origins == {"title": "one", "shape.corners": "main", "shape.sides[0]": "two", "style.fill": "one", "tags[0]": "main"}
    assert document.origin("style.opacity") == document.origin("copies") == COMMAND_LINE
    assert Path(document.origin("style.kind")).stem == "one", "a key that is missing belongs to the file that began its section"
    assert document.origin("nothing") == str(path)


def test_a_section_names_keys_in_full(tmp_path: Path) -> None:
    path = write(tmp_path, main="stages: {draw: {shape: circle, base: one.yaml}}\n", one="style: {opacity: 2}\n")
    section = load(path).section("stages").section("draw")
    with pytest.raises(ConfigError) as caught:
        build(Drawing, section)
    assert (caught.value.key, Path(caught.value.source or "").name) == ("stages.draw.style.opacity", "one.yaml")


# --- registry and plugins ---------------------------------------------------------------------------------------------------


def test_registry_lists_by_name_and_refuses_a_second_owner() -> None:
    assert list(Shape.available()) == ["circle", "group", "polygon"]
    assert Circle.registered_name == "circle"
    with pytest.raises(ValueError, match=r"shape 'circle' is already registered by .*test_config\.Circle"):
        register("circle")(Polygon)
    assert Shape.available()["circle"] is Circle


def test_all_modules_of_the_kinds_package_are_imported_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toykit"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text("from gentrain.config import Component\nclass Toy(Component, kind='toy'): ...\n")
    (package / "ball.py").write_text(
        "from dataclasses import dataclass\nfrom gentrain.config import register\nfrom toykit.base import Toy\n"
        "@register('ball')\n@dataclass\nclass Ball(Toy):\n    size: int = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from toykit.base import Toy  # type: ignore[import-not-found]

    assert "toykit.ball" not in sys.modules
    assert list(Toy.available()) == ["ball"]


PLUGIN = """
from dataclasses import dataclass
from gentrain.config import register
Circle = __import__("sys").modules[{module!r}].Circle
@register({name!r})
@dataclass
class Mine(Circle):
    speed: float = {speed}
"""


def test_plugins_add_components_once_and_may_share_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shape, "_registry", dict(Shape._registry))
    for folder, speed in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(PLUGIN.format(module=__name__, name=f"mine_{folder}", speed=speed))
    document = Document({"plugins": ["a/mine.py", "b/mine.py", "json"]}, str(tmp_path / "main.yaml"))
    load_plugins(document)
    assert document.values["plugins"] == [str(tmp_path / "a/mine.py"), str(tmp_path / "b/mine.py"), "json"]
    first = Shape.available()["mine_a"]
    load_plugins(replace(document, file="elsewhere/main.yaml"))
    assert Shape.available()["mine_a"] is first, "a second load must not make a second class"
    drawing = draw(tmp_path, main="shape: mine_b\nbackdrop: {name: mine_a, radius: 2, speed: 3}\n")
    assert to_dict(drawing.shape) == {"name": "mine_b", "radius": 1.0, "speed": 2.0}
    assert to_dict(drawing.backdrop) == {"name": "mine_a", "radius": 2.0, "speed": 3.0}


@pytest.mark.parametrize(
    "plugins, key, message",
    [
        (["absent.py"], "plugins[0]", "No such file"),
        (["json", "no_such_module"], "plugins[1]", "No module named 'no_such_module'"),
        (["broken.py"], "plugins[0]", "plugin 'broken.py' failed to import: ZeroDivisionError"),
        ("broken.py", "plugins", "expected a list"),
        ([3], "plugins", "expected a list"),
    ],
)
def test_a_plugin_that_cannot_be_imported(tmp_path: Path, plugins: Any, key: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_plugins(Document({"plugins": plugins}, str(tmp_path / "main.yaml")))
    assert (caught.value.source, caught.value.key) == (str(tmp_path / "main.yaml"), key)
    assert not any("plugin_broken" in name for name in sys.modules)


# --- round trip -------------------------------------------------------------------------------------------------------------


def test_the_resolved_config_alone_makes_an_equal_object(tmp_path: Path) -> None:
    drawing = draw(
        tmp_path,
        "weights.tiny=1e-5",
        main="""
            shape: {name: group, shapes: [circle, {name: polygon, corners: 3, sides: [1, 2, 3]}]}
            title: 'null'
            limit: 0
            named: {a: {name: circle, radius: 1e-7}}
            styles: [{fill: yes}, {kind: dashed}]
            tags: ['1', 'true', "ü: #"]
            extra: {anything: [1, {b: null}]}
            out: a/b
        """,
    )
    again = draw(tmp_path, main=to_yaml(drawing))
    assert again == drawing
    assert to_yaml(again) == to_yaml(drawing)
    assert drawing.title == "null"
    assert drawing.styles == [Style(fill=True), Style(kind="dashed")]
    assert yaml.safe_load(to_yaml(drawing))["shape"]["shapes"][0] == {"name": "circle", "radius": 1.0}


def test_keys_without_a_name_are_set_in_the_default_component(tmp_path: Path) -> None:
    assert draw(tmp_path, main="shape: circle\n").margin == Polygon(corners=4)
    main = "shape: circle\nmargin: {sides: [2]}\n"
    assert draw(tmp_path, main=main).margin == Polygon(corners=4, sides=(2,))
    assert draw(tmp_path, "margin.corners=5", main=main).margin == Polygon(corners=5, sides=(2,))
    assert draw(tmp_path, "margin={name: circle, radius: 2}", main="shape: circle\n").margin == Circle(radius=2)
    with pytest.raises(ConfigError, match=r"command line: margin\.cornres: unknown key; did you mean 'corners'"):
        draw(tmp_path, "margin.cornres=5", main=main)
    with pytest.raises(ConfigError, match=r"backdrop: `name` is missing"):  # nothing is its default
        draw(tmp_path, "backdrop.radius=2", main=main)


def test_defaults_are_not_shared_between_instances(tmp_path: Path) -> None:
    one, two = (draw(tmp_path, main="shape: circle\n") for _ in range(2))
    one.weights["a"] = 1.0
    one.style.fill = True
    assert (two.weights, two.style.fill) == ({}, False)


@pytest.mark.parametrize(
    "schema, text",
    [
        (PositiveInt, "a whole number > 0"),
        (Fraction, "a number >= 0 and <= 1"),
        (Literal["a", "b"], "one of a, b"),
        (int | None, "a whole number or null"),
        (tuple[int, ...], "a list, each a whole number"),
        (Shape, "a shape"),
        (Style, "a mapping"),
        (Path, "Path"),
        (bool, "true or false"),
    ],
)
def test_types_are_described_in_words(schema: Any, text: str) -> None:
    assert describe(schema) == text


# --- mistakes ---------------------------------------------------------------------------------------------------------------

MAIN, BASE = "main.yaml", "one.yaml"

# what, main.yaml, override (or None), file that is named, key, what the message says
MISTAKES = [
    ("unknown key", "shape: circle\ncopeis: 2\n", None, MAIN, "copeis", "unknown key; did you mean 'copies'?"),
    ("nothing near", "shape: circle\nzzz: 2\n", None, MAIN, "zzz", "unknown key; valid keys: shape, title, copies"),
    ("in a component", "shape: {name: circle, radios: 2}\n", None, MAIN, "shape.radios", "did you mean 'radius'?"),
    ("in a base", "shape: circle\nbase: one.yaml\n", None, BASE, "style.opactiy", "did you mean 'opacity'?"),
    ("by an override", "shape: circle\n", "style.opactiy=1", COMMAND_LINE, "style.opactiy", "did you mean 'opacity'?"),
    ("in a list", "shape: circle\nstyles: [{}, {fil: true}]\n", None, MAIN, "styles[1].fil", "did you mean 'fill'?"),
    ("no such component", "shape: circel\n", None, MAIN, "shape.name", "no shape is called 'circel'; did you mean 'circle'?"),
    ("nothing like it", "shape: qqq\n", None, MAIN, "shape.name", "available: circle, group, polygon"),
    ("nested component", "shape: {name: group, shapes: [sphere]}\n", None, MAIN, "shape.shapes[0].name", "no shape is called 'sphere'"),
    (
        "component in a mapping",
        "shape: circle\nnamed: {a: {radius: 1}}\n",
        None,
        MAIN,
        "named.a",
        "`name` is missing; available shapes: circle",
    ),
    ("component without name", "shape: {radius: 1}\n", None, MAIN, "shape", "`name` is missing; available shapes: circle, group, polygon"),
    ("name that is no text", "shape: {name: [circle]}\n", None, MAIN, "shape.name", "no shape is called ['circle']"),
    ("component as a number", "shape: 3\n", None, MAIN, "shape", "expected the name of a shape or a mapping with `name`, got 3"),
    ("component left out", "title: x\n", None, MAIN, "shape", "a value is required: a shape"),
    ("value left out", "shape: polygon\n", None, MAIN, "shape.corners", "a value is required: a whole number > 0"),
    ("value left out below an override", "shape: {name: polygon}\n", "shape.sides=[1]", MAIN, "shape.corners", "a value is required"),
    ("marked as missing", "shape: circle\ntitle: ???\n", None, MAIN, "title", "a value is required: text; set it in the file or on"),
    ("component marked as missing", "shape: ???\n", None, MAIN, "shape", "a value is required: a shape; set it"),
    ("text for a number", "shape: circle\nscale: big\n", None, MAIN, "scale", "expected a number, got 'big'"),
    ("number for text", "shape: circle\ntitle: 3\n", None, MAIN, "title", "expected text, got 3"),
    ("out of range", "shape: circle\ncopies: 0\n", None, MAIN, "copies", "expected a whole number > 0, got 0"),
    (
        "out of range in a base",
        "shape: circle\nbase: two.yaml\n",
        None,
        "two.yaml",
        "style.opacity",
        "expected a number >= 0 and <= 1, got 1.5",
    ),
    ("out of range by an override", "shape: circle\n", "shape.radius=-1", COMMAND_LINE, "shape.radius", "expected a number > 0, got -1"),
    ("infinity for a number", "shape: circle\nscale: .inf\n", None, MAIN, "scale", "expected a number, got inf (Input should be finite)"),
    ("no number for one", "shape: circle\nscale: .nan\n", None, MAIN, "scale", "expected a number, got nan (Input should be finite)"),
    ("infinity in a list", "shape: {name: polygon, corners: 2, sides: [1, .inf]}\n", None, MAIN, "shape.sides", "got [1, inf]"),
    ("infinity in a mapping", "shape: circle\nweights: {a: 1, b: -.inf}\n", None, MAIN, "weights", "got {'a': 1, 'b': -inf}"),
    (
        "minus infinity where .inf means something",
        "shape: circle\nreach: -.inf\n",
        None,
        MAIN,
        "reach",
        "expected a number > 0 or null, got -inf",
    ),
    ("fraction for a count", "shape: circle\ncopies: 1.5\n", None, MAIN, "copies", "expected a whole number > 0, got 1.5"),
    ("true for a number", "shape: circle\ncopies: true\n", None, MAIN, "copies", "expected a whole number > 0, got True"),
    ("true among numbers", "shape: {name: polygon, corners: 2, sides: [1, true]}\n", None, MAIN, "shape.sides", "got [1, True]"),
    (
        "not one of the choices",
        "shape: circle\nstyle: {kind: doted}\n",
        None,
        MAIN,
        "style.kind",
        "expected one of plain, dashed, got 'doted'",
    ),
    ("an item of a list", "shape: {name: polygon, corners: 2, sides: [1, -2]}\n", None, MAIN, "shape.sides[1]", "got -2"),
    ("a value of a mapping", "shape: circle\nweights: {a: 1, b: heavy}\n", None, MAIN, "weights[b]", "got 'heavy'"),
    ("null where a value belongs", "shape: circle\ncopies: null\n", None, MAIN, "copies", "expected a whole number > 0, got None"),
    ("a wrong optional", "shape: circle\nlimit: -1\n", None, MAIN, "limit", "expected a whole number >= 0 or null, got -1"),
    ("a list for a section", "shape: circle\nstyle: [1]\n", None, MAIN, "style", "expected a mapping, got [1]"),
    ("a mapping for a list", "shape: circle\nstyles: {fill: true}\n", None, MAIN, "styles", "expected a list, got {'fill': True}"),
    ("values that do not fit together", "shape: {name: polygon, corners: 3, sides: [1, 2]}\n", None, MAIN, "shape", "give one per corner"),
    ("interpolation of nothing", "shape: circle\nstyle: {opacity: '${nope}'}\n", None, MAIN, "style.opacity", "'nope' not found"),
    ("interpolation in a circle", "shape: circle\ntitle: ${out}\nout: ${title}\n", None, MAIN, "title", "Recursive interpolation detected"),
    ("override without a value", "shape: circle\n", "copies", COMMAND_LINE, "", "cannot read the override 'copies'; write it as key=value"),
    ("override without a key", "shape: circle\n", "=3", COMMAND_LINE, "", "write it as key=value"),
    ("override with an empty part", "shape: circle\n", "style..fill=true", COMMAND_LINE, "", "write it as key=value"),
    ("override that is no YAML", "shape: circle\n", "tags=[a", COMMAND_LINE, "tags", "cannot read the value of the override 'tags=[a'"),
    ("not YAML", "shape: circle\n  title: [\n", None, MAIN, "", "not valid YAML in line 2"),
    ("a key twice", "shape: circle\ntitle: a\ntitle: b\n", None, MAIN, "", "not valid YAML in line 3: found duplicate key title"),
    ("a list as a file", "- shape\n", None, MAIN, "", "the top level must be a mapping"),
    ("a word as a file", "shape\n", None, MAIN, "", "the top level must be a mapping"),
    ("a number as a file", "3\n", None, MAIN, "", "the top level must be a mapping"),
    (
        "an item of a list by an override",
        "shape: circle\nstyles: [{}]\n",
        "styles[0].fill=true",
        COMMAND_LINE,
        "styles[0].fill",
        "give the whole list",
    ),
    ("a key that is no text", "shape: circle\nstyle: {1: a}\n", None, MAIN, "style", "keys must be text, got 1"),
    ("no such base", "shape: circle\nbase: on.yaml\n", None, "on.yaml", "", "did you mean"),
    ("base that is no name", "shape: circle\nbase: {a: 1}\n", None, MAIN, "base", "expected a file name or a list of file names"),
    ("nested base that is no name", "shape: {base: 3}\n", None, MAIN, "shape.base", "expected a file name or a list of file names"),
    ("a file that includes itself", "base: main.yaml\n", None, MAIN, "base", "includes itself through `base:`"),
    ("a base on the command line", "shape: circle\n", "base=one.yaml", COMMAND_LINE, "base", "unknown key"),
]


@pytest.mark.parametrize("text, override, file, key, message", [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_told_with_file_key_and_remedy(
    tmp_path: Path, text: str, override: str | None, file: str, key: str, message: str
) -> None:
    one, two = "style: {opactiy: 1}\n", "style: {opacity: 1.5}\n"
    with pytest.raises(ConfigError) as caught:
        draw(tmp_path, *([override] if override else []), main=text, one=one, two=two)
    error = caught.value
    assert Path(error.source or "").name == file
    assert error.key == key
    assert message in error.message
    assert str(error) == ": ".join(part for part in (error.source, key, error.message) if part)
    assert "\n" not in str(error)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, quickstart="shape: circle\n")
    with pytest.raises(ConfigError, match=r"quickstrat\.yaml: no such file; did you mean .*quickstart\.yaml\?"):
        load(tmp_path / "quickstrat.yaml")
    with pytest.raises(ConfigError, match="cannot read it"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot read it"):
        load(tmp_path / "binary.yaml")


def test_files_that_include_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"main\.yaml: base: this file includes itself"):
        load(write(tmp_path, main="base: one.yaml\n", one="base: main.yaml\n"))


def test_field_metadata_is_kept_for_the_listing() -> None:
    field = Circle.__dataclass_fields__["radius"]
    assert dict(field.metadata) == {"help": "of the circle", "unit": "m", "source": ""}
    assert config.option.__doc__


@pytest.mark.parametrize(
    "error, said",
    [
        (ConfigError("wrong", source="file.yaml", key="shape"), "file.yaml: data.shape: wrong"),
        (ConfigError("wrong"), "data: wrong"),
        (ValueError("wrong"), "path: wrong"),
    ],
)
def test_an_error_about_a_part_names_its_key_and_keeps_its_file(error: Exception, said: str) -> None:
    with pytest.raises(ConfigError) as caught, config.errors_about("data", otherwise="path"):
        raise error
    assert str(caught.value) == said
