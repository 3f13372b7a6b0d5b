"""Run files of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny import in_parts


def write_run_file(folder: Path, ds_config: str, values: dict[str, Any]) -> Path:
    """Write `values` as a run file into a new folder, with a built-in DeepSpeed config in small buckets."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "in_parts.json"
    parts.write_text(json.dumps(in_parts(ds_config)))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values | {"deepspeed": str(parts)}))
    return path
