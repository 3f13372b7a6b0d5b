"""What a path on the command line stands for: one checkpoint, or all of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from m3i_scale.config import CheckpointConfig, parse_section, read_yaml
from m3i_scale.errors import CheckpointError, ConfigError
from m3i_scale.run.retention import rules_of
from m3i_scale.scale.checkpoint.locate import TEMPORARY_PREFIX, checkpoints
from m3i_scale.scale.checkpoint.manifest import MANIFEST, step_of, verify
from m3i_scale.scale.checkpoint.retention import Rules


@dataclass(frozen=True)
class Place:
    """A run's checkpoints."""

    root: Path
    """The folder that holds them."""

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.root.absolute().parent

    @property
    def temporary(self) -> list[Path]:
        """What a killed or a running job has left half written or half removed."""
        return sorted(self.root.glob(f"{TEMPORARY_PREFIX}*"))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is one checkpoint, whatever its state."""
    return path.is_dir() and (step_of(path) is not None or (path / MANIFEST).exists())


def find_place(path: Path) -> Place:
    """The checkpoints of a run, by its output_dir or by the folder itself.

    Raises:
        CheckpointError: nothing of the kind.
    """
    root = path if path.name == "checkpoints" or checkpoints(path) else path / "checkpoints"
    if is_checkpoint(path) or not root.is_dir():
        what = "one checkpoint, not a run" if is_checkpoint(path) else "no checkpoints here"
        raise CheckpointError(what, where=str(path), fix="give a run's output_dir, or its checkpoints folder")
    return Place(root)


def checkpoint_or_newest(path: Path) -> Path:
    """One checkpoint: the given one, or a run's newest whose files are all there.

    Raises:
        CheckpointError: there is none.
    """
    if is_checkpoint(path):
        return path
    root = find_place(path).root
    newest = next((found for found in checkpoints(root) if not verify(found, contents=False)), None)
    if newest is None:
        raise CheckpointError("no checkpoint here that is whole", where=str(root), fix="give one checkpoint")
    return newest


def run_file(place: Place) -> Path:
    """Where a run writes its run file."""
    return place.output_dir / "run.yaml"


def rules_of_run(place: Place) -> Rules | None:
    """The rules of the run file that the run has written beside its checkpoints; None where there is none.

    Raises:
        CheckpointError: it is there and does not hold together.
    """
    path = run_file(place)
    if not path.is_file():
        return None
    try:
        values = read_yaml(path).get("checkpoint", {})
        return rules_of(parse_section(CheckpointConfig, values, where=str(path), below="checkpoint"))
    except (ConfigError, ValidationError) as error:
        raise CheckpointError(f"the rules of the run cannot be read: {error}", where=str(path)) from None
