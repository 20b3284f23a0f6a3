"""What a person is told about a run or a recipe that cannot be: the file, the key and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from gentrain.config import COMMAND_LINE, ConfigError, register
from gentrain.recipes.base import load_recipe
from gentrain.training.optimizers import Optimizer
from gentrain.training.roles import Roles, count_parameters
from gentrain.training.run import RunConfig, load_run
from gentrain.training.world import World

RUN = "method: flow_matching\ndata: rings\nmodel: mlp\nengine: torch\ntraining: {samples: 64, batch_size: 16}\n"
IMAGES = RUN.replace("rings", "digits")
SHARDED = RUN.replace("torch", "{name: deepspeed, zero_stage: 1}")
MAIN, LINE = "main.yaml", COMMAND_LINE


@register("test_mistakes_matrices")
@dataclass
class _Matrices(Optimizer):
    needs = "matrix"
    lr: float = 0.1

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr)


# what, text of main.yaml, override (or None), file that is named, key, what the message says
MISTAKES = [
    # names
    ("top level", RUN + "trainning: {}\n", None, MAIN, "trainning", "unknown key; did you mean 'training'?"),
    ("training", RUN, "training.sampels=3", LINE, "training.sampels", "did you mean 'samples'?"),
    ("method", RUN, "method.label_droput=0", LINE, "method.label_droput", "did you mean 'label_dropout'?"),
    ("time law", RUN, "method.times={name: logit_normal, men: 0}", LINE, "method.times.men", "did you mean 'mean'?"),
    ("model", RUN, "model.widht=3", LINE, "model.widht", "did you mean 'width'?"),
    ("cluster", RUN + "cluster: {worker: 2}\n", None, MAIN, "cluster.worker", "did you mean 'workers'?"),
    ("engine", RUN, "engine.precison=bf16", LINE, "engine.precison", "did you mean 'precision'?"),
    ("optimizer", RUN, "optimizer={name: adamw, learning_rate: 1}", LINE, "optimizer.learning_rate", "valid keys: lr, beta1"),
    ("role", RUN, "roles.model.optimiser=sgd", LINE, "roles.model.optimiser", "did you mean 'optimizer'?"),
    ("an average that stays", RUN, "optimizer={name: adamw, beta1: 1}", LINE, "optimizer.beta1", "expected a number >= 0 and < 1, got 1"),
    # components
    ("no such method", RUN, "method=flow_maching", LINE, "method.name", "'flow_maching'; did you mean 'flow_matching'?"),
    ("no such path", RUN, "path=rectifed_flow", LINE, "path.name", "did you mean 'rectified_flow'?"),
    ("no such sampler", RUN, "sampler=euller", LINE, "sampler.name", "did you mean 'euler'?"),
    ("another sampler", RUN + "sampler: {name: heun}\n", "sampler=euller", LINE, "sampler.name", "did you mean 'euler'?"),
    ("no such model", RUN, "model=mpl", LINE, "model.name", "did you mean 'mlp'?"),
    ("no such data", RUN, "data=mnist", LINE, "data.name", "did you mean 'mnist5k'?"),
    ("no such optimizer", RUN, "optimizer=adamww", LINE, "optimizer.name", "did you mean 'adamw'?"),
    ("no such engine", RUN, "engine=deepsped", LINE, "engine.name", "did you mean 'deepspeed'?"),
    ("no such schedule", RUN, "schedule=cosin", LINE, "schedule.name", "did you mean 'cosine'?"),
    ("no such time law", RUN, "method.times=lognormal", LINE, "method.times.name", "did you mean 'log_normal'?"),
    ("no name", RUN, "roles.model.optimizer.lr=1", LINE, "roles.model.optimizer", "`name` is missing; available optimizers: "),
    # missing and null
    ("empty file", "", None, MAIN, "method", "a value is required: a method"),
    ("no training", RUN.partition("training")[0], None, MAIN, "training", "a value is required: a mapping"),
    ("no samples", RUN.replace("samples: 64, ", ""), None, MAIN, "training.samples", "a value is required: a whole number > 0"),
    ("no folder", RUN, "data=image_folder", LINE, "data.path", "a value is required: text"),
    ("null number", RUN, "training.samples=null", LINE, "training.samples", "expected a whole number > 0, got None"),
    ("null component", RUN, "path=null", LINE, "path", "expected the name of a path or a mapping with `name`, got None"),
    ("null mapping", RUN.partition("{samples")[0] + "\n", None, MAIN, "training", "expected a mapping, got None"),
    # types and ranges
    ("text for a number", RUN, "training.samples=many", LINE, "training.samples", "expected a whole number > 0, got 'many'"),
    ("bool for a number", RUN, "seed=true", LINE, "seed", "expected a whole number >= 0, got True"),
    ("fraction for a count", RUN, "seed=1.5", LINE, "seed", "expected a whole number >= 0, got 1.5"),
    ("list for a mapping", RUN, "training=[1]", LINE, "training", "expected a mapping, got [1]"),
    ("text for a mapping", RUN, "cluster=ray", LINE, "cluster", "expected a mapping, got 'ray'"),
    ("list for the roles", RUN, "roles=[model]", LINE, "roles", "expected a mapping, got ['model']"),
    ("negative", RUN, "seed=-1", LINE, "seed", "expected a whole number >= 0, got -1"),
    ("zero", RUN, "training.batch_size=0", LINE, "training.batch_size", "expected a whole number > 0, got 0"),
    ("lr of zero", RUN, "optimizer={name: adamw, lr: 0}", LINE, "optimizer.lr", "expected a number > 0, got 0"),
    ("above one", RUN, "method.label_dropout=1.5", LINE, "method.label_dropout", "expected a number >= 0 and <= 1, got 1.5"),
    ("no such choice", RUN, "prediction=x1", LINE, "prediction", "expected one of x0, eps, v, velocity, edm, got 'x1'"),
    ("no such place", RUN, "cluster.place=slurm", LINE, "cluster.place", "expected one of inline, ray, got 'slurm'"),
    ("no such stage", SHARDED, "engine.zero_stage=4", LINE, "engine.zero_stage", "expected one of 0, 1, 2, 3, got 4"),
    # what does not go together
    ("share", RUN + "cluster: {place: ray, workers: 3}\n", "training.micro_batches=2", MAIN, "training.batch_size", "batches; 12 can"),
    ("bf16", SHARDED, "engine={name: deepspeed, zero_stage: 0, precision: bf16}", LINE, "engine.zero_stage", "needs zero_stage 1"),
    ("its batch", SHARDED, "engine.settings.train_batch_size=3", LINE, "engine.settings.train_batch_size", "set training.batch_size"),
    ("DeepSpeed's precision", SHARDED, "engine.settings.fp16.enabled=true", LINE, "engine.settings.fp16", "set engine.precision"),
    ("optimizer and shards", SHARDED, "optimizer=test_mistakes_matrices", LINE, "optimizer", "set engine.zero_stage to 0, engine to torch"),
    ("no such role", RUN, "roles.teacher.weights=a", LINE, "roles.teacher", "flow_matching has no role 'teacher'; its roles: model"),
    ("placing what learns", RUN, "roles.model.placement=sharded", LINE, "roles.model.placement", "set roles.model.engine.zero_stage"),
    # YAML and composition
    ("tab", RUN + "cluster:\n\tworkers: 2\n", None, MAIN, "", "not valid YAML in line 7: found character"),
    ("key twice", RUN + "model: mlp\n", None, MAIN, "", "not valid YAML in line 6: found duplicate key model"),
    ("open bracket", RUN + "plugins: [a\n", None, MAIN, "", "not valid YAML in line 7"),
    ("list", "- method\n", None, MAIN, "", "the top level must be a mapping"),
    ("no such base", "base: pieces/model.yaml\n" + RUN, None, "model.yaml", "", "no such file (named in `base:` of"),
    ("circle of bases", "base: other.yaml\n", None, MAIN, "base", "includes itself through `base:`"),
    ("no such key", RUN + "output: ${training.sampels}\n", None, MAIN, "output", "Interpolation key 'training.sampels' not found"),
    ("half an interpolation", RUN + "output: ${\n", None, MAIN, "output", "cannot read the interpolation in '${'; there are ${key}"),
    ("output of no recipe", RUN + "output: ${output:judge}\n", None, MAIN, "output", "stages: none, this is no recipe"),
    ("override without value", RUN, "training.samples", LINE, "", "write it as key=value"),
    # plugins
    ("no such plugin", RUN + "plugins: [nowhere.py]\n", None, MAIN, "plugins[0]", "'nowhere.py' failed to import: FileNotFoundError"),
    ("no such module", RUN + "plugins: [no_such_module]\n", None, MAIN, "plugins[0]", "No module named 'no_such_module'"),
    ("plugin that raises", RUN + "plugins: [raises.py]\n", None, MAIN, "plugins[0]", "failed to import: ZeroDivisionError"),
    ("plugin that exits", RUN + "plugins: [exits.py]\n", None, MAIN, "plugins[0]", "failed to import: SystemExit: 3"),
    ("plugins as text", RUN + "plugins: raises.py\n", None, MAIN, "plugins", "expected a list of .py files or module names"),
]  # fmt: skip


def _write(folder: Path, text: str) -> Path:
    (folder / "other.yaml").write_text("base: main.yaml\n")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / MAIN).write_text(text)
    return folder / MAIN


def _check(error: ConfigError, file: str, key: str, message: str) -> None:
    assert (Path(error.source or "").name, error.key) == (file, key), str(error)
    assert message in error.message
    assert str(error).startswith(f"{error.source}: {key}: " if key else f"{error.source}: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize("text, override, file, key, message", [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistaken_run_is_told_with_file_key_and_remedy(
    tmp_path: Path, text: str, override: str | None, file: str, key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(_write(tmp_path, text), [override] if override else [])
    _check(caught.value, file, key, message)


def test_the_run_that_the_mistakes_are_made_in_is_right(tmp_path: Path) -> None:
    for text in (RUN, IMAGES, SHARDED):
        assert isinstance(load_run(_write(tmp_path, text)), RunConfig)


TRAIN = f"{{name: train, run: {{{', '.join(RUN.splitlines())}}}}}"
START = f"stages:\n  a: {TRAIN}\n"
DRAW = "{name: generate, run: '${output:a}'}"

# what, text of main.yaml, key, what the message says
RECIPES = [
    ("a run", RUN, "method", "this is a run, not a recipe; train it with: gentrain train "),
    ("top level", START + "otput: x\n", "otput", "did you mean 'output'?"),
    ("no stages", "output: x\n", "stages", "a value is required"),
    ("empty stages", "stages: {}\n", "stages", "a recipe needs at least one stage"),
    ("stages as a list", "stages: [a]\n", "stages", "expected a mapping, got ['a']"),
    ("no such kind", START + "  b: {name: genrate, run: x}\n", "stages.b.name", "no stage is called 'genrate'; did you mean 'generate'?"),
    ("no kind", START + "  b: {run: x}\n", "stages.b", "`name` is missing; available stages: "),
    ("a stage's key", START + "  b: {name: generate, rum: x}\n", "stages.b.rum", "did you mean 'run'?"),
    ("a run's key", START.replace("data", "dota"), "stages.a.run.dota", "did you mean 'data'?"),
    ("a run's number", START.replace("64", "1.5"), "stages.a.run.training.samples", "expected a whole number > 0, got 1.5"),
    ("a run's batch", START.replace("size: 16", "size: 5, micro_batches: 2"), "stages.a.run.training.batch_size", "4 can"),
    ("output of nothing", START + "  b: {name: generate, run: '${output:c}'}\n", "stages.b.run", "no stage is called 'c'; stages: a, b"),
    ("later stage", f"stages:\n  b: {DRAW}\n  a: {TRAIN}\n", "stages.b", "the output of 'a', which comes later; put 'a' first"),
    ("inside a later stage", f"stages:\n  b: {DRAW.replace('a}', 'a}/x')}\n  a: {TRAIN}\n", "stages.b", "put 'a' first"),
    ("itself", START + "  b: {name: generate, run: '${output:b}'}\n", "stages.b", "it reads its own output"),
    ("a name with a space", START + f"  'b c': {DRAW}\n", "stages.b c", "a stage's name becomes a directory: letters, digits, - and _"),
    ("a name that climbs", START + f"  '..': {DRAW}\n", "stages...", "a stage's name becomes a directory"),
    ("a name with a dot", START + f"  report.html: {DRAW}\n", "stages.report.html", "a stage's name becomes a directory"),
    ("a number as a name", START + f"  3: {DRAW}\n", "stages", "keys must be text, got 3"),
    ("nothing to compare with", START + "  b: {name: evaluate, samples: {x: y}}\n", "stages.b.data", "without a judge `data` is needed"),
    ("nothing to compare", START + "  b: {name: evaluate, samples: {}, data: rings}\n", "stages.b.samples", "expected at least one"),
    ("no classes", START + f"  b: {DRAW[:-1]}, labels: []}}\n", "stages.b.labels", "null draws all of them"),
    ("a run's plugin", START.replace("{method", "{plugins: [nowhere.py], method"), "stages.a.run.plugins[0]", "failed to import"),
]  # fmt: skip


@pytest.mark.parametrize("text, key, message", [row[1:] for row in RECIPES], ids=[row[0] for row in RECIPES])
def test_a_mistaken_recipe_is_told_with_file_key_and_remedy(tmp_path: Path, text: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(_write(tmp_path, text))
    _check(caught.value, MAIN, key, message)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick.yaml").write_text(RUN)
    (tmp_path / "latin.yaml").write_bytes("output: é\n".encode("latin-1"))
    for name, message in [
        ("quik.yaml", r"quik\.yaml: no such file; did you mean .*/quick\.yaml\?"),
        ("latin.yaml", r"latin\.yaml: cannot read it as a mapping .*: 'utf-8' codec"),
        (".", "cannot read it as a mapping of keys to values: it is not a regular file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_run(tmp_path / name)

    def refuse(path: Path, mode: str) -> None:  # by hand: nothing is forbidden to root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"quick\.yaml: cannot read it .*Permission denied"):
        load_run(tmp_path / "quick.yaml")


# what only the networks and the data themselves can tell: override, key, message
MISFITS = [
    ("data={name: image_folder, path: /nowhere}", "data", "no such folder: /nowhere"),
    ("model={name: unet, channels: [8, 8, 8, 8, 8], attention: []}", "model", "images of 8x8 pixels are not divisible by 16"),
    ("model=mlp", "model", "mlp is for vectors (D,), got samples of shape (1, 8, 8); use unet or dit for images"),
    ("roles={model: {model: {name: unet, space_to_depth: 3}}}", "roles.model.model", "not divisible by 6"),
]


@pytest.mark.parametrize("override, key, message", MISFITS, ids=[row[1] for row in MISFITS])
def test_a_network_that_does_not_fit_the_data(tmp_path: Path, override: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_parameters(load_run(_write(tmp_path, IMAGES), [override]), "model")
    _check(caught.value, "main", key, message)  # the run's name: one may come from a recipe or from nothing but Python


@pytest.mark.parametrize(
    "overrides, role, message",
    [
        (["method=classifier"], "classifier", "a network that classifies is needed, and mlp does not; there are: cnn"),
        (["data=digits", "model=cnn"], "model", "a network that denoises is needed, and cnn does not; there are: autoencoder_kl, "),
    ],
)
def test_a_network_of_the_other_kind(tmp_path: Path, overrides: list[str], role: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count_parameters(load_run(_write(tmp_path, RUN), overrides), role)
    _check(caught.value, "main", "model", message)


def test_first_weights_that_are_not_there(tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    run = load_run(_write(tmp_path, RUN), [f"roles.model.weights={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError, match=r"roles\.model\.weights: .*nowhere is not a run's directory: it has no config\.yaml"):
        Roles(run, world)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match=r"roles\.model\.weights: .*nowhere has no checkpoint yet; train it first"):
        Roles(run, world)
