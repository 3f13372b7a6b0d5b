"""`python -m m3i_scale` says everything, leaves with the command's code, and does not tear the interpreter down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text

from m3i_scale.__main__ import run
from m3i_scale.cli import app

SCRIPT = """
import atexit, runpy, sys
atexit.register(lambda: print("torn down", file=sys.stderr))
sys.argv = ["m3i-scale", *sys.argv[1:]]
runpy.run_module("m3i_scale", run_name="__main__")
"""


def call(*arguments):
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)


HELP_OF_ALL = """
import sys
import click, typer
from m3i_scale.cli import app

def tell_all(command, context):
    command.get_help(context)
    told = 1
    for name, part in getattr(command, "commands", {}).items():
        told += tell_all(part, click.Context(part, info_name=name, parent=context))
    return told

root = typer.main.get_command(app)
def tell_imported():
    print(*sorted({module.partition(".")[0] for module in sys.modules}), file=sys.stderr)

print(tell_all(root, click.Context(root, info_name="m3i-scale")))
tell_imported()
for line in ("--version", "-h", "recipes", "backbones", "config", "config optim", "config --resolved m3i"):
    arguments = line.split()
    app(arguments, standalone_mode=False)
tell_imported()
"""
HEAVY = {"torch", "torchvision", "transformers", "deepspeed", "pyarrow", "webdataset", "numpy", "sklearn", "PIL"}


def test_help_and_tables_import_nothing_that_takes_long():
    """Seconds of a processor for one line of help, as it was."""
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True)
    assert "imagefolder" in done.stdout
    assert "internimage-g" in done.stdout
    by_help, by_tables = (set(line.split()) for line in done.stderr.splitlines())
    assert "typer" in by_help
    assert by_help & HEAVY == set()
    assert by_tables & HEAVY == set()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "nope.yaml"], 2, "no config file"),
        (["--help"], 0, ""),
        ([], 2, ""),
        (["train", "m3i", "--optim.lr", "1e-3"], 2, "write optim.lr=VALUE"),
        (["launch", "m3i", "--with", "local", "--optim.lr=1e-3"], 2, "write optim.lr=1e-3"),
    ],
)
def test_codes(arguments, code, says):
    done = call(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "torn down" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_document_arrives_whole():
    done = call("recipes", "--json")
    assert done.returncode == 0
    assert {row["name"] for row in json.loads(done.stdout)} >= {"supervised", "clip", "mae", "sim", "m3i"}


def test_interrupted_it_leaves_as_a_shell_expects_and_waits_for_no_thread():
    script = (
        "import threading, time, m3i_scale.cli, m3i_scale.__main__ as door\n"
        "def interrupted():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    raise KeyboardInterrupt\n"
        "m3i_scale.cli.main = interrupted\n"
        "door.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupted_command_says_so_in_one_line():
    script = (
        "import sys, m3i_scale.report.recipe_table as table, m3i_scale.__main__ as door\n"
        "def interrupted():\n"
        "    raise KeyboardInterrupt\n"
        "table.built_in_rows = interrupted  # below typer\n"
        "sys.argv = ['m3i-scale', 'recipes']\n"
        "door.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_command_and_the_module_have_the_same_door():
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert f'm3i-scale = "{run.__module__}:{run.__name__}"' in project


def texts(command, path=()):
    """Every word of help, below a command."""
    yield path, command.help or ""
    yield path, command.epilog or ""
    for parameter in command.params:
        yield (*path, parameter.name), getattr(parameter, "help", None) or ""
    for name, below in getattr(command, "commands", {}).items():
        yield from texts(below, (*path, name))


def test_no_brackets_of_help_are_taken_for_markup():
    found = list(texts(typer.main.get_command(app)))
    assert any("[" in text for _, text in found)
    for path, text in found:
        assert Text.from_markup(text).plain == text.replace("\\[", "["), path
