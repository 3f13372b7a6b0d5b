"""Imports run down: a package imports those of a lower level; `LEVELS` is the order."""

import ast
import importlib
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

import packages
import pytest

from m3i_scale.backbones import internimage
from m3i_scale.tasks.detection import export_detector

PACKAGE = Path(__file__).resolve().parent.parent / "m3i_scale"

LEVELS = {
    "defaults": 0,
    "errors": 0,
    "rank_variables": 0,
    "text": 0,
    "upgrade": 0,
    "files": 1,
    "options": 2,
    "output": 2,
    "config": 2,
    "host": 3,
    "data": 3,
    "shards": 4,
    "backbones": 4,
    "objective": 5,
    "engine": 6,
    "checkpoint": 8,
    "launch": 8,
    "run": 9,
    "checkpoint_tools": 9,
    "plan": 10,
    "report": 10,
    "elastic": 11,
    "evaluation": 11,
    "exports": 11,
    "tasks": 12,
    "jobs": 13,
    "results": 13,
    "launch_command": 13,
    "train_command": 14,
    "api": 15,
    "cli": 16,
    "__main__": 17,
}
CARRIED = {*internimage.SOURCE_FILES, *export_detector.SOURCE_FILES}
"""By exports, for a reader whose `transformers` has no such model."""
PARTITION_INTERNALS = {"ds_tensor", "ds_status", "ds_persist", "ds_param_type", "ds_active_sub_modules"}
PARTITION_INTERNALS |= {"ds_secondary_tensor"}


def package_of(path: Path) -> str:
    """`data/loader.py` → data, `config.py` → config."""
    return package_in(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def package_in(module: str) -> str:
    """`data.loader` → data. `tasks.base` belongs to config: the core knows no more of tasks."""
    return "config" if module.startswith("tasks.base") else module.partition(".")[0]


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, full module name), at any depth of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names]
    return found


def faults_of(package: str, source: str, *, standalone: bool = False) -> list[str]:
    """What a file of `package` imports and must not.

    Files that exports carry (`standalone`) find each other by relative imports, as `transformers` wants it, and import
    nothing else of the package.
    """
    faults = []
    for line, name in imports_of(ast.parse(source)):
        top, _, rest = name.partition(".")
        if name.startswith(".") and not standalone:
            faults.append(f"line {line}: relative import {name}")
        elif top in ("tests", "benchmarks", "launchers"):
            faults.append(f"line {line}: the package imports {top}")
        elif top == "deepspeed" and LEVELS[package] < LEVELS["engine"]:
            faults.append(f"line {line}: {package} imports deepspeed")
        elif top == "m3i_scale" and standalone:
            faults.append(f"line {line}: an export would not find {name}")
        elif top == "m3i_scale":
            other = package_in(rest)
            if other in LEVELS and other != package and LEVELS[other] >= LEVELS[package]:
                faults.append(f"line {line}: {package} imports {other}")
            elif other not in LEVELS and other != "__version__":
                faults.append(f"line {line}: {name} is in no known package")
    return faults


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_package_has_a_level():
    assert {package_of(path) for path in FILES} <= set(LEVELS)


def test_imports_run_downwards():
    faults = {
        path: faults_of(package_of(path), path.read_text(encoding="utf-8"), standalone=path in CARRIED)
        for path in FILES
    }
    assert {path: found for path, found in faults.items() if found} == {}


def module_of(path: Path) -> str:
    """`m3i_scale/data/loader.py` → m3i_scale.data.loader."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_files_import_each_other_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    graph = {}
    for name, path in modules.items():
        imported = set()
        for _, found in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            module = next((module for module in (found, found.rpartition(".")[0]) if module in modules), name)
            imported |= {module} - {name}
        graph[name] = imported
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("data", "from m3i_scale.objective.build import build_objective"),
        ("objective", "def f():\n    import deepspeed"),
        ("objective", "from m3i_scale.engine import engine"),
        ("exports", "from m3i_scale.evaluation.commands import evaluate"),
        ("run", "import m3i_scale.evaluation.commands"),
        ("report", "from m3i_scale.exports.card import cell"),
        ("errors", "from m3i_scale.config import RunConfig"),
        ("run", "from .trainer import Trainer"),
        ("engine", "from m3i_scale.misc import f"),
        ("run", "from m3i_scale import cli"),
    ],
)
def test_an_upward_import_is_found(package, source):
    assert len(faults_of(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (
            "run",
            "from m3i_scale.engine.engine import build_engine\nfrom m3i_scale.run.meter import Meter\nimport deepspeed",
        ),
        ("exports", "from m3i_scale import __version__"),
        ("data", "import torch\nfrom m3i_scale.errors import DataError"),
    ],
)
def test_a_downward_import_is_fine(package, source):
    assert faults_of(package, source) == []


def internals_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return PARTITION_INTERNALS & (names | texts)


def test_one_file_touches_the_internals_of_the_partition():
    users = {path.relative_to(PACKAGE).as_posix() for path in FILES if internals_in(path)}
    assert users == {"engine/partition.py"}


def test_files_stay_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    # A model that an export carries is one flat file, as those of `transformers` are.
    assert {path: length for path, length in lines.items() if length > (650 if path in CARRIED else 500)} == {}


def missing_imports(path: Path) -> list[str]:
    """Names that a file imports from the package, and that the package does not have."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("m3i_scale"):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                is_module = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{name}")
                if not hasattr(module, name) and not is_module:
                    found.append(f"{path.name}:{node.lineno}: {node.module}.{name}")
    return found


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "launchers"])
def test_what_is_imported_outside_the_package_exists(folder: str) -> None:
    """Some of these files run only on a GPU, or with peers that are not installed."""
    assert [name for path in sorted((ROOT / folder).rglob("*.py")) for name in missing_imports(path)] == []


def test_a_missing_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from m3i_scale.plan import planning\nfrom m3i_scale.plan.planning import nothing")
    assert missing_imports(tmp_path / "a.py") == ["a.py:2: m3i_scale.plan.planning.nothing"]


def test_the_core_and_the_extensions_import_what_they_may() -> None:
    # Both ways: an import that is not listed is a fault, and so is a line of the list that is not needed any more.
    assert packages.forbidden_imports() == packages.LAYOUT["exceptions"]


def test_every_name_of_a_package_is_that_of_modules() -> None:
    known = {f"{module}." for module in packages.MODULES}
    for names in [*packages.LAYOUT["core"].values(), *packages.LAYOUT["extensions"].values()]:
        assert [name for name in names if not any(module.startswith(f"{name}.") for module in known)] == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("run", "tasks", False),
        ("data", "shards", False),
        ("exports", "tasks", False),
        ("exports", "evaluation", False),
        ("data", "entry", False),
        ("tasks", "exports", True),
        ("evaluation", "host", True),
        ("entry", "elastic", True),
    ],
)
def test_a_wall_between_packages(importer: str, imported: str, allowed: bool) -> None:
    assert packages.is_allowed(importer, imported) is allowed


LOADS = ("from_pretrained", "from_config")
ROOT = PACKAGE.parent
OWN_CODE = {"exports/fresh.py"}
"""Load a folder that this very package has just written, with code of its own where it put that there."""


def trusting_loads(source: str, *, own_code: bool = False) -> list[int]:
    """Lines that load by a class that may run code of what it loads, without saying that it must not."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADS):
            continue
        chosen = node.func.value
        if isinstance(chosen, ast.Name) and not chosen.id.startswith("Auto"):
            continue  # one class, whose code is installed
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        says = given.get("trust_remote_code")
        never = isinstance(says, ast.Constant) and says.value is False
        if not never and not (own_code and isinstance(says, ast.Name) and says.id == "has_code"):
            lines.append(node.lineno)
    return lines


LOADING = [
    path
    for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "launchers", ROOT / "examples")
    for path in folder.rglob("*.py")
]


def test_no_load_runs_code_of_what_it_loads():
    faults = {}
    for path in LOADING:
        own = path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).as_posix() in OWN_CODE
        faults |= {f"{path}:{line}": line for line in trusting_loads(path.read_text(encoding="utf-8"), own_code=own)}
    assert faults == {}


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("AutoTokenizer.from_pretrained(folder)", True),
        ("transformers.AutoModel.from_config(config, trust_remote_code=True)", True),
        ("getattr(transformers, name).from_pretrained(folder, trust_remote_code=own)", True),
        ("AutoModel.from_pretrained(folder, **options)", True),
        ("AutoModel.from_pretrained(folder, trust_remote_code=False)", False),
        ("ViTModel.from_pretrained(folder)", False),
    ],
)
def test_a_load_that_may_run_code_is_found(source, faulty):
    assert bool(trusting_loads(source)) is faulty
