"""Megatron-Energon's side of the comparison; imported only where it is installed, since it subclasses its classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from _loaders_sides import Batch, Task, Transform, stack
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)


@edataclass
class View(Sample):
    """An image's view and its number."""

    image: Any
    number: int


@stateless
def read(sample: dict[str, Any]) -> View:
    """The members of a sample, the image decoded by Energon where it decodes."""
    image = next(sample[kind] for kind in ("png", "jpg") if kind in sample)
    return View(**basic_sample_keys(sample), image=image, number=int(sample["cls"]))


class Views(DefaultTaskEncoder):  # type: ignore[misc]
    """Views and batches of them."""

    cookers = [Cooker(read)]  # noqa: RUF012 - Energon's way

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._transform = Transform(task)
        self.decoder = None if task.decoder == "torchvision" else SampleDecoder(image_decode="pilrgb")

    @stateless(restore_seeds=True)
    def encode_sample(self, sample: View) -> View:
        """The view."""
        how = self._transform.decode if isinstance(sample.image, bytes) else self._transform.view
        sample.image = how(sample.image)
        return sample

    @stateless
    def batch(self, samples: list[View]) -> Batch:
        """Images and numbers."""
        return stack([(sample.image, sample.number) for sample in samples])

    @stateless
    def encode_batch(self, batch: Batch) -> Batch:
        """As it is."""
        return batch


def opened(task: Task, seed: int, buffer: int) -> tuple[Iterator[Batch], Callable[[], Any]]:
    """Batches without end, and the state."""
    workers = WorkerConfig(rank=0, world_size=1, num_workers=task.workers, seed_offset=seed)
    data = get_train_dataset(
        str(task.corpus.folder / "energon"),
        worker_config=workers,
        batch_size=task.batch,
        shuffle_buffer_size=buffer,
        max_samples_per_sequence=100,
        task_encoder=Views(task),
    )
    loader = get_savable_loader(data)
    if task.state is not None:
        loader.restore_state_rank(task.state)
    return iter(loader), loader.save_state_rank
