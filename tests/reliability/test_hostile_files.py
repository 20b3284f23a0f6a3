"""Files of others: samples, tables, states, images, what a report reads. Each is refused by name; nothing is changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gentrain.config import ConfigError, Document, build
from gentrain.data.base import CorruptItem
from gentrain.data.image_folder import ImageFolder
from gentrain.export import export
from gentrain.models.denoiser import Denoiser
from gentrain.models.unet import UNet
from gentrain.paths.rectified_flow import RectifiedFlow
from gentrain.recipes.base import STAGES, read_states
from gentrain.recipes.evaluate import METRICS, Evaluate, read_metrics
from gentrain.recipes.export import Export
from gentrain.recipes.generate import SAMPLES
from gentrain.report import write_report
from gentrain.samplers.euler import Euler
from tests.reliability.hostile import Bomb, contained, safetensors
from tests.test_report import rows as report_rows
from tests.test_report import write_metrics

# --- samples and tables -----------------------------------------------------------------------------------------------------------

X, LABEL = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
SAMPLE_FILES: list[tuple[str, bytes | dict[str, torch.Tensor], str]] = [
    ("empty", b"", "is damaged (SafetensorError"),
    ("text", b"hello" * 100, "is damaged (SafetensorError"),
    ("pickle", pickle.dumps(Bomb("touch pwned")), "is damaged (SafetensorError"),
    ("header of 2^62 bytes", safetensors({}, length=2**62), "is damaged (SafetensorError"),
    ("tensor of 2^60 numbers", safetensors({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}), "is damaged"),
    ("cut short", safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(8)), "is damaged (SafetensorError"),
    ("no labels", {"x": X}, "is damaged (KeyError: 'label')"),
    ("no samples", {"x": X[:0], "label": LABEL[:0]}, "holds x torch.float32 [0, 2]"),
    ("other shape", {"x": torch.zeros(4, 3), "label": LABEL}, "expected finite float32 samples of shape [2]"),
    ("whole numbers", {"x": X.long(), "label": LABEL}, "holds x torch.int64 [4, 2]"),
    ("fewer labels", {"x": X, "label": LABEL[:3]}, "label torch.int64 [3]"),
    ("labels that are no numbers of classes", {"x": X, "label": LABEL.float()}, "label torch.float32 [4]"),
    ("not finite", {"x": X / 0, "label": LABEL}, "expected finite"),
]


@pytest.mark.parametrize("content, message", [row[1:] for row in SAMPLE_FILES], ids=[row[0] for row in SAMPLE_FILES])
def test_hostile_samples_are_not_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | dict[str, torch.Tensor], message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / SAMPLES).write_bytes(content)
    else:
        save_file(content, tmp_path / SAMPLES)
    monkeypatch.chdir(tmp_path)
    stage = parse_stage(tmp_path)
    with contained(tmp_path), pytest.raises(ConfigError) as caught:
        stage.execute(tmp_path / "scores")
    assert caught.value.key == "samples.drawn" and str(tmp_path / SAMPLES) in caught.value.message
    assert message in caught.value.message and caught.value.message.endswith("generate it again")


def parse_stage(directory: Path) -> Evaluate:
    return build(Evaluate, Document({"data": {"name": "rings", "held_out": 50}, "samples": {"drawn": str(directory)}}, "test"))


METRIC = '{"name": "a", "value": 1, "low": 0, "high": 2, "better": "lower", "definition": "b"}'
TABLES = [
    ("", "Expecting value"), ("[]", "list indices"), ("{}", "'metrics'"), ('{"metrics": 3}', "validation error"),
    ('{"metrics": [{"name": "a"}]}', "validation error"), (f'{{"metrics": [{METRIC.replace("1", "[]", 1)}]}}', "validation error"),
    ("[" * 100_000, "recursion"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", TABLES)
def test_a_hostile_table_is_not_put_into_a_card(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / METRICS).write_text(text)
    with contained(tmp_path), pytest.raises(ConfigError, match="evaluate again") as caught:
        read_metrics(tmp_path)
    assert caught.value.source == str(tmp_path / METRICS) and message in str(caught.value)
    (tmp_path / METRICS).write_text(f'{{"metrics": [{METRIC}]}}')
    assert read_metrics(tmp_path)[0]["value"] == 1.0


# --- states of recipes ------------------------------------------------------------------------------------------------------------

STATE_OF_A = {
    "kind": "train", "status": "finished", "reason": "", "seconds": 1.0, "fingerprint": "0123456789abcdef", "inputs": {}, "settings": {},
}  # fmt: skip
STATES = [
    ("no JSON", "{", "EOF"),
    ("a list", "[]", "[type=dict_type"),
    ("deep", "[" * 100_000, "recursion limit"),
    ("a stage that is text", '{"a": "finished"}', "[type=dict_type"),
    ("an entry missing", json.dumps({"a": {**STATE_OF_A, "seconds": None}}), "seconds"),
    ("no such status", json.dumps({"a": {**STATE_OF_A, "status": "done"}}), "status"),
    ("negative time", json.dumps({"a": {**STATE_OF_A, "seconds": -1}}), "seconds"),
    ("a name that climbs", json.dumps({"../a": STATE_OF_A}), "string_pattern_mismatch"),
    ("a fingerprint that climbs", json.dumps({"a": {**STATE_OF_A, "fingerprint": "../../../../x"}}), "string_pattern_mismatch"),
    ("bytes", bytes(range(256)), "damaged"),
]


@pytest.mark.parametrize("text, message", [row[1:] for row in STATES], ids=[row[0] for row in STATES])
def test_hostile_states_of_stages_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / STAGES).write_bytes(text.encode() if isinstance(text, str) else text)
    with contained(tmp_path), pytest.raises(ConfigError) as caught:
        read_states(tmp_path)
    assert caught.value.source == str(tmp_path / STAGES)
    assert message in str(caught.value) and "restore it, or move the directory away" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / STAGES).write_text(json.dumps({"a": STATE_OF_A}))
    assert read_states(tmp_path) == {"a": STATE_OF_A}


# --- directories to export to -----------------------------------------------------------------------------------------------------


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "out"


def _not_empty(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "precious").write_text("kept")
    return folder / "out"


def _is_file(folder: Path) -> Path:
    (folder / "out").write_text("kept")
    return folder / "out"


def _link_to_full(folder: Path) -> Path:
    (folder / "out").symlink_to(_not_empty(folder / "other") if (folder / "other").mkdir() is None else folder)
    return folder / "out"


def _dangling(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


PLACES: list[tuple[str, Callable[[Path], Path], str]] = [
    ("not empty", _not_empty, "exists and is not an empty directory; name another"),
    ("a file", _is_file, "exists and is not an empty directory; name another"),
    ("link to a full one", _link_to_full, "exists and is not an empty directory; name another"),
    ("link to nothing", _dangling, "exists and is not an empty directory; name another"),
    ("no name", lambda folder: folder / "..", "is no name of a directory to be made; give it one"),
    ("below a file", _below_a_file, "cannot be written"),
    ("in /proc", lambda folder: Path("/proc/gentrain/out"), "cannot be written"),
]


@pytest.mark.parametrize("place, message", [row[1:] for row in PLACES], ids=[row[0] for row in PLACES])
def test_an_export_destroys_nothing(tmp_path: Path, place: Callable[[Path], Path], message: str) -> None:
    torch.manual_seed(0)
    network = UNet(channels=(8, 8), norm_groups=4, attention=()).build((1, 8, 8), 3)
    denoiser = Denoiser(network.eval(), RectifiedFlow(), "velocity")
    out = place(tmp_path)
    with contained(tmp_path), pytest.raises(OSError) as caught:
        export(out, denoiser, Euler(steps=2), class_names="abc", licence="", config={})
    assert message in str(caught.value) and str(out) in str(caught.value)


def test_a_place_that_is_taken_is_told_before_a_network_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
        Export(run=str(tmp_path / "no run")).write(_not_empty(tmp_path))


def test_names_cannot_write_the_card(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet(channels=(8, 8), norm_groups=4, attention=()).build((1, 8, 8), 2)
    names = ['x"]); import os; os.system("touch pwned"); print(["', "<script>alert(1)</script>\n# Heading\n|a|"]
    metric = {"name": "a|b\nc", "value": 1.0, "low": 0.0, "high": 2.0, "better": "lower", "definition": "|x| < 1\n\n# Heading"}
    arguments = {"class_names": names, "licence": "", "config": {}, "metrics": [metric]}
    export(tmp_path / "out", Denoiser(network.eval(), RectifiedFlow(), "velocity"), Euler(steps=2), **arguments)  # type: ignore[arg-type]
    card = (tmp_path / "out" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| a")]
    assert row == "| a\\|b c | 1 | 0 to 2 | lower | \\|x\\| &lt; 1 # Heading |"
    assert "<script>" not in card and "\n# Heading" not in card
    (call,) = [line for line in card.splitlines() if "class_labels=" in line]
    called: list[list[str]] = []
    exec(call.replace(".images[0]", ""), {"pipeline": lambda class_labels: called.append(class_labels)})
    assert called == [[names[0]]]


# --- images -----------------------------------------------------------------------------------------------------------------------


def _png(path: Path, mode: str = "RGB", **options: object) -> None:
    Image.new(mode, (9, 9)).save(path, **options)  # type: ignore[arg-type]


def _large(path: Path) -> None:
    _png(path)
    os.truncate(path, 300_000_000)


def _exif(path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0" + struct.pack("<I", 2**31) + b"\xff" * 50)
    path.write_bytes(buffer.getvalue())


def _after(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


IMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("link to a secret", _after(lambda path: path.symlink_to(path.parent.parent / "secret.png")), "Too many levels of symbolic links"),
    ("pipe", _after(os.mkfifo), "not a regular file"),
    ("folder", _after(os.mkdir), "Is a directory"),
    ("300 MB", _large, "300,000,000 bytes are more than 216,777,216"),
    ("gone", Path.unlink, "No such file"),
    ("32 bits a pixel", lambda path: Image.new("I", (9, 9)).save(path, "TIFF"), "more than 8 bits"),
    ("floats", lambda path: Image.fromarray(np.zeros((9, 9), np.float32)).save(path, "TIFF"), "more than 8 bits"),
    ("EXIF that points nowhere", lambda path: _exif(path.with_suffix(".png")), ""),
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("change, message", [row[1:] for row in IMAGES], ids=[row[0] for row in IMAGES])
def test_an_image_that_changes_after_the_folder_was_read(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    (tmp_path / "a").mkdir()
    _png(tmp_path / "secret.png")
    _png(tmp_path / "a" / "1.png")
    items = ImageFolder(str(tmp_path), held_out=0, size=8).split("train")
    change(tmp_path / "a" / "1.png")
    with contained(tmp_path):
        if message:
            with pytest.raises(CorruptItem, match=r"a/1\.png: ") as caught:
                items[0]
            assert message in str(caught.value)
        else:
            assert items[0]["x"].isfinite().all()


def test_names_of_images_reach_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "\x1b]0;owned\x07.png").write_bytes(b"")
    with pytest.raises(CorruptItem) as caught:
        ImageFolder(str(tmp_path), held_out=0).split("train")[0]
    assert "\x1b" not in str(caught.value) and "\\x1b]0;owned" in str(caught.value)
    for name in (b"\x1b[2J", b"\xff\xfe"):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        _png(Path(os.fsdecode(folder)) / "1.png")
        with pytest.raises(ValueError, match="cannot be printed; rename it"):
            _ = ImageFolder(str(tmp_path)).class_names
        shutil.rmtree(folder)


# --- reports ----------------------------------------------------------------------------------------------------------------------


def _lines(*lines: str) -> Callable[[Path], None]:
    return lambda folder: write_metrics(folder, report_rows(3), "\n".join(lines))  # type: ignore[return-value]


def _outside(folder: Path) -> None:
    (folder.parent / "outside").mkdir(exist_ok=True)
    (folder.parent / "outside" / "config.yaml").write_text("secret: 1\n")
    (folder.parent / "outside" / "secret.png").write_bytes(b"secret" * 100)
    (folder / STAGES).write_text(json.dumps({"../outside": STATE_OF_A}))
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(folder.parent / "outside" / "config.yaml")
    (folder / "samples").mkdir()
    (folder / "samples" / "1.png").symlink_to(folder.parent / "outside" / "secret.png")


def _big_pictures(folder: Path) -> None:
    (folder / "samples").mkdir()
    with (folder / "samples" / "1.png").open("wb") as file:
        file.truncate(2**33)


REPORTS: list[tuple[str, Callable[[Path], object]]] = [
    ("numbers that are none", _lines('{"samples": NaN}', '{"samples": Infinity, "loss/a": 1}', '{"samples": 1e400}', '{"samples": "a"}')),
    ("numbers of 400 digits", _lines(f'{{"samples": 192, "loss/a": {"9" * 400}}}', f'{{"samples": {"9" * 400}}}')),
    ("numbers of 5,000 digits", _lines(f'{{"samples": 192, "loss/a": {"9" * 5000}}}')),
    ("huge and tiny", _lines('{"samples": 192, "loss/a": 1e308}', '{"samples": 256, "loss/a": -1e308, "lr/b": 5e-324}')),
    ("deep lines", _lines("[" * 100_000, '{"samples": ' + "[" * 100_000)),
    ("lines that are no mappings", _lines("3", "null", "[]", '"x"', "\x00\x01")),
    ("200,000 lines", lambda folder: write_metrics(folder, report_rows(200_000))),
    ("seconds of any kind", lambda folder: (folder / STAGES).write_text(json.dumps({
        name: {"seconds": value} for name, value in {"a": "x", "b": -1, "c": 1e400, "d": None, "e": [1], "f": float("nan")}.items()}))),
    ("states of any kind", lambda folder: (folder / STAGES).write_text('{"a": 3, "b": null, "c": [], "d": {"status": [], "kind": {}}}')),
    ("tables of any kind", lambda folder: (folder / "metrics.json").write_text(
        '{"metrics": [3, {}, {"name": [], "value": "x", "low": {}, "high": 1e999}], "settings": [[[[1]]]]}')),
    ("a table that is a number", lambda folder: (folder / "metrics.json").write_text('{"metrics": 5}')),
    ("deep JSON", lambda folder: (folder / "info.json").write_text('{"a":' * 900 + "1" + "}" * 900)),
    ("deeper JSON", lambda folder: (folder / "info.json").write_text("[" * 100_000)),
    ("environment of any kind", lambda folder: (folder / "environment.json").write_text('{"a": [1, {"b": 2}], "<nasty>": null}')),
    ("deep configuration", lambda folder: (folder / "config.yaml").write_text("a: " + "[" * 5_000)),
    ("configuration with a billion laughs", lambda folder: (folder / "config.yaml").write_text(
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)))),
    ("configuration of numbers", lambda folder: (folder / "config.yaml").write_text(f"method: {'9' * 5000}\n")),
    ("configuration in bytes", lambda folder: (folder / "config.yaml").write_bytes(bytes(range(256)))),
    ("what lies outside", _outside),
    ("pictures of 8 GiB", _big_pictures),
]  # fmt: skip


@pytest.mark.parametrize("make", [row[1] for row in REPORTS], ids=[row[0] for row in REPORTS])
def test_a_hostile_run_has_a_report_all_the_same(tmp_path: Path, make: Callable[[Path], object]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: diffusion\n")
    make(folder)
    (folder / "report.html").write_text("")
    before = (folder / "report.html").stat().st_mode
    with contained(folder / "nothing"):
        page = write_report(folder)
    text = page.read_text()
    assert text.endswith("</html>") and page.stat().st_mode == before
    assert "secret" not in text and "c2VjcmV0" not in text and "<nasty>" not in text
