"""A data set that was encoded once: latents, and what text encoders made of its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NotRequired, TypeVar

import torch
from pydantic import PositiveInt, StringConstraints, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import TypedDict

from gentrain.config import ConfigError, option, register
from gentrain.data.base import Data, EmptySplit, check_split

MANIFEST = "manifest.json"
MEAN, DEVIATION = "x", "deviation"  # of the latents' posterior
TEXTS = "texts"  # begins the names of files that hold them, as a split's name does of its own


class Shard(TypedDict):
    """One file of `rows` rows."""

    file: Annotated[str, StringConstraints(pattern=r"^[\w-]+\.safetensors$")]
    rows: PositiveInt
    sha256: str


class Manifest(TypedDict):
    """What the stage `encode` has written. `encoder`: digest of what encoded. `shapes`: `shape` and others, where there are."""

    encoder: str
    shape: list[PositiveInt]
    shapes: NotRequired[list[list[PositiveInt]]]
    class_names: list[str]
    captions: list[str]
    weighted: bool
    licence: str
    data: dict[str, Any]
    splits: dict[str, list[Shard]]
    texts: list[Shard]


M = TypeVar("M", bound=Mapping[str, Any])


class Written(Generic[M]):
    """Data that an earlier stage wrote into a directory: a manifest, and files that it names by their digests.

    Attributes:
        schema: of the manifest. stage: which writes it. things: what samples are, in words.
    """

    schema: ClassVar[TypeAdapter[Any]]
    stage: ClassVar[str]
    things: ClassVar[str]

    directory: str
    digest: str | None

    @cached_property
    def manifest(self) -> M:
        path = Path(self.directory) / MANIFEST
        try:
            found: M = self.schema.validate_json(path.read_bytes())
            return found
        except (OSError, ValueError) as error:
            what = " ".join(str(error).partition("For further")[0].split())[:200]
            raise ConfigError(
                f"{path} cannot be read ({what}); make {self.things} with a stage `{self.stage}`", key="data.directory"
            ) from error

    @property
    def to_come(self) -> bool:
        return not Path(self.directory, MANIFEST).exists()

    @property
    def class_names(self) -> Sequence[str]:
        names: list[str] = self.manifest["class_names"]
        return names

    @property
    def licence(self) -> str:
        return str(self.manifest["licence"])

    def fit(self) -> None:
        self.directory = str(Path(self.directory).absolute())
        found = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()
        if self.digest not in (None, found):
            raise ValueError(
                f"the {self.things} in {self.directory} are not those that the run began with; restore them, or begin another run"
            )
        self.digest = found


@register("latents")
@dataclass
class Latents(Written[Manifest], Data):
    """What a stage `encode` has made of a data set, for the network of the same pipeline: its splits, latents in place of images.

    Each step draws from the posterior of each latent, as without the cache. Files stay on disk until their rows are read.
    """

    directory: str = option(help="of the stage `encode`")
    digest: str | None = option(None, "of what it wrote, which a run records: latents that are encoded anew are refused")

    schema: ClassVar[TypeAdapter[Any]] = TypeAdapter(Manifest)
    stage: ClassVar[str] = "encode"
    things: ClassVar[str] = "latents"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.manifest["shape"])

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [tuple(shape) for shape in self.manifest.get("shapes", [self.manifest["shape"]])]

    @property
    def captions(self) -> Sequence[str]:
        return self.manifest["captions"]

    @property
    def weighted(self) -> bool:
        return self.manifest["weighted"]

    def require(self, encoder: str) -> None:
        """Raises ValueError unless weights and templates of this digest encoded the data."""
        if self.manifest["encoder"] != encoder:
            raise ValueError(
                f"the latents in {self.directory} were encoded by another autoencoder, text encoder or template "
                f"({self.manifest['encoder'][:12]}) than the model's ({encoder[:12]}); run the stage `encode` with this model"
            )

    def split(self, name: str) -> LatentItems:
        check_split(name)
        if not self.manifest["splits"].get(name):
            raise EmptySplit(f"the latents in {self.directory} have no {name} split; encode data that have one")
        texts, shards = self._read(self.manifest["texts"]), self._read(self.manifest["splits"][name])
        place, names = ("caption", self.captions) if self.captions else ("label", self.class_names)
        fits = all(place in shard and tuple(shard[MEAN].shape[1:]) in self.shapes for shard in shards)
        if not fits or (texts and sum(len(next(iter(shard.values()))) for shard in texts) != len(names)):
            raise ValueError(f"{MANIFEST} in {self.directory} is not of the files beside it; move it away and run its stage `encode` again")
        items = LatentItems(shards, texts, place)
        if len(self.shapes) == 1 or name == "held_out":
            return items
        places = torch.tensor([self.shapes.index(tuple(shard[MEAN].shape[1:])) for shard in shards])
        return BucketedLatentItems(**vars(items), buckets=places.repeat_interleave(torch.tensor([len(shard[MEAN]) for shard in shards])))

    def _read(self, shards: Sequence[Shard]) -> list[dict[str, Tensor]]:
        return [read_shard(Path(self.directory), shard) for shard in shards]


def read_shard(directory: Path, shard: Shard) -> dict[str, Tensor]:
    """The tensors of a file, in memory when they are used. Raises ValueError when it is not what was written."""
    path, remedy = directory / shard["file"], f"move {directory} away and run its stage `encode` again"
    try:
        found = load_file(path)
        digest = file_digest(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}: {error}); {remedy}") from error
    if digest != shard["sha256"] or {len(value) for value in found.values()} != {shard["rows"]}:
        raise ValueError(f"{path} is not the file that was written; {remedy}")
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class LatentItems:
    """{"x": mean, "deviation": [C, H, W], "caption" or "label", "condition/...": what became of its text, "condition/null": False}.

    Args:
        shards: the rows, in order. texts: entries [names, ...] of the condition, in order. place: the entry of a row that says which.
    """

    shards: list[dict[str, Tensor]]
    texts: list[dict[str, Tensor]]
    place: str

    def __len__(self) -> int:
        return sum(len(shard[MEAN]) for shard in self.shards)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.batch(torch.tensor([index])).items()}

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        batch = _rows(self.shards, indices)
        if self.texts:
            named = batch[self.place]
            batch |= {f"condition/{key}": value for key, value in _rows(self.texts, named.clamp(min=0)).items()}
            batch["condition/null"] = named < 0
        return batch


def _rows(shards: Sequence[Mapping[str, Tensor]], indices: Tensor) -> dict[str, Tensor]:
    """These rows of all, in order: no others are read into memory."""
    ends = torch.tensor([len(next(iter(shard.values()))) for shard in shards]).cumsum(0)
    places = torch.bucketize(indices, ends, right=True).tolist()
    rows = [(shards[place], index - (int(ends[place - 1]) if place else 0)) for place, index in zip(places, indices.tolist())]
    return {key: torch.stack([shard[key][row] for shard, row in rows]) for key in shards[0]}


@dataclass(frozen=True, eq=False, kw_only=True)
class BucketedLatentItems(LatentItems):
    """Latents of several shapes, those of a file alike: the place of each one's shape [N]. `batch` is asked for those of one."""

    buckets: Tensor
