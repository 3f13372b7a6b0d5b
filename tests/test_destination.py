"""Places to write to: every option and every setting that names one refuses the same ones."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.config import RunConfig, load_run, parse_section
from m3i_scale.errors import ConfigError
from m3i_scale.files import local_path
from m3i_scale.run.check import errors_of

WRITERS = {
    "recipes show m3i --output": "recipe.md",
    "init /data/photos --output": "run.yaml",
    "evaluate /data/export --data /data/shards --pictures": "pictures",
    "evaluate /data/export --data /data/shards --output": "evaluation.json",
    "evaluate /data/export --data /data/shards --cache-dir": "features",
    "embed /data/export --data /data/photos --output": "features.npz",
    "compare /data/a /data/b --data /data/shards --output": "page.html",
    "compare /data/a /data/b --data /data/shards --cache-dir": "features",
    "export /data/run --output": "export",
    "report /data/run --output": "report.html",
    "checkpoint consolidate /data/run --output": "whole",
    "shards make imagefolder --input /data/birds --output": "made",
    "shards make manifest --input /data/birds.csv --output": "made",
    "shards make masks --images /data/i --masks /data/m --labels /data/l --output": "made",
    "shards make coco --input /data/coco --output": "made",
    "shards make huggingface --input /data/food --output": "made",
    "shards make webdataset --input /data/wds --output": "made",
    "shards check /data/shards --repair": "repaired",
    "shards check /data/shards --quarantine": "faults.jsonl",
    "shards split /data/shards --output": "split",
    "shards merge /data/shards /data/more --output": "merged",
    "finetune classification /data/export --data /data/birds --shards": "packed",
    "finetune segmentation /data/export --data /data/scenes --shards": "packed",
    "finetune detection /data/export --data /data/coco --shards": "packed",
}
READERS = {"--input", "--root", "--images", "--masks", "--labels", "--evaluation", "--data", "--cluster", "--hostfile"}
READERS |= {"--features", "--blend"}
READING = {"report --pictures"}
NOWHERE = ("s3://bucket/run", "hf://u/x", "file:///data/x", "$HOME/x", "/data/${JOB}/x")


def path_options(group: typer.Typer, above: str = "") -> Iterator[str]:
    """`shards merge --output`: every option of the command line that is a path."""
    for command in group.registered_commands:
        name = f"{above}{command.name or command.callback.__name__.replace('_', '-').rstrip('-')}"
        for parameter, hint in get_type_hints(command.callback, include_extras=True).items():
            options = [item for item in get_args(hint)[1:] if isinstance(item, OptionInfo)]
            if options and Path in types_in(hint):
                given = options[0].default  # where typer leaves the first name that is given
                yield f"{name} {given if isinstance(given, str) else '--' + parameter.replace('_', '-')}"
    for part in group.registered_groups:
        yield from path_options(part.typer_instance, f"{above}{part.name} ")


def types_in(hint: Any) -> set[Any]:
    return {hint}.union(*(types_in(part) for part in get_args(hint) if not isinstance(part, OptionInfo | str)))


def test_every_option_that_is_a_path_is_known_to_read_or_to_write() -> None:
    options = set(path_options(app))
    assert {"shards merge --output", "report --output", "finetune detection --shards"} <= options
    reading = {option for option in options if option in READING or option.rpartition(" ")[2] in READERS}
    commands = {" ".join(word for word in words.split() if "/" not in word and word != "m3i") for words in WRITERS}
    writing = {f"{words.partition(' --')[0]} {words.rpartition(' ')[2]}" for words in commands}
    assert options - reading == writing


def refusal(words: list[str]) -> ConfigError:
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, ConfigError), error
    assert error.exit_code == 2
    return error


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_refuses_the_same_places(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    option = command.rsplit(maxsplit=1)[-1]
    for place in ("s3://bucket/x", "nas:/x", "$HOME/x", "${RUNS}/x", "~no-such-user/x"):
        assert f"{option} " in str(refusal([*command.split(), place]).where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", WRITERS)
def test_no_command_replaces_a_shard(command: str, tmp_path: Path) -> None:
    shard = tmp_path / "images-000000.tar"
    shard.write_bytes(b"images")
    option = command.rsplit(maxsplit=1)[-1]
    assert f"{option} " in str(refusal([*command.split(), str(shard)]).where)
    assert shard.read_bytes() == b"images"


def test_the_home_of_the_user_is_meant_by_a_tilde_in_options_too(tmp_path: Path, monkeypatch) -> None:
    """A shell leaves it alone in --quarantine=~/faults.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    result = CliRunner().invoke(app, ["shards", "check", str(shard), "--workers=1", "--quarantine=~/faults.jsonl"])
    assert result.exit_code == 2, result.output
    assert (tmp_path / "home" / "faults.jsonl").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize("key", ["output_dir", "data.cache_dir"])
def test_settings_refuse_addresses_and_variables(key: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("m3i", [f"{key}={place}"])
    assert key in caught.value.what
    assert place in caught.value.what
    assert caught.value.fix


def test_what_a_finished_run_has_written_is_still_read() -> None:
    """Its folder may bear any name."""
    run = parse_section(RunConfig, {"recipe": {}, "output_dir": "s3:/bucket/run"}, where="run.yaml", stored=True)
    assert run.output_dir == Path("s3:/bucket/run")


def test_a_run_does_not_write_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def places(output_dir: Path) -> list[str]:
        return [str(fault.where) for fault in errors_of("m3i", [f"output_dir={output_dir}"])]

    for wrong in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        assert places(wrong) == ["data.datasets", f"output_dir: {wrong}"]
    assert places(tmp_path / "run") == ["data.datasets"]


def test_an_ordinary_place_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("run", "a/b", "a/~", "data:1/x", str(tmp_path / "new.tar"), "/dev/stdout"):
        assert local_path(place) == Path(place)


def test_the_default_folder_is_not_looked_into_if_another_one_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/run/checkpoints/step-00000003").mkdir(parents=True)  # is not good
    places = [str(fault.where) for fault in errors_of("m3i", ["output_dir=s3://bucket/run"])]
    assert places == ["override output_dir=s3://bucket/run", "data.datasets"]
