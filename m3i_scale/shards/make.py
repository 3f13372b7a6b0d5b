"""Creation of shards from an input that is read twice in order: first names and sizes, then contents."""

from __future__ import annotations

import heapq
import shlex
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from m3i_scale.data.shards import CATEGORIES, LABELS, MASK_LABELS
from m3i_scale.errors import DataError
from m3i_scale.files import json_line
from m3i_scale.shards.annotation_checks import check_class_pixels, least_to_evaluate, pixel_lines, pixel_report
from m3i_scale.shards.folder import atomic_folder, check_output, write_samples
from m3i_scale.shards.layout import WHOLE, Layout, plan_layout, training_splits
from m3i_scale.shards.options import ProgressCallback, ShardOptions
from m3i_scale.shards.process_pool import map_in_processes
from m3i_scale.shards.records import Encoded, Input, Record, encode_all, hash_of

CHUNK_BYTES = 16_000_000
CHUNK_RECORDS = 16
MAX_CAPTIONS = 1_000_000
"""Maximum number of captions for training the tokenizer, selected by a hash of their keys."""
SKIPPED = "skipped.jsonl"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""In the order of their ids: padding is 0."""
MAX_ALPHABET = 1_000
_REPORT_EVERY = 50_000
FITTING_RECIPES = {
    (True, True): "m3i_mini",
    (True, False): "m3i_no_text",
    (False, True): "m3i_no_category",
    (False, False): "sim",
}
"""Built-in recipes by whether images have labels and captions."""


def make_shards(
    source: Input,
    output: Path,
    *,
    name: str = "images",
    options: ShardOptions | None = None,
    shares: Mapping[str, float] | None = None,
    progress: ProgressCallback | None = None,
    every_class: bool = False,
) -> dict[str, Any]:
    """Write `output/<split>/<name>-000000.tar …` with labels, sizes, manifest and index files, and a tokenizer.

    A hash of its key determines the split and shard of a sample; within a shard, samples keep the input order. No
    samples stay in memory. With `skip_bad`, skipped samples are listed in `skipped.jsonl`. The output folder must not
    exist.

    Args:
        shares: fractions by split, for records without a split; None: these go to `train`.
        every_class: whether the training split must have pixels of every mask class.

    Returns:
        A summary: shards, samples and bytes per split; skipped samples by reason; the path of the tokenizer; counts
        from annotation files; mask pixels by split and class.
    """
    options = options or ShardOptions()
    check_output(output, name)
    layout = plan_layout(source.outlines, shares, options, default_split="train")
    with atomic_folder(output) as folder:
        encoder = _SampleEncoder(layout, options, folder / SKIPPED, progress)
        samples = encoder.samples(source.records())
        names = {LABELS: source.labels, MASK_LABELS: source.mask_labels, CATEGORIES: source.categories}
        splits = write_samples(folder, name, layout, samples, names, source.info)
        summary: dict[str, Any] = {"output": str(output), "splits": splits, "skipped": dict(encoder.skipped)}
        if encoder.pixels:
            encoder.check_masks(source, every_class=every_class)
            summary["mask_pixels"] = {
                split: pixel_report(counts, source.mask_labels) for split, counts in sorted(encoder.pixels.items())
            }
        if "annotations" in source.info():
            summary["annotations"] = source.info()["annotations"]
        if encoder.skipped:
            summary["skipped_list"] = str(output / SKIPPED)
        if len(encoder.captions) and options.vocabulary:
            train_tokenizer(encoder.captions, folder / "tokenizer", options.vocabulary)
            summary["tokenizer"] = str(output / "tokenizer")
    return summary


def pack_images(
    source: Input, folder: Path, tell: Callable[[str], None], *, options: ShardOptions, every_class: bool = False
) -> None:
    """Make shards that later starts of a run reuse, and report the progress in lines."""

    def progress(done: int, total: int) -> None:
        if done % _REPORT_EVERY == 0:
            tell(f"packed {done} of {total} images")

    summary = make_shards(source, folder, options=options, progress=progress, every_class=every_class)
    counted = {name: value for name, value in summary.items() if name not in ("annotations", "mask_pixels")}
    for line in summary_lines(counted, folder):  # the others are printed together with counts of existing shards
        tell(line)


def summary_lines(summary: dict[str, Any], output: Path) -> list[str]:
    """Format the result as lines: the shards of every split, and skipped samples."""
    lines = [
        f"{output / which}: {facts['samples']} samples ({facts['with_label']} with label, {facts['with_caption']} with "
        f"caption, {facts['with_mask']} with mask"
        + (f", {facts['with_instances']} with instances" if "with_instances" in facts else "")
        + f") in {facts['shards']} shards"
        for which, facts in summary["splits"].items()
    ]
    lines += [annotation_line(file, counts) for file, counts in summary.get("annotations", {}).items()]
    for split, report in summary.get("mask_pixels", {}).items():
        lines += pixel_lines(report, str(output / split))
    lines += [f"left out: {count} × {reason}" for reason, count in summary.get("skipped", {}).items()]
    return lines + ([f"each of them: {summary['skipped_list']}"] if "skipped_list" in summary else [])


def next_command(splits: Mapping[str, Mapping[str, Any]], output: Path) -> str:
    """Return the command that trains on new shards, by their annotations."""
    split = next((name for name in sorted(splits) if name in training_splits(sorted(splits))), WHOLE)
    facts, place = splits.get(split, {}), shlex.quote(str(output / split))
    for annotation, task in (("with_instances", "detection"), ("with_mask", "segmentation")):
        if facts.get(annotation):
            return f"next: m3i-scale finetune {task} EXPORT --data {shlex.quote(str(output))} output_dir=RUN"
    recipe = FITTING_RECIPES[bool(facts.get("with_label")), bool(facts.get("with_caption"))]
    return f"next: m3i-scale train {recipe} data.datasets.main.path={place} output_dir=RUN"


def annotation_line(file: str, counts: Mapping[str, int]) -> str:
    """Format the counts of an annotation file as a line of text."""
    return f"{file}: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)


class CaptionSample:
    """Deterministic sample of captions: those whose keys have the smallest hashes, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heap: list[tuple[int, str]] = []

    def add(self, key: str, caption: str) -> None:
        """Add a caption if its key's hash is among the smallest."""
        entry = (-int.from_bytes(hash_of("caption", key)[:8], "big"), caption)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[str]:
        return (caption for _, caption in self._heap)

    def __len__(self) -> int:
        return len(self._heap)


class _SampleEncoder:
    def __init__(
        self, layout: Layout, options: ShardOptions, skipped_list: Path, progress: ProgressCallback | None
    ) -> None:
        self._layout, self._options, self._progress = layout, options, progress
        self._skipped_list, self._training = skipped_list, training_splits(layout.splits)
        self.skipped: Counter[str] = Counter()
        self._first: DataError | None = None
        self.captions = CaptionSample(MAX_CAPTIONS)
        self.pixels: defaultdict[str, Counter[int]] = defaultdict(Counter)
        """Number of mask pixels by split and value."""

    def samples(self, records: Iterator[Record]) -> Iterator[tuple[str, dict[str, bytes]] | None]:
        """Yield the key and files of every record, in order; None for a skipped record."""
        for number, (record, encoded) in enumerate(self._encoded(records)):
            if isinstance(encoded, DataError):
                self._skip(record, encoded)
                yield None
            else:
                files, pixels = encoded
                split = self._layout.split(number) if number < len(self._layout) else ""
                if record.caption and split in self._training:
                    self.captions.add(record.key, record.caption)
                if pixels:
                    self.pixels[split].update(pixels)
                yield record.key, record.files(files)
            if self._progress is not None:
                self._progress(number + 1, len(self._layout))
        if self._first is not None and sum(self.skipped.values()) == len(self._layout):
            raise DataError(
                f"none of the {len(self._layout)} images can be used",
                where=self._first.where,
                why=f"the first one: {self._first.what}",
                fix=self._first.fix,
            )

    def check_masks(self, source: Input, *, every_class: bool) -> None:
        """Check that the masks of each split have enough classes to train or evaluate on; see `check_class_pixels`."""
        names, first = source.mask_labels, int(bool(source.info().get("reduce_zero_label")))
        if names is None:
            return
        for split, counts in self.pixels.items():
            least = len(names) if every_class else 2
            if split not in self._training:
                least = least_to_evaluate(counts, names)
            check_class_pixels(counts, names, f"masks of {split}", least=least, first=first)

    def _encoded(self, records: Iterator[Record]) -> Iterator[tuple[Record, Encoded]]:
        ahead: deque[list[Record]] = deque()  # only the chunks submitted to workers and not yet returned

        def chunks() -> Iterator[list[Record]]:
            for chunk in _chunks(records):
                ahead.append(chunk)
                yield chunk

        encode = partial(encode_all, value_range=self._options.value_range)
        for encoded in map_in_processes(encode, chunks(), self._options.workers):
            yield from zip(ahead.popleft(), encoded, strict=True)

    def _skip(self, record: Record, problem: DataError) -> None:
        if not self._options.skip_bad:
            raise problem
        self._first = self._first or problem
        self.skipped[problem.what.partition(":")[0]] += 1
        count, total = sum(self.skipped.values()), len(self._layout)
        if self._options.max_skipped * total < count < total:
            raise DataError(
                f"{count} of {total} images cannot be used, more than data.max_corrupt_fraction = "
                f"{self._options.max_skipped:g}, and others are not read yet",
                where=self._first.where,
                why=f"the first one: {self._first.what}",
                fix="repair or remove the images, or raise data.max_corrupt_fraction",
            )
        line = {"key": record.key, "where": problem.where, "reason": problem.what}
        with self._skipped_list.open("a", encoding="utf-8") as stream:
            stream.write(json_line(line))


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yield chunks of records for workers, limited in number and in bytes."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def train_tokenizer(captions: Iterable[str], folder: Path, vocabulary: int) -> None:
    """Train a tokenizer by `learn_tokenizer`, and save it in `folder` in the layout of `AutoTokenizer`."""
    learn_tokenizer(captions, vocabulary).save_pretrained(folder)


def learn_tokenizer(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a lowercase WordPiece tokenizer; `vocabulary` is the maximum number of tokens, special tokens included."""
    captions = sorted(captions)
    learner = _pieces(models.WordPiece(unk_token="[UNK]"))
    # The trainer numbers inner characters in the order of a hash map, and breaks ties between merges by number.
    # Naming the characters beforehand makes the vocabulary deterministic.
    fixed = SPECIAL_TOKENS + [f"##{character}" for character in _alphabet(captions, learner)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=fixed, show_progress=False)
    learner.train_from_iterator(captions, trainer)
    tokenizer = _pieces(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _pieces(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(captions: list[str], tokenizer: Tokenizer) -> list[str]:
    """Return the most frequent characters of the captions, up to the trainer's limit."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(tokenizer.normalizer.normalize_str(caption).replace(" ", ""))
    return sorted(sorted(counts, key=lambda character: (-counts[character], character))[:MAX_ALPHABET])
