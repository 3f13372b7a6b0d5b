"""The lists of known settings against the installed DeepSpeed, and the documentation against both."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ds_files import RUN

from m3i_scale.scale.ds_config import (
    known_ds_configs,
    load_ds_config,
    resolve,
)


def test_documentation_is_true():
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    resolve(json.loads(example[1]), **RUN, where="docs/deepspeed.md")
    assert set(re.findall(r"^\| `(zero\w+)` \|", page, re.MULTILINE)) == set(known_ds_configs())
    for key, _, _ in resolve(load_ds_config("zero3_bf16"), **RUN, where="x").explained:
        assert key.removeprefix("optimizer.params") in page


class Recorder(dict):
    """Notes every key that is asked for, also of the copy that DeepSpeed makes."""

    seen: set[str]

    def _note(self, key):
        self.seen.add(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        copied = type(self)(self)
        copied.seen = self.seen
        return copied


def recorder(values):
    made = Recorder(values)
    made.seen = set()
    return made


def test_lists_agree_with_what_deepspeed_reads():
    """Every key that the installed version asks for is allowed or has a reason, and no allowed key goes unread."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from m3i_scale.scale.ds_schema import REFUSED, known_tree

    sections = {name: recorder({}) for name in ("data_types", "checkpoint", "flops_profiler")}
    top = recorder({"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {}}, **sections})
    DeepSpeedConfig(top)
    explained = set(REFUSED) | set(known_tree())
    assert top.seen - explained - _removed() == set()
    assert set(known_tree()) - top.seen == set()
    for name, section in sections.items():
        own = {path.removeprefix(name + ".") for path in REFUSED if path.startswith(name + ".")}
        allowed = set(known_tree()[name])
        assert section.seen - own - allowed == set()
        assert allowed - section.seen == set()


def _removed():
    from deepspeed.runtime import config

    return set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_stage_tables_name_real_keys():
    from m3i_scale.scale.ds_rules import DYNAMIC_SCALE_ONLY, NVME_ONLY, STAGE3_ONLY, STAGE12_ONLY
    from m3i_scale.scale.ds_schema import REFUSED, known_tree

    zero = known_tree()["zero_optimization"]
    assert zero.keys() >= STAGE3_ONLY | STAGE12_ONLY
    assert known_tree()["fp16"].keys() >= DYNAMIC_SCALE_ONLY
    assert zero["offload_optimizer"].keys() | zero["offload_param"].keys() >= NVME_ONLY
    for path in REFUSED:
        if path.startswith("zero_optimization."):
            assert path.split(".")[1] in zero
