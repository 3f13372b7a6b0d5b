"""Datasets of a run that are folders of images: packed once into shards in the output directory, before ranks start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from m3i_scale.config import DatasetConfig, RunConfig, read_yaml, run_values, valid_part
from m3i_scale.data.remote.access import is_remote
from m3i_scale.data.shards import LABELS, read_label_sets, read_sample_count
from m3i_scale.data.tokenizer import find_tokenizer
from m3i_scale.errors import CheckpointError, ConfigError, ErrorCollector, error_prefix
from m3i_scale.host.output_dir import RUN_FILE, lock_directory
from m3i_scale.objective.recipe import parse_recipe
from m3i_scale.objective.text_config import with_token_ids
from m3i_scale.output import print_line
from m3i_scale.rank_variables import under_launcher
from m3i_scale.run.check import check_run
from m3i_scale.run.data_checks import DataFacts, no_captions, with_validation_labels
from m3i_scale.run.resume import find_resume
from m3i_scale.shards.digests import INPUT_DIGEST
from m3i_scale.shards.image_folders import (
    check_class_names,
    folder_digest,
    has_images,
    holds_shards,
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
from m3i_scale.text import printable, yaml_string

Print = Callable[[str], None]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, with class folders or captions or both.

    Args:
        argument: text before the folder in a command, for errors and fixes: `data.datasets.NAME.path=`.
    """

    folder: Path
    argument: str

    @property
    def where(self) -> str:
        """Return the name of the folder in errors."""
        return printable(f"{self.argument}{self.folder}")

    @cached_property
    def records(self) -> list[Record]:
        """Return the images, with captions and labels."""
        return [*self._input.records()]

    @property
    def classes(self) -> list[str]:
        """Return the names of the class folders."""
        return self._input.labels

    @cached_property
    def captions(self) -> list[str]:
        """Return the captions of the images that have one."""
        return [record.caption for record in self.records if record.caption]

    @cached_property
    def _input(self) -> ListedInput:
        split = split_folder(self.folder)
        if split is not None:
            raise ConfigError(
                f"the folders of the dataset must be classes, got splits: {printable(split.name)}",
                where=self.where,
                why="a model would learn to distinguish the splits, and train on validation images",
                fix=printable(f"{self.argument}{split}"),
            )
        check_class_names([path.name for path in self.folder.iterdir() if path.is_dir()], self.where)
        has_captions = any(self.folder.rglob("*.txt"))
        return imagefolder_input(self.folder, "optional" if has_captions else "none", "classes")

    def contents(self) -> str:
        """Describe the contents in a line."""
        classes = f"{len(self.classes):,} class folders" if self.classes else "no class folders"
        captions = f"{len(self.captions):,} captions" if self.captions else "no captions"
        return f"{len(self.records):,} images, {classes}, {captions}"


@dataclass
class _Packing:
    """A folder of images and its shards. Existing shards are never changed or removed: other runs may read them."""

    images: ImageFolder
    digest: str
    """Digest of the names and sizes of the files."""
    output: Path
    """Folder of the shards, and of their tokenizer."""
    keys: list[str] = field(default_factory=list)
    """`data.datasets.NAME.path` of all datasets that read the folder."""

    @property
    def shards(self) -> Path:
        return self.output.absolute() / TRAIN

    def is_done(self) -> bool:
        if not os.path.lexists(self.output):
            return False
        if read_manifest(self.shards).get(INPUT_DIGEST) != self.digest:
            raise ConfigError(
                "the folder for packed images contains something else",
                where=str(self.output),
                why=f"the images of {self.images.where} are packed into it",
                fix="remove or rename it, or set another output_dir",
            )
        return True

    def pack(self, tell: Print, max_skipped: float) -> None:
        """Create the shards. Unusable images are skipped, counted and listed."""
        images = self.images
        tell(f"{images.where}: {images.contents()}; packing them once into {self.output}")
        source = ListedInput(images.records, images.classes, source="imagefolder", **{INPUT_DIGEST: self.digest})
        options = ShardOptions(workers=DEFAULT_WORKERS, skip_bad=True, max_skipped=max_skipped)
        with error_prefix(images.where):
            pack_images(source, self.output, tell, options=options)


class RunFolders:
    """Folders of images among the datasets of a run.

    Args:
        run_file: config file of the run, or the name of a built-in one.
        overrides: `section.key=value`, as on the command line.
    """

    def __init__(self, run_file: str, overrides: list[str] | None) -> None:
        self._run_file, self.overrides = run_file, [*(overrides or [])]
        """Overrides that replace packed folders by their shards."""
        ignored = ErrorCollector()  # errors are reported with all others; invalid overrides are left out
        values = ignored.collect(run_values, run_file, overrides, ignored)
        self._run = None if values is None else valid_part(values)[0]
        self.unpacked: dict[str, ImageFolder] = {}
        """Folders that are still to be packed, by path in the config."""
        self._packings: dict[Path, _Packing] = {}
        """By folder: several datasets may read the same one."""
        self.warnings: list[str] = []
        self._errors = ErrorCollector()
        if self._run is not None:
            self._add_all(self._run)

    def _add_all(self, run: RunConfig) -> None:
        for kind in ("datasets", "validation"):
            for name, source in getattr(run.data, kind).items():
                key, path = f"data.{kind}.{name}.path", source.path
                if is_remote(path) or "{" in path:
                    continue  # shards
                folder = Path(path.removeprefix("file://"))
                if not folder.exists():
                    self._use_saved(run, key, path)
                elif folder.is_dir() and not holds_shards(folder) and has_images(folder):
                    self._errors.collect(self._add, run, key, path, folder)

    def _use_saved(self, run: RunConfig, key: str, path: str) -> None:
        """Resume from the shards of a run if the images that they were packed from are gone."""
        saved = (ErrorCollector().collect(_saved_paths, run) or {}).get(key)
        shards = None if saved is None else _packed_folder(run, saved) / TRAIN
        if shards is not None and INPUT_DIGEST in read_manifest(shards):
            self.warnings.append(f"{key}={printable(path)} does not exist: the run resumes on its shards, {shards}")
            self._replace(key, shards)

    def _add(self, run: RunConfig, key: str, path: str, folder: Path) -> None:
        _, kind, name = key.removesuffix(".path").split(".", 2)
        place = folder.resolve()
        if place not in self._packings:
            digest, prefix = folder_digest(folder), "" if kind == "datasets" else "validation-"
            output = run.output_dir / "shards" / f"{prefix}{name}-{digest[:8]}"
            self._packings[place] = _Packing(ImageFolder(folder, f"{key}="), digest, output)
        packing = self._packings[place]
        packing.keys.append(key)
        self.unpacked[path] = packing.images  # also if one of the checks fails: it has no shards to be checked
        if "." in name:
            raise ConfigError(
                f"the name of a dataset that is a folder of images must have no dot, got '{printable(name)}'",
                where=packing.images.where,
                fix=key.replace(name, name.replace(".", "_")),
            )
        saved = _saved_paths(run).get(key)
        if saved is not None and name not in run.data.changed_datasets:
            _check_same(packing, _packed_folder(run, saved), key)
        if packing.is_done():
            del self.unpacked[path]
            self._replace(key, packing.shards)

    def _replace(self, key: str, shards: Path) -> None:
        kept = [override for override in self.overrides if override.partition("=")[0] != key]
        self.overrides = [*kept, f"{key}={yaml_string(str(shards))}"]

    def lines(self) -> list[str]:
        """Describe the folders that are still to be packed."""
        return [
            f"{one.images.where}: {one.images.contents()}; `m3i-scale train` packs them into {one.output}"
            for one in self._packings.values()
            if one.images in self.unpacked.values()
        ]

    def facts(self, run: RunConfig) -> DataFacts | None:
        """Return the properties of the data if folders are still to be packed, otherwise None. Check them against the
        recipe."""
        self._errors.raise_any()
        if not self.unpacked:
            return None
        recipe = ErrorCollector().collect(parse_recipe, run.recipe)  # its errors are reported with all others
        paths = frozenset(self.unpacked)
        counts = {path: len(folder.records) for path, folder in self.unpacked.items()}
        facts = DataFacts(run, unpacked=paths, sample_counts=counts)
        if recipe is None:
            return facts
        if recipe.labels_file not in (None, LABELS):
            raise ConfigError(
                f"the recipe reads {recipe.reads}, and a folder of images has none",
                where=next(iter(self.unpacked.values())).where,
                fix="use shards of `m3i-scale shards make masks` or `make coco`",
            )
        classes = {path: folder.classes for path, folder in self.unpacked.items()}
        datasets = run.data.datasets
        if all(source.path in paths for source in datasets.values()):
            check_streams(run, sum(counts[source.path] for source in datasets.values()))
        if recipe.labels_file is not None:
            facts.label_sets = read_label_sets(datasets, unpacked=classes)
            if run.task is not None:
                run.task.check_classes(facts.label_sets)
        if recipe.uses_text:
            facts.tokenizer = self._tokenizer(run)
        if recipe.uses_text_tower:
            run = run.model_copy(update={"text": with_token_ids(run.text, facts.tokenizer)})
        facts.run = with_validation_labels(run, facts.label_sets, LABELS, classes)
        return facts

    def _tokenizer(self, run: RunConfig) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the run, or one without words for the one that packing trains."""
        read = {name: source for name, source in run.data.datasets.items() if source.captions != "none"}
        if read and not any(map(self._has_captions, read.values())):
            raise no_captions(read, "there is no NAME.txt with text next to an image")
        in_shards = {name: source for name, source in read.items() if source.path not in self.unpacked}
        if run.text.tokenizer_source is not None or in_shards:
            return find_tokenizer(in_shards, run.text.tokenizer_source)
        return learn_tokenizer([], ShardOptions().vocabulary)

    def _has_captions(self, source: DatasetConfig) -> bool:
        folder = self.unpacked.get(source.path)
        return read_sample_count(source.path, "with_caption") != 0 if folder is None else bool(folder.captions)

    def pack(self, tell: Print, environment: Mapping[str, str], ranks: int | None) -> None:
        """Check the run, then pack the folders that are not packed yet. A rank of a launcher cannot do this."""
        for warning in self.warnings:
            tell(f"warning: {warning}")
        if self._run is None or not (self.unpacked or self._errors.errors):
            return
        if under_launcher(environment):
            self._errors.raise_any()
            folder = next(iter(self.unpacked.values()))
            raise ConfigError(
                "the folder of images is not packed into shards, or changed since",
                where=folder.where,
                why="every rank would pack it",
                fix="start with `m3i-scale train` or `m3i-scale launch`, which pack it before ranks start; or "
                f"`m3i-scale shards make imagefolder --input {folder.folder} --output SHARDS` and "
                f"{folder.argument}SHARDS/{TRAIN}",
            ).raised_everywhere()
        check_run(self._run_file, self.overrides, ranks, self.facts)
        with lock_directory(self._run.output_dir):
            for packing in self._packings.values():
                if not packing.is_done():
                    packing.pack(tell, self._run.data.max_corrupt_fraction)
                for key in packing.keys:
                    self._replace(key, packing.shards)
        self.unpacked = {}


def _saved_paths(run: RunConfig) -> dict[str, str]:
    """Return the paths of the datasets in the checkpoint from which a run resumes."""
    checkpoint, _ = find_resume(run, contents=False)
    data = {} if checkpoint is None else read_yaml(checkpoint / RUN_FILE).get("data", {})
    return {
        f"data.{kind}.{name}.path": str(source["path"])
        for kind in ("datasets", "validation")
        for name, source in data.get(kind, {}).items()
    }


def _packed_folder(run: RunConfig, saved: str) -> Path:
    """Return the folder of packed images for a path in a checkpoint, also after the output directory was moved."""
    return run.output_dir.absolute() / "shards" / Path(saved).parent.name


def _check_same(packing: _Packing, saved: Path, key: str) -> None:
    if saved.name != packing.output.name:
        shards = f"to resume on the same images: {key}={saved / TRAIN}; " if saved.is_dir() else ""
        raise CheckpointError(
            "the images are not those of the checkpoint: files changed by name or size since they were packed",
            where=packing.images.where,
            why="the resumed run would read different data",
            fix=f"{shards}to train on the images as they are now: set another output_dir; or restore the files",
        )


def pack_folders(run_file: str, overrides: list[str] | None, ranks: int | None = None) -> list[str]:
    """Pack the datasets of a run that are folders of images, unless they are packed already. Return the overrides with
    the shards in place of the folders.

    Args:
        ranks: number of ranks that will train; None: unknown, so what depends on it is not checked.

    Raises:
        UserError: an image folder is not usable, or changed since a checkpoint was saved; the config has an error, and
            a folder is not packed; or a folder is not packed, and this process is a rank of a launcher.
    """
    folders = RunFolders(run_file, overrides)
    folders.pack(lambda text: print_line(text, stderr=True), os.environ, ranks)
    return folders.overrides
