"""Images in data sets of the Hugging Face hub, or of directories like theirs, by the library `datasets`."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from gentrain.config import ConfigError, Fraction, option, register
from gentrain.data.base import Data, EmptySplit, check_split, import_for
from gentrain.data.captions import Captions, caption_from
from gentrain.data.decode import ImageDecoder, corrupt
from gentrain.noise import Noise, derive

_REMEDY = "pip install 'gentrain[huggingface]'"


@register("huggingface")
@dataclass
class HuggingFace(Data):
    """A data set of the hub, or a directory like one, as the library `datasets` reads it; no code of a data set is ever run.

    Local: the library makes files that are mapped into memory, and items are read in any order. `streaming`: nothing but parquet files,
    which stay where they are; an item is read with its row group, and the order shuffles row groups, and the rows of `together` of them.
    Images are cropped as those of image_folder. With `caption` they have texts in place of classes. The order is the same on any number of
    ranks and goes on where a run stopped, either way.
    """

    path: str = option(help="name on the hub (owner/name), a directory of parquet files or images, or one that save_to_disk has written")
    subset: str | None = option(None, "which configuration of the data set")
    revision: str | None = option(None, "commit, branch or tag on the hub; null = the newest")
    train_split: str = option("train", "the split to train on")
    held_out_split: str | None = option(None, "the split that is kept from training; null = `held_out` of train_split")
    held_out: Fraction = option(0.1, "part of train_split that is kept from training, chosen by row, where held_out_split is null")
    image: str = option("image", "column of the images")
    label: str | None = option("label", "column of the classes; null = none")
    caption: str | None = option(None, "column of the captions, for images without classes (`label: null`); null = none")
    weight: str | None = option(None, "column of the weights that rows have in the loss; null = all alike")
    size: PositiveInt = option(64, "height and width that samples get", unit="pixels")
    colours: Literal["rgb", "grey"] = option("rgb", "3 channels or 1")
    max_pixels: PositiveInt = option(50_000_000, "larger images count as corrupt: they could fill the memory", unit="pixels")
    streaming: bool = option(False, "leave parquet files where they are, in place of a copy on this machine")
    together: PositiveInt = option(8, "row groups that streaming shuffles among each other, and each reading process holds")
    classes: list[str] | None = option(None, "names of the labels 0, 1, ...; null = those that the data set names, which a run records")
    rows: PositiveInt | None = option(None, "of train_split, which a run records: another number of them is refused")
    licence: str = option("not stated", "origin and licence of the images, for the model card")

    def __post_init__(self) -> None:
        if self.caption is not None and (self.label is not None or self.classes):
            raise ConfigError("captioned images have no classes; set data.label to null and leave out data.classes", key="label")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 if self.colours == "rgb" else 1, self.size, self.size)

    @property
    def class_names(self) -> Sequence[str]:
        if self.label is None or self.classes is not None:
            return self.classes or []
        names = getattr(self._columns(self._table(self.train_split))[self.label], "names", None)
        if names is None:
            raise ValueError(f"the column {self.label!r} names no classes; list them in data.classes, or set data.label to null")
        return list(names)

    @property
    def captions(self) -> Sequence[str]:
        return () if self.caption is None else self._captions.all

    @cached_property
    def _captions(self) -> Captions:
        """Of the rows of train_split, then of those of held_out_split."""
        names = [self.train_split, *([self.held_out_split] if self.held_out_split is not None else [])]
        return Captions([text for name in names for text in self._texts(name)])

    def _texts(self, split: str) -> Iterator[str]:
        table, column = self._table(split), str(self.caption)
        self._columns(table)
        for number, text in enumerate(table[column]):
            try:
                yield caption_from(text, column)
            except ValueError as error:
                raise ValueError(
                    f"{self.path}: row {number} of {split}: {error}; give every image a text (an empty one will do)"
                ) from error

    @property
    def weighted(self) -> bool:
        return self.weight is not None

    def fit(self) -> None:
        if os.path.isdir(self.path):
            self.path = str(Path(self.path).absolute())
        self.classes = list(self.class_names)
        found = len(self._table(self.train_split))
        if self.rows not in (None, found):
            raise ValueError(
                f"{self.path} has {found} rows in {self.train_split}, not the {self.rows} of the run's start; set data.revision"
            )
        self.rows = found

    def split(self, name: str) -> TableItems:
        check_split(name)
        before = 0  # rows whose captions come before those of the table
        if name == "held_out" and self.held_out_split is not None:
            table, before = self._table(self.held_out_split), len(self._table(self.train_split))
            rows = torch.arange(len(table))
        else:
            table = self._table(self.train_split)
            rows = torch.arange(len(table))
            if self.held_out_split is None:
                apart = Noise(derive(0, "held out"), rows).uniform((len(rows),)) < self.held_out
                rows = rows[apart == (name == "held_out")]
        if not len(rows):
            raise EmptySplit(f"none of the {len(table)} rows of {self.path} falls into the {name} split; change data.held_out")
        self._columns(table)
        kind = StreamedItems if isinstance(table, ParquetTable) else TableItems
        decoder = ImageDecoder(self.size, self.colours, self.max_pixels)
        captions = None if self.caption is None else self._captions.places[before + rows]
        return kind(
            table, rows, self.image, self.label, self.weight, len(self.class_names), decoder, self.together, self._roots(), captions
        )

    def _roots(self) -> list[Path]:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        caches = [Path(HF_HUB_CACHE).resolve(), Path(config.DOWNLOADED_DATASETS_PATH).resolve()]
        return [Path(self.path).resolve(), *caches] if os.path.isdir(self.path) else caches

    def _columns(self, table: Any) -> Mapping[str, Any]:
        """Name -> the library's description. Raises ConfigError when a column of ours is not there."""
        features: Mapping[str, Any] = table.features
        for key in ("image", "label", "caption", "weight"):
            name = getattr(self, key)
            if name is not None and name not in features:
                raise ConfigError(f"{self.path} has no column {name!r}; its columns: {', '.join(features)}", key=f"data.{key}")
        return features

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """Those that were opened, by split."""
        return {}

    def _table(self, split: str) -> Any:
        """The library's Dataset or a ParquetTable. Raises ValueError when it cannot be read, whatever the library raises."""
        if split not in self._tables:
            datasets = import_for(self.registered_name, "datasets", _REMEDY)
            datasets.disable_progress_bars()
            try:
                self._tables[split] = self._streamed(datasets, split) if self.streaming else self._loaded(datasets, split)
            except ConfigError:
                raise
            except Exception as error:  # of parquet files, file systems and the hub
                what = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"{self.path}: {what}") from error
        return self._tables[split]

    def _loaded(self, datasets: Any, split: str) -> Any:
        if Path(self.path, "state.json").is_file() or Path(self.path, "dataset_dict.json").is_file():
            table = datasets.load_from_disk(self.path)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(self.path, self.subset, split=split, revision=self.revision)
        if self.image in table.features:
            table = table.cast_column(self.image, datasets.Image(decode=False))  # bytes of strangers go through our decoder
        return table

    def _streamed(self, datasets: Any, split: str) -> ParquetTable:
        files = datasets.load_dataset_builder(self.path, self.subset, revision=self.revision).config.data_files
        if split not in (files or {}):
            raise ConfigError(f"{self.path} has no split {split!r}; its splits: {', '.join(map(str, files or {}))}", key="data.train_split")
        names = [str(file) for file in files[split]]
        if other := [name for name in names if not name.endswith(".parquet")]:
            raise ConfigError(f"only parquet files can be streamed, not {other[0]}; set data.streaming to false", key="data.streaming")
        return ParquetTable(names, [name for name in (self.image, self.label, self.weight) if name is not None], self.together)


@dataclass(eq=False)
class TableItems:
    """Rows of a table of the library.

    Args:
        table: what gives a row by its number. rows: [N] int64, numbers of those that belong to the split.
        roots: where images may lie that the table names by their paths.
        captions: [N] int64, places of the rows' texts, if there are any.
    """

    table: Any
    rows: Tensor
    image: str
    label: str | None
    weight: str | None
    classes: int
    decoder: ImageDecoder
    together: int
    roots: Sequence[Path] = ()
    captions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.rows[index])
        try:
            row = self.table[number]
            label = -1 if self.label is None else int(row[self.label])
            if self.label is not None and not 0 <= label < self.classes:
                raise ValueError(f"the label {label} is none of the {self.classes} classes")
            item = {"x": self._decoded(row[self.image]), "label": torch.tensor(label)}
            if self.weight is not None:
                weight = float(row[self.weight])
                if not 0 <= weight < float("inf"):
                    raise ValueError(f"the weight {weight:g} is none; weights are finite and not negative")
                item["weight"] = torch.tensor(weight)
            if self.captions is not None:
                item["caption"] = self.captions[index]
        except Exception as error:
            raise corrupt(f"row {number}", error) from error
        return item

    def _decoded(self, image: Any) -> Tensor:
        data = image["bytes"] if isinstance(image, Mapping) else image
        if data is None and image.get("path"):  # of a directory of images
            path = Path(image["path"]).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                raise ValueError(f"{path} lies outside of the data set")
            with open(path, "rb") as file:
                self.decoder.check_length(os.fstat(file.fileno()).st_size)
                return self.decoder.decode(file)
        if not isinstance(data, bytes):
            raise ValueError("no image")
        self.decoder.check_length(len(data))
        return self.decoder.decode(io.BytesIO(data))


class StreamedItems(TableItems):
    """Rows of parquet files, see `BlockItems`."""

    @cached_property
    def blocks(self) -> Tensor:
        found = torch.bincount(self.table.block_of(self.rows), minlength=len(self.table.sizes))
        return found[found > 0]


@dataclass(eq=False)
class ParquetTable:
    """Rows of parquet files that stay where they are; holds the newest row groups that were read, and the files' footers.

    Args:
        files: paths or URLs of fsspec. columns: that are read. keep: row groups held.
    """

    files: Sequence[str]
    columns: Sequence[str]
    keep: int
    _held: OrderedDict[int, list[dict[str, Any]]] = field(default_factory=OrderedDict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}

    @cached_property
    def _footers(self) -> list[Any]:
        import pyarrow.parquet

        footers = []
        for name in self.files:
            with _opened(name) as file:
                footers.append(pyarrow.parquet.read_metadata(file))
        return footers

    @cached_property
    def _groups(self) -> list[tuple[int, int]]:
        """File and number within it of each row group."""
        return [(file, group) for file, footer in enumerate(self._footers) for group in range(footer.num_row_groups)]

    @cached_property
    def sizes(self) -> Tensor:
        """[G] int64, rows of each row group."""
        return torch.tensor([self._footers[file].row_group(group).num_rows for file, group in self._groups])

    @property
    def features(self) -> Mapping[str, Any]:
        from datasets import Features

        return Features.from_arrow_schema(self._footers[0].schema.to_arrow_schema())

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def block_of(self, rows: Tensor) -> Tensor:
        """The row group of each row: [N] -> [N]."""
        return torch.bucketize(rows, self.sizes.cumsum(0), right=True)

    def __getitem__(self, number: int | str) -> Any:
        """A row, by its number, or the values of a column in all rows, by its name: as of the library's tables."""
        if isinstance(number, str):
            return self._column(number)
        block = int(self.block_of(torch.tensor([number])))
        if block not in self._held:
            self._held[block] = self._read(block)
            if len(self._held) > self.keep:
                self._held.popitem(last=False)
        return self._held[block][number - int(self.sizes[:block].sum())]

    def _column(self, name: str) -> Iterator[Any]:
        import pyarrow.parquet

        for file in self.files:
            with _opened(file) as opened:
                for batch in pyarrow.parquet.ParquetFile(opened).iter_batches(columns=[name]):
                    yield from batch.column(0).to_pylist()

    def _read(self, block: int) -> list[dict[str, Any]]:
        import pyarrow.parquet

        file, group = self._groups[block]
        with _opened(self.files[file]) as opened:
            table = pyarrow.parquet.ParquetFile(opened, metadata=self._footers[file]).read_row_group(group, columns=list(self.columns))
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def _opened(name: str) -> Any:
    import fsspec

    return fsspec.open(name, "rb")
