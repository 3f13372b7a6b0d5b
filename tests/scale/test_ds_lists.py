"""The lists of known settings against the installed DeepSpeed, and the documentation against both."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import get_args

from ds_files import RUN

from m3i_scale.engine.deepspeed.resolve import known_ds_configs, load_ds_config, resolve
from m3i_scale.engine.deepspeed.rules import READ_BY
from m3i_scale.engine.deepspeed.schema import fields_at


def test_documentation_is_true():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "deepspeed.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    resolve(json.loads(example[1]), **RUN, where="docs/reference/deepspeed.md")
    assert set(re.findall(r"^\| `(zero\w+)` \|", page, re.MULTILINE)) == set(known_ds_configs())
    for key in resolve(load_ds_config("zero3_bf16"), **RUN, where="x").filled_in:
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


def test_deepspeed_reads_every_allowed_key():
    from deepspeed.runtime.config import DeepSpeedConfig

    sections = {name: recorder({}) for name in ("data_types", "flops_profiler")}
    top = recorder({"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {}}, **sections})
    DeepSpeedConfig(top)
    assert fields_at(()) - top.seen == set()
    for name, section in sections.items():
        assert fields_at((name,)) - section.seen == set()


def test_typed_sections_allow_only_keys_that_deepspeed_types():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    sections |= {"comms_logger": CommsLoggerConfig, "timers.throughput": DeepSpeedThroughputTimerConfig}
    zero = DeepSpeedZeroConfig.model_fields
    for name in ("offload_optimizer", "offload_param"):
        kinds = (zero[name].annotation, *get_args(zero[name].annotation))
        sections[f"zero_optimization.{name}"] = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    for name, kind in sections.items():
        typed = {field.alias or key for key, field in kind.model_fields.items()}
        assert fields_at(tuple(name.split("."))) <= typed, name


def test_optimizers_take_the_keys_that_are_passed_on():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from torch.optim import AdamW

    for kind in (AdamW, DeepSpeedCPUAdam, FusedAdam):
        assert READ_BY[kind.__name__] <= set(inspect.signature(kind.__init__).parameters)
