"""`python -m m3i_scale` says everything, leaves with the command's code, and does not tear the interpreter down."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, runpy, sys
atexit.register(lambda: print("torn down", file=sys.stderr))
sys.argv = ["m3i-scale", *sys.argv[1:]]
runpy.run_module("m3i_scale", run_name="__main__")
"""


def call(*arguments):
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"), [(["train", "nope.yaml"], 2, "no run file"), (["--help"], 0, ""), ([], 2, "")]
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
