"""Datasets of a run that are folders of images: packed once into shards in the output directory, before ranks start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from m3i_scale.config import DatasetConfig, RunConfig, run_values, valid_part
from m3i_scale.data.remote.access import is_remote
from m3i_scale.data.shards import LABELS, read_label_sets, read_sample_count
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import CheckpointError, ConfigError, ErrorCollector, UserError
from m3i_scale.host.output_dir import lock_directory
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.output import print_line
from m3i_scale.rank_variables import adopt_rank_variables
from m3i_scale.run.check import check_run
from m3i_scale.run.data_checks import DataFacts, no_captions, with_validation_labels
from m3i_scale.run.resume import find_resume
from m3i_scale.shards.digests import INPUT_DIGEST
from m3i_scale.shards.image_folders import (
    check_class_folders,
    folder_digest,
    has_images,
    imagefolder_input,
    split_folder,
)
from m3i_scale.shards.make import learn_tokenizer, pack_images
from m3i_scale.shards.options import ShardOptions
from m3i_scale.shards.process_pool import DEFAULT_WORKERS
from m3i_scale.shards.records import ListedInput, Record
from m3i_scale.tasks.finetune import check_streams
from m3i_scale.tasks.labelled import read_manifest
from m3i_scale.tasks.unpacked import TRAIN
from m3i_scale.text import printable

Print = Callable[[str], None]
_VALIDATION = "validation-"
"""Prefix of the packed folders of `data.validation`, whose names may be names of training datasets too."""


@dataclass(frozen=True)
class ImageFolder:
    """A dataset of a run that is a folder of images, with class folders or captions or both."""

    key: str
    """`data.datasets.NAME.path`."""
    folder: Path
    packed: Path
    """Folder of its shards, and of their tokenizer."""

    @property
    def where(self) -> str:
        """Return the name of the dataset in errors."""
        return f"{self.key}: {printable(str(self.folder))}"

    @property
    def shards(self) -> Path:
        """Return the folder of the shards, which exists after `pack`."""
        return self.packed.absolute() / TRAIN

    @cached_property
    def records(self) -> list[Record]:
        """Return the images, with captions and labels."""
        return [*self._input.records()]

    @property
    def classes(self) -> list[str]:
        """Return the names of the class folders."""
        return self._input.labels

    @property
    def captions(self) -> list[str]:
        """Return the captions of the images that have one."""
        return [record.caption for record in self.records if record.caption]

    @cached_property
    def _input(self) -> ListedInput:
        split = split_folder(self.folder)
        if split is not None:
            fix = f"m3i-scale init {split}" if self.key == "DIR" else f"{self.key}={split}"
            raise ConfigError(
                f"the folders of the dataset must be classes, got splits: {printable(split.name)}",
                where=self.where,
                why="a model would learn to tell the splits apart, and train on validation images",
                fix=printable(fix),
            )
        check_class_folders(self.folder, [path.name for path in self.folder.iterdir() if path.is_dir()], self.where)
        has_captions = any(self.folder.rglob("*.txt"))
        return imagefolder_input(self.folder, "optional" if has_captions else "none", "classes")

    @cached_property
    def digest(self) -> str:
        """Return the digest of everything that goes into the shards."""
        return folder_digest(self.folder)

    def is_packed(self) -> bool:
        """Return whether the shards exist and are made from the folder as it is now."""
        if not self.packed.is_dir() or not any(self.packed.iterdir()):
            return False
        digest = read_manifest(self.packed / TRAIN).get(INPUT_DIGEST)
        if digest is None:
            raise ConfigError(
                "the folder for packed images contains something else",
                where=str(self.packed),
                why=f"the images of {self.where} are packed into it",
                fix="remove or rename it, or give another output_dir",
            )
        return bool(digest == self.digest)

    def check(self, run: RunConfig) -> None:
        """Check that a folder that is not packed may be packed. If its images were packed and have changed since, a run
        with checkpoints would resume on other data."""
        name = self.key.split(".", 2)[2].removesuffix(".path")
        if "." in name:
            raise ConfigError(
                f"the name of a dataset that is a folder of images must have no dot, got '{printable(name)}'",
                where=self.where,
                fix=self.key.replace(name, name.replace(".", "_")),
            )
        if self.packed.is_dir() and any(self.packed.iterdir()) and find_resume(run, contents=False)[0] is not None:
            raise CheckpointError(
                "the images changed since they were packed, by name or size, and the run has checkpoints",
                where=self.where,
                why="the resumed run would read other data than it began with",
                fix=f"to resume on the images as they were: {self.key}={self.shards}; to train on them as they are "
                "now: another output_dir; or restore the files",
            )

    def contents(self) -> str:
        """Describe the contents in a line."""
        classes = f"{len(self.classes):,} class folders" if self.classes else "no class folders"
        captions = f"{len(self.captions):,} captions" if self.captions else "no captions"
        return f"{len(self.records):,} images, {classes}, {captions}"

    def pack(self, tell: Print) -> None:
        """Create the shards. Unusable images are skipped, counted and listed."""
        tell(f"{self.where}: {self.contents()}; packing them once into {self.packed}")
        if self.packed.exists():
            tell("the images changed since they were packed: packing them again")
            shutil.rmtree(self.packed)
        source = ListedInput(self.records, self.classes, source="imagefolder", **{INPUT_DIGEST: self.digest})
        options = ShardOptions(workers=DEFAULT_WORKERS, skip_bad=True)
        try:
            pack_images(source, self.packed, tell, options=options)
        except UserError as error:
            error.where = f"{self.key}: {error.where}"
            raise


class RunFolders:
    """Folders of images among the datasets of a run.

    Args:
        run_file: config file of the run, or the name of a built-in one.
        overrides: `section.key=value`, as on the command line.
    """

    def __init__(self, run_file: str, overrides: list[str] | None) -> None:
        self._run_file, self.overrides = run_file, [*(overrides or [])]
        """Overrides that replace packed folders by their shards."""
        values = ErrorCollector().collect(run_values, run_file, overrides)  # errors are reported with all others
        self._run = None if values is None else valid_part(values)[0]
        self.unpacked: dict[str, ImageFolder] = {}
        """Folders that are still to be packed, by path in the config."""
        self._errors = ErrorCollector()
        for path, folder in [] if self._run is None else _folders_of(self._run):
            if self._errors.collect(self._is_packed, folder):
                self._replace(folder)
            else:
                self.unpacked[path] = folder

    def _is_packed(self, folder: ImageFolder) -> bool:
        packed = folder.is_packed()
        if not packed and self._run is not None:
            folder.check(self._run)
        return packed

    def _replace(self, folder: ImageFolder) -> None:
        kept = [override for override in self.overrides if override.partition("=")[0] != folder.key]
        self.overrides = [*kept, f"{folder.key}={json.dumps(str(folder.shards))}"]

    def lines(self) -> list[str]:
        """Describe the folders that are still to be packed."""
        return [
            f"{one.where}: {one.contents()}; `m3i-scale train` packs them into {one.packed}"
            for one in self.unpacked.values()
        ]

    def facts(self, run: RunConfig) -> DataFacts | None:
        """Return the properties of the data if folders are still to be packed, otherwise None. Check them against the
        recipe."""
        if not self.unpacked:
            return None
        self._errors.raise_any()
        recipe = ErrorCollector().collect(parse_recipe, run.recipe)  # its errors are reported with all others
        paths = frozenset(self.unpacked)
        classes = {path: folder.classes for path, folder in self.unpacked.items()}
        if recipe is None:
            return DataFacts(run, unpacked=paths)
        if recipe.labels_file not in (None, LABELS):
            raise ConfigError(
                f"the recipe reads {recipe.reads}, and a folder of images has none",
                where=next(iter(self.unpacked.values())).where,
                fix="shards of `m3i-scale shards make masks` or `make coco`",
            )
        facts = DataFacts(run, unpacked=paths)
        datasets = run.data.datasets
        if all(source.path in paths for source in datasets.values()):
            check_streams(run, sum(len(self.unpacked[source.path].records) for source in datasets.values()))
        if recipe.labels_file is not None:
            facts.label_sets = read_label_sets(datasets, unpacked=classes)
            if run.task is not None:
                run.task.check_classes(facts.label_sets)
        if recipe.uses_text:
            facts.tokenizer = self._tokenizer(run)
        facts.run = with_validation_labels(run, facts.label_sets, LABELS, classes)
        return facts

    def _tokenizer(self, run: RunConfig) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the run, or one without words for the one that packing trains."""
        read = {name: source for name, source in run.data.datasets.items() if source.captions != "none"}
        if read and not any(map(self._has_captions, read.values())):
            raise no_captions(read, "there is no NAME.txt with text next to an image")
        in_shards = {name: source for name, source in read.items() if source.path not in self.unpacked}
        if run.text.tokenizer is not None or in_shards:
            return find_tokenizer(in_shards, run.text.tokenizer)
        return learn_tokenizer([], ShardOptions().vocabulary)

    def _has_captions(self, source: DatasetConfig) -> bool:
        folder = self.unpacked.get(source.path)
        return read_sample_count(source.path, "with_caption") != 0 if folder is None else bool(folder.captions)

    def pack(self, tell: Print, environment: Mapping[str, str]) -> None:
        """Check the run, then pack the folders that are not packed yet. A rank of a launcher cannot do this."""
        if not self.unpacked or self._run is None:
            return
        variables = dict(environment)
        adopt_rank_variables(variables)
        if "RANK" in variables or "WORLD_SIZE" in variables:
            self._errors.raise_any()
            folder = next(iter(self.unpacked.values()))
            raise ConfigError(
                "the folder of images is not packed into shards, or changed since",
                where=folder.where,
                why="every rank would pack it",
                fix="start with `m3i-scale train` or `m3i-scale launch`, which pack it before ranks start; or "
                f"`m3i-scale shards make imagefolder --input {folder.folder} --output SHARDS` and "
                f"{folder.key}=SHARDS/{TRAIN}",
            ).raised_everywhere()
        check_run(self._run_file, self.overrides, read_unpacked=self.facts)
        with lock_directory(self._run.output_dir):
            for folder in self.unpacked.values():
                if not folder.is_packed():  # by another job in the meantime
                    folder.pack(tell)
                self._replace(folder)
        self.unpacked = {}


def _folders_of(run: RunConfig) -> list[tuple[str, ImageFolder]]:
    found = []
    for kind, prefix in (("datasets", ""), ("validation", _VALIDATION)):
        for name, source in getattr(run.data, kind).items():
            folder = Path(source.path.removeprefix("file://"))
            if is_remote(source.path) or not folder.is_dir() or any(folder.glob("*.tar")) or not has_images(folder):
                continue  # the checks of shards report it
            key = f"data.{kind}.{name}.path"
            packed = run.output_dir / "shards" / f"{prefix}{name}"
            found.append((source.path, ImageFolder(key, folder, packed)))
    return found


def pack_folders(run_file: str, overrides: list[str] | None) -> list[str]:
    """Pack the datasets of a run that are folders of images, unless they are packed already. Return the overrides with
    the shards in place of the folders.

    Raises:
        UserError: an image folder is not usable, or changed since a checkpoint was saved; the config has an error, and
            a folder is not packed; or a folder is not packed, and this process is a rank of a launcher.
    """
    folders = RunFolders(run_file, overrides)
    folders.pack(lambda text: print_line(text, stderr=True), os.environ)
    return folders.overrides
