"""The method of docs/guides/custom-recipe.md, in a file outside of the package, trains from a run file alone."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from launch import ROOT, environment, start_ranks
from shapes import metrics, write_run

STEPS = 20


def test_a_method_of_ones_own_trains_from_its_run_file(shards: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / "custom-recipe.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^cat > /data/code/my_package/my_module\.py <<'END'\n(.*?)^END$", page, flags=re.DOTALL | re.MULTILINE
    )
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(code)
    own = [f"recipe.targets.{n}.regularizer={{kind: my_package.my_module.Norm, strength: 0.2}}" for n in (0, 1)]
    run_file = write_run(tmp_path, shards, "byol", f"optim.steps={STEPS}", f"checkpoint.every_steps={STEPS}", *own)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    job = start_ranks(["-m", "m3i_scale", "train", str(run_file)], 1, tmp_path / "logs", PYTHONPATH=path)
    assert job.wait() == [0], job.text()[-4000:]
    records = metrics(run_file)
    assert list(records) == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["loss"]) for record in records.values())
