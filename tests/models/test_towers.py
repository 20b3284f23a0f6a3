"""Pretrained towers: what transformers makes of the same images and texts, locked or learning, and back as a SigLIP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gentrain.config import ConfigError, Document
from gentrain.export_towers import export_towers
from gentrain.methods.contrastive import sigmoid_contrastive_loss
from gentrain.models.image_text import resize
from gentrain.models.text import minilm
from gentrain.models.towers import Locked, Towers, TwoTowers, locked_side, unpack
from gentrain.noise import Noise
from gentrain.recipes.export import Export
from gentrain.recipes.retrieval import embed_held_out, retrieval
from gentrain.training.loop import Outcome, train
from gentrain.training.optimizers import AdamW
from gentrain.training.run import RunConfig, parse_run, save_config
from gentrain.training.world import World
from tests.methods.captioned import CaptionedPatches
from tests.models import readers

SHAPE = (3, 6, 6)
TEXTS = ["red upper left", "a"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kinds = {"clip": readers.clip, "siglip": readers.siglip, "vit": readers.vit, "bert": readers.bert}
    return {name: str(write(tmp_path_factory.mktemp(name))) for name, write in kinds.items()}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def as_wanted(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(value)[:, None, None] for value in (readers.MEAN, readers.STD))
    return (resize((x + 1) / 2, readers.SIDE).clamp(0, 1) - mean) / std


def tokenized(directory: str, **padding: Any) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)(TEXTS, truncation=True, max_length=readers.WORDS, return_tensors="pt", **padding)


def built(**settings: Any) -> tuple[Towers, TwoTowers]:
    torch.manual_seed(5)
    model = Towers(**settings)
    return model, model.build(SHAPE, 0).eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_sides_of_one_model_are_what_transformers_makes_of_them(places: dict[str, str], kind: str) -> None:
    from transformers import AutoModel

    model, towers = built(image=places[kind], text=places[kind])
    whole = AutoModel.from_pretrained(places[kind])
    tokens = tokenized(places[kind], padding="max_length" if kind == "siglip" else True)
    if kind == "siglip":
        tokens.pop("attention_mask", None)
    with torch.no_grad():
        found = unpack(towers(images(), model.read(TEXTS)))
        torch.testing.assert_close(found.image, whole.get_image_features(pixel_values=as_wanted(images())).pooler_output)
        torch.testing.assert_close(found.text, whole.get_text_features(**tokens).pooler_output)
    assert found.image.shape == (2, {"clip": 12, "siglip": 16}[kind])


def test_a_vision_transformer_and_a_text_encoder(places: dict[str, str]) -> None:
    from transformers import AutoModel

    model, towers = built(image=places["vit"], text=places["bert"], width=24)
    with torch.no_grad():
        found = unpack(towers(images(), model.read(TEXTS)))
        states = AutoModel.from_pretrained(places["vit"])(pixel_values=as_wanted(images())).last_hidden_state
        torch.testing.assert_close(found.image, states[:, 0] @ towers.image[1].weight.T)
        encoder = AutoModel.from_pretrained(places["bert"])
        tokens = tokenized(places["bert"], padding=True)
        assert 0 in tokens["attention_mask"][1]
        for row, length in enumerate(tokens["attention_mask"].sum(1).tolist()):  # each alone, without what fills up
            alone = encoder(input_ids=tokens["input_ids"][row : row + 1, :length]).last_hidden_state.mean(1)
            torch.testing.assert_close(found.text[row : row + 1], alone)


def test_widths_follow_the_locked_side_or_a_pretrained_one(places: dict[str, str]) -> None:
    assert Towers().entries == 128 and Towers(width=7).entries == 7
    assert Towers(image=places["vit"], text=places["bert"]).entries == 16
    assert Towers(text=places["bert"]).entries == 24
    assert Towers(image=places["vit"], text=places["bert"], lock="text").entries == 24
    assert Towers(text="minilm").entries == 384


def test_a_locked_side_is_not_trained_and_the_other_is_as_if_nothing_were_locked(places: dict[str, str]) -> None:
    both = {"image": places["siglip"], "text": places["siglip"]}
    free_model, free = built(**both)
    expected = sigmoid_contrastive_loss(*unpack(free(images(), free_model.read(TEXTS))))
    expected.backward()
    wanted = {name: p.grad for name, p in free.named_parameters()}
    for side, other in (("image", "text"), ("text", "image")):
        model, towers = built(**both, lock=side)
        assert {name for name in free.state_dict() if not name.startswith(side)} == set(towers.state_dict())
        read = model.read(TEXTS)
        assert (read.dtype == torch.float32) == (side == "text") and not read.requires_grad
        value = sigmoid_contrastive_loss(*unpack(towers(images(), read)))
        value.backward()
        torch.testing.assert_close(value, expected)
        for name, p in towers.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], msg=name)
        assert any(name.startswith(other) for name, _ in towers.named_parameters())


def test_gradients_reach_images_through_a_locked_tower(places: dict[str, str]) -> None:
    model, towers = built(image=places["vit"], lock="image")
    x = images().requires_grad_()
    found = unpack(towers(x, model.read(TEXTS)))
    assert torch.autograd.grad(cosine_similarity(found.image, found.text.detach()).sum(), x)[0].abs().max() > 0
    assert isinstance(towers.image, Locked) and not towers.train().image.network.training


def test_pretrained_weights_do_not_decay(places: dict[str, str]) -> None:
    _, towers = built(image=places["vit"], text=places["bert"], width=24)
    names = {id(p): name for name, p in towers.named_parameters()}
    decaying = {names[id(p)] for p in AdamW(weight_decay=0.1).build(towers.parameters()).param_groups[0]["params"]}
    assert decaying == {"image.1.weight"}  # the projection, which is new
    assert sum(map(len, (group["params"] for group in AdamW(weight_decay=0.1).build(towers.parameters()).param_groups))) == len(names)


def test_the_temperature_begins_where_it_is_set(places: dict[str, str]) -> None:
    model, towers = built(image=places["siglip"], text=places["siglip"], initial_scale=4.7, initial_bias=-12.9)
    found = unpack(towers(images(), model.read(TEXTS)))
    assert (round(found.logit_scale.item(), 4), round(found.logit_bias.item(), 4)) == (4.7, -12.9)


def test_the_packaged_encoder_reads_words() -> None:
    model = Towers(text="minilm", lock="text")
    read = model.read(["kitten", "a cat", "ruler"])
    tokenizer, encoder = minilm(16)
    tokens = tokenizer(["a cat"], return_tensors="pt")
    torch.testing.assert_close(read[1], encoder(**tokens).last_hidden_state[0].mean(0))
    near, far = cosine_similarity(read[0], read[1], dim=0), cosine_similarity(read[2], read[1], dim=0)
    assert near > far + 0.2


def test_a_half_without_some_weights_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(places["vit"], tmp_path / "vit")
    state = load_file(tmp_path / "vit/model.safetensors")
    lost = next(name for name in state if "query.weight" in name or "q_proj.weight" in name)
    save_file({name: value for name, value in state.items() if name != lost}, tmp_path / "vit/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*0\.attention.*weight, which would be random"):
        Towers(image=str(tmp_path / "vit")).build(SHAPE, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lock": "text"}, "a tower from scratch cannot be locked; name its weights: model.text"),
        ({"image": "minilm"}, "minilm reads texts"),
        ({"image": "bert"}, "holds a bert, which does not read images; name a CLIP, a SigLIP, or a vision transformer"),
        ({"text": "vit"}, "holds a vit, which does not read texts"),
        ({"text": "bert", "lock": "text", "width": 7}, "embeddings have 24 entries, not 7; set it to null"),
        ({"image": "nowhere/at-all"}, r"is no directory, and config.json of that repository cannot be had"),
    ],
)
def test_what_does_not_fit_is_refused(places: dict[str, str], settings: dict[str, Any], message: str) -> None:
    named = {key: places.get(value, value) for key, value in settings.items()}
    with pytest.raises((ConfigError, ValueError), match=message):
        Towers(**named).build(SHAPE, 0)


def parsed(output: Path, **model: Any) -> RunConfig:
    settings = {
        "method": {"name": "contrastive", "shift": 0},
        "data": CaptionedPatches.registered_name,
        "model": {"name": "towers", "initial_bias": -3.3, **model},
        "optimizer": {"name": "adamw", "lr": 0.01, "beta2": 0.95, "weight_decay": 0.1},
        "engine": "torch",
        "training": {"samples": 640, "batch_size": 32, "log_every": 32},
        "output": str(output),
    }
    return parse_run(Document(settings, "test"))


def trained(run: RunConfig) -> None:
    save_config(run)
    assert train(run, World(0, 1, torch.device("cpu")), lambda: False) is Outcome.FINISHED


def test_images_learn_to_meet_the_packaged_encoder(tmp_path: Path) -> None:
    trained(parsed(tmp_path / "run", text="minilm", lock="text", channels=[8]))
    # over seeds 0, 1, 2: recall @1 is 0.88 at least; chance is 1 / 8
    assert [metric.value > 0.6 for metric in retrieval(*embed_held_out(str(tmp_path / "run")))[:2]] == [True, True]


def test_a_trained_siglip_goes_back_to_transformers(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel, AutoTokenizer

    def raised(out: Path, towers: TwoTowers, *rest: Any, **more: Any) -> Path:
        with torch.no_grad():
            towers.logit_scale.fill_(5.0)  # beyond what the loss takes of it, as training may leave it
        return export_towers(out, towers, *rest, **more)

    monkeypatch.setattr("gentrain.recipes.export.export_towers", raised)
    run = parsed(tmp_path / "run", image=places["siglip"], text=places["siglip"], lock="image", initial_scale=4.0)
    trained(run)
    out = Export(run=str(tmp_path / "run")).write(tmp_path / "out")
    whole = AutoModel.from_pretrained(out)
    image, text, caption = embed_held_out(str(tmp_path / "run"))
    tokens = AutoTokenizer.from_pretrained(out)(list(run.data.captions), padding="max_length", return_tensors="pt", truncation=True)
    with torch.no_grad():
        held_out = run.data.split("held_out").batch(torch.arange(len(image)))  # type: ignore[attr-defined]
        row = [held_out["caption"].tolist().index(place) for place in caption.tolist()]
        found = whole(pixel_values=as_wanted(held_out["x"][row]), input_ids=tokens["input_ids"])
    torch.testing.assert_close(found.logits_per_image, 100 * image @ text.T + whole.logit_bias, rtol=1e-4, atol=1e-3)
    assert whole.logit_bias.item() != -3.3 and "SigLIP" in (out / "README.md").read_text()
    before = AutoModel.from_pretrained(places["siglip"]).state_dict()
    moved = {name.partition(".")[0] for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"text_model", "logit_scale", "logit_bias"}


@pytest.mark.parametrize(
    ("model", "message"),
    [({}, "the image tower is no SigLIP's"), ({"image": "siglip", "text": "siglip", "width": 8}, "projection from 16 to 8 entries")],
)
def test_towers_that_are_no_siglip_are_not_exported(places: dict[str, str], tmp_path: Path, model: dict[str, Any], message: str) -> None:
    run = parsed(tmp_path / "run", channels=[8], **{key: places.get(value, value) for key, value in model.items()})
    run.training.samples = 32
    trained(run)
    with pytest.raises(ValueError, match=message):
        Export(run=str(tmp_path / "run")).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_reads_captions_once_and_plans_without_weights(tmp_path: Path) -> None:
    codec = parsed(tmp_path / "run", text="minilm", lock="text", channels=[8]).codec()
    batch = {"x": images(), "caption": torch.tensor([3, 1])}
    encoded, shaped = codec.encode(batch, Noise(0, torch.arange(2))), codec.shaped(batch)
    assert encoded["tokens"].shape == shaped["tokens"].shape and encoded["tokens"].dtype == shaped["tokens"].dtype
    assert locked_side(encoded) == locked_side(shaped) == "text" and locked_side(batch) is None
    assert encoded["tokens"][0].equal(codec.tokens[3])  # type: ignore[attr-defined]
