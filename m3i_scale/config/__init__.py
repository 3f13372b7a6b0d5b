"""The typed run file: what is trained, on which data, for how long, on which engine.

A run file is YAML. It may extend another one (`extends: m3i` for a built-in recipe, or a path); every field can be
overridden on the command line as `section.key=value`. Unknown keys are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from typing_extensions import Self

from m3i_scale.config.data import AugmentConfig, DataConfig, DistortionConfig, SourceConfig
from m3i_scale.config.guard import GuardConfig, SpikeConfig
from m3i_scale.config.sections import Section, SectionT
from m3i_scale.errors import ConfigError, did_you_mean

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistortionConfig",
    "EvaluationConfig",
    "GuardConfig",
    "HardwareConfig",
    "KeepBestConfig",
    "LogConfig",
    "OptimConfig",
    "RunConfig",
    "Section",
    "SectionT",
    "SourceConfig",
    "SpikeConfig",
    "TextConfig",
    "TimeoutsConfig",
    "find_run_file",
    "known_recipes",
    "known_runs",
    "load_run",
    "parse_section",
    "read_yaml",
    "resource_folder",
    "run_values",
]

_PACKAGE = Path(__file__).resolve().parent.parent


def resource_folder(name: Literal["recipes", "ds_configs"]) -> Path:
    """The folder of built-in files: beside the package in a checkout, inside it when installed as a wheel."""
    beside = _PACKAGE.parent / name
    return beside if beside.is_dir() else _PACKAGE / f"_{name}"


class BackboneConfig(Section):
    """The model that is being pre-trained (f_θ)."""

    preset: str | None = None
    """A size by name, vit-b/16 where nothing else is said; `config` overrides single fields."""
    from_pretrained: str | None = None
    """Start from published weights instead of random ones: a folder or Hub id of `transformers`, timm or open_clip, or
    one file with the names of timm or open_clip (docs/backbones.md)."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the `transformers` configuration, e.g. {hidden_size: 192}."""
    attention: Literal["own", "mixed"] = "own"
    """In mixed inputs, tokens attend within their own image (own) or across both images (mixed)."""
    attention_kernel: Literal["sdpa", "eager"] = "sdpa"
    """How attention is computed in the Transformers that are trained or averaged: torch's fused kernel, or matrix
    products and a softmax, which are faster for short sequences in bf16 on CPUs (docs/performance.md) and need more
    memory."""
    activation_checkpointing: str = "none"
    """Which layers recompute their activations in the backward pass (docs/memory.md): none | full | every_N |
    selective (matrix products and attention are kept) | offload (as full, layer inputs wait in host memory) |
    budget_GIB (as few layers as fit)."""
    compile: bool = False
    """Whether the layers that are trained go through `torch.compile`, one by one (docs/performance.md)."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.from_pretrained is not None and self.preset is not None:
            raise ValueError("preset has no effect beside from_pretrained: set one of them to null")
        return self


class TextConfig(Section):
    """The text target encoder, trained jointly. Only built when the recipe has a text target."""

    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the `transformers` BERT configuration; the default is the BERT-Base shape (12 layers, 768)."""
    tokenizer: str | None = None
    """A tokenizer folder or Hub id. Default: the `tokenizer/` folder that `shards make` wrote beside the shards."""
    max_tokens: int = Field(default=64, ge=4)
    """Captions are cut to this many tokens."""


class OptimConfig(Section):
    """Optimisation: AdamW, warm-up, cosine."""

    batch_size: int = Field(default=4096, ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples per rank in one forward pass. batch_size = micro_batch_size × accumulation × ranks."""
    steps: int = Field(default=100_000, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate, as is (no scaling rule is applied)."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the last step."""
    warmup_steps: int = Field(default=2_500, ge=0)
    """Linear warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled decay of matrices; biases, norms and other vectors have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient-norm limit; 0 switches clipping off."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})")
        return self


class KeepBestConfig(Section):
    """Checkpoints that stay because of a figure of data.validation."""

    metric: str
    """As metrics.jsonl calls it: evaluation/loss, evaluation/<group>/loss … (docs/metrics.md)."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest is the best."""
    count: int = Field(default=1, ge=1)
    """How many stay."""


class CheckpointConfig(Section):
    """Saving, keeping and resuming."""

    every_steps: int = Field(default=1_000, ge=1)
    """A checkpoint is committed after every so many steps, and at the end."""
    keep_latest: int = Field(default=2, ge=1)
    """The newest so many stay. Others are removed once a newer one has been committed, unless a rule below wants them
    (docs/checkpoints.md)."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Those of steps that are multiples of this stay."""
    keep_best: KeepBestConfig | None = None
    """Those with the best figure of the evaluation at their step stay."""
    max_gib: float | None = Field(default=None, gt=0)
    """All together take no more than this, whatever the rules above want; the last good one stays in any case."""
    background: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory; false: it waits, and needs none."""
    probe: bool = True
    """Two samples and their loss are saved too, and the loss is computed again at a resume; costs a forward pass."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint of output_dir, start anew where there is none;
    never: refuse to run where there is one; or the path of a checkpoint."""


class LogConfig(Section):
    """What is written while the run goes on. metrics.jsonl is always written."""

    every_steps: int = Field(default=10, ge=1)
    """Metrics are reduced over the ranks and written after every so many steps."""
    progress: bool = True
    """A progress bar on rank 0 (plain lines where the output is no terminal)."""
    tensorboard: bool = False
    """Event files in output_dir/tensorboard (needs the `tensorboard` package)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases (needs the `wandb` package)."""


class HardwareConfig(Section):
    """The machine, as far as a run must be told."""

    peak_tflops: float | str | None = None
    """What one rank's device computes at most, which MFU is a share of: 10¹² FLOPs a second, or a name such as
    h100-bf16. Default: a short matrix product measures it at the start."""


class TimeoutsConfig(Section):
    """How long ranks wait for each other before they take one for dead (docs/failures.md). Once data are read, longer
    than data.stall_timeout_s, so that data that cannot be had are told as that."""

    join_s: float = Field(default=300.0, gt=0)
    """Until all ranks have started and reached rank 0; torchrun waits by itself."""
    start_s: float = Field(default=1800.0, gt=0)
    """Until the second step is done, and while the run saves, evaluates or goes back."""
    step_s: float = Field(default=960.0, gt=0)
    """Inside of a step."""


class EvaluationConfig(Section):
    """The evaluation hook: losses on data.validation while training."""

    every_steps: int = Field(default=0, ge=0)
    """0 switches the hook off."""
    batches: int = Field(default=8, ge=1)
    """Micro-batches per rank, the same ones every time."""


class RunConfig(Section):
    """A whole run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""
    output_dir: Path = Path("runs/run")
    """Everything the run writes lies here."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of first weights, of the order of samples and of their views and masks."""
    recipe: dict[str, Any]
    """Inputs × targets (docs/recipes.md)."""
    backbone: BackboneConfig = BackboneConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    deepspeed: str = "zero3_bf16"
    """A DeepSpeed JSON: a name from ds_configs/, or a path."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    hardware: HardwareConfig = HardwareConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()

    @model_validator(mode="after")
    def _stalls_are_told(self) -> Self:
        for name, limit_s in self.timeouts:
            if name != "join_s" and limit_s <= self.data.stall_timeout_s:  # nothing is read yet while ranks join
                raise ValueError(
                    f"timeouts.{name} ({limit_s:g}) must be longer than data.stall_timeout_s "
                    f"({self.data.stall_timeout_s:g}): a reader that stalls would be taken for a dead rank"
                )
        return self


def known_runs() -> dict[str, Path]:
    """Built-in run files by name: recipes, and sizes of them."""
    return {path.stem: path for path in sorted(resource_folder("recipes").glob("*.yaml"))}


def known_recipes() -> dict[str, Path]:
    """Built-in run files that define a recipe of their own; those that extend another one are sizes of it."""
    return {name: path for name, path in known_runs().items() if "extends" not in read_yaml(path)}


def find_run_file(name_or_path: str) -> Path:
    """A built-in name (`m3i`) or a path.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    built_in = known_runs()
    if name_or_path in built_in:
        return built_in[name_or_path]
    raise ConfigError(
        f"no run file '{name_or_path}'",
        where=str(path.absolute()),
        fix=f"give a path, or a built-in name: {did_you_mean(name_or_path, built_in)}",
    )


def load_run(name_or_path: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file, follow `extends`, apply `key=value` overrides, check everything.

    Raises:
        ConfigError: unreadable YAML, an unknown key, a value of the wrong type, or a cycle of `extends`.
    """
    values = run_values(name_or_path, overrides)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        path = find_run_file(name_or_path)
        raise _explain(RunConfig, error, _origin(error, overrides or [], path)) from None


def run_values(name_or_path: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a run file says, `extends` and `key=value` overrides applied, and nothing else checked.

    Raises:
        ConfigError: unreadable YAML, an override that is none, or a cycle of `extends`.
    """
    values = _read_with_base(find_run_file(name_or_path), ())
    for override in overrides or []:
        _apply_override(values, override)
    return values


def parse_section(kind: type[SectionT], values: Any, *, where: str, below: str = "") -> SectionT:
    """`values` as a `kind`; the first fault becomes a ConfigError that names the key and the nearest known one.

    Args:
        kind: the section.
        values: what was read.
        where: named in errors.
        below: the key of the run file that holds the section.

    Raises:
        ConfigError: what does not hold together.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, error, where, below) from None


def _origin(error: ValidationError, overrides: list[str], path: Path) -> str:
    """Where the first fault was written: the last override of that key or of a part of it, else the run file."""
    fault = [str(part) for part in error.errors()[0]["loc"]]
    for override in reversed(overrides):
        key = override.partition("=")[0].split(".")
        shorter = min(len(key), len(fault))
        if key[:shorter] == fault[:shorter]:
            return f"override {override}"
    return str(path)


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError("run files extend each other in a circle", where=" → ".join(map(str, [*seen, path])))
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    base_path = beside if beside.is_file() else find_run_file(str(base))
    return _merge(_read_with_base(base_path, (*seen, path)), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the run file: {error}", where=str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("a run file is a YAML mapping", where=str(path), fix="see recipes/m3i.yaml")
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not an override", fix="write section.key=value, e.g. optim.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of '{key}' is not YAML: {error}") from None
    if isinstance(value, str) and text.strip() == value and _is_number(value):
        value = float(value)  # YAML 1.1 reads 3e-4 as text; nobody means that. In quotes it is meant
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"'{key}' goes below a single value")


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"'{key}' goes below a single value")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        names = [
            f"{number} {item['name']}" for number, item in enumerate(node) if isinstance(item, dict) and "name" in item
        ]
        fix = f"count from 0: {', '.join(names)}" if names else None
        raise ConfigError(f"'{part}' in '{key}' is no index of a list of {len(node)}", fix=fix)
    return int(part)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return any(character.isdigit() for character in text)


def _explain(kind: type[Section], error: ValidationError, where: str, below: str = "") -> ConfigError:
    fault, *others = error.errors()
    if fault["type"] == "missing":  # often a misspelt key, which pydantic tells after what it therefore misses
        beside = (other for other in others if other["loc"][:-1] == fault["loc"][:-1])
        fault = next((other for other in beside if other["type"] == "extra_forbidden"), fault)
    loc = [part for part in fault["loc"] if not str(part).startswith(("float", "list["))]  # branches of a union
    key = ".".join([*([below] if below and loc else []), *map(str, loc)])
    if fault["type"] == "extra_forbidden":
        hint = _nearest(kind, fault["loc"])
        return ConfigError(f"unknown key '{key}'", where=where, fix=hint)
    if fault["type"] == "missing":
        return ConfigError(f"'{key}' is missing", where=where, fix=_choices_at(kind, fault["loc"]))
    if fault["type"] == "value_error":  # a rule of ours: its sentence says all
        return ConfigError(f"'{key}': {fault['ctx']['error']}" if key else str(fault["ctx"]["error"]), where=where)
    default = _default_at(kind, fault["loc"])
    fix = None if default is None else f"e.g. the default, {key}={default}"
    return ConfigError(f"'{key}': {fault['msg']} (got {fault['input']!r})", where=where, fix=fix)


def _nearest(kind: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """What an unknown key may have been meant to be: one of the same name in another section, or one nearby."""
    name = str(path[-1])
    elsewhere = sorted(found for found in _keys_of(kind) if found.rpartition(".")[2] == name)
    if elsewhere:
        return "did you mean " + " or ".join(f"'{found}'" for found in elsewhere) + "?"
    return did_you_mean(name, _fields_at(kind, path[:-1]))


def _keys_of(kind: type[BaseModel], above: str = "") -> list[str]:
    """All keys of a section and of those in it, with dots; none below keys that the user names, as of sources."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(f"{above}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _keys_of(field.annotation, f"{above}{name}.")
    return found


def _choices_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> str | None:
    """The values of a field that has a few; None for others."""
    field = _section_at(kind, path[:-1]).model_fields.get(str(path[-1]))
    values = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return f"one of {', '.join(map(str, values))}" if values else None


def _default_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> str | None:
    """The default value of a plain field, as it is written on the command line; None where there is none."""
    field = _section_at(kind, path[:-1]).model_fields.get(str(path[-1])) if path else None
    default = field.get_default() if field is not None else None
    return f"{default:g}" if isinstance(default, float) else str(default) if isinstance(default, int | str) else None


def _fields_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that `path` leads to; the whole of `kind` where the path leaves typed sections."""
    return list(_section_at(kind, path).model_fields)


def _section_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    here: type[BaseModel] = kind
    for part in path:
        field = here.model_fields.get(str(part))
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if sections:
            here = sections[0]
    return here
