"""Objects and figures of the host travel through gloo, whatever the accelerator has for its tensors."""

from __future__ import annotations

import json
from pathlib import Path

from launch import TESTS, start_ranks


def test_objects_take_no_device_and_no_backend_of_one(tmp_path: Path) -> None:
    job = start_ranks([str(TESTS / "scale" / "host_group_case.py"), str(tmp_path)], 2, tmp_path / "logs")
    assert job.wait() == [0, 0], job.text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.pop("alone") == "ended"  # by the time-out that was set last
    assert (first.pop("on rank 0"), second.pop("on rank 0")) == ([[0], [1]], [])
    wanted = {
        "of all ranks": "silent",
        "gathered": [{"rank": 0}, {"rank": 1}],
        "from rank 0": "a word",
        "counts": {"both": 2, "of 0": 2, "of 1": 2},
        "sum": [1.0, 1.0],
        "mean": {"rank": 0.5},
        "max": {"rank": 1.0},
        "fault": "no such folder",
        "cards": [["GPU one", True], None, None, ["GPU MIG-0", True]],
    }
    assert first == second == wanted
