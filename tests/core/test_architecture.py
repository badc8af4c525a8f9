"""Imports point one way, stay relative, and the core needs no host. See docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT)
    for path in [ROOT / "__init__.py", *ROOT.glob("nodes/**/*.py"), *ROOT.glob("lora_core/**/*.py")]
)
HOST_FOLDER = Path("lora_core/host")

# The host's top-level modules (ComfyUI 0.3.75 and 0.33).
HOST_MODULES = {
    *("comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras"),
    *("app", "execution", "folder_paths", "latent_preview", "main", "node_helpers", "nodes"),
    *("protocol", "server", "utils"),
}
OURS = {"lora_core", "lora_weave", "devtools", "demo", "benchmarks", "tests"}
# What every ComfyUI has. Other libraries are imported where they are used.
LIBRARIES = {"torch", "numpy", "PIL", "safetensors"}

# Parts of lora_core, lowest first: a part imports from lower levels only. A new module needs a
# place here; a new adapter, and a module within training/ or host/, does not.
LEVELS = [
    {"adapters", "blend", "blocks", "buckets", "captions", "events", "files", "key_map", "recent"}
    | {"name_patterns", "schedule", "settings", "sweep", "targets"},
    {"attach", "batches", "images", "peft_kinds", "safetensors_file", "similarity", "stack_rows"}
    | {"tensor_names"},
    {"cache", "fused", "metadata", "module_changes", "network", "peft_config", "pixels"}
    | {"recognition"},
    {"block_names", "dataset", "peft_encoder"},
    {"image_folder", "layer_names", "lora_reading"},
    {"diffusers_format", "families", "lora_naming"},
    {"left_out", "peft_folder"},
    {"inspection", "lora_file"},
    {"lora_model"},
    {"stack"},
    {"merge"},
    {"host", "training"},
    {"__main__"},
]
# Parts that may import less than their level allows.
ONLY = {
    "training": {
        *("adapters", "attach", "dataset", "events", "files", "key_map", "safetensors_file"),
        *("settings", "targets"),
    },
    "attach": {"adapters"},
}
every_module = pytest.mark.parametrize("module", MODULES, ids=str)


def imports(module: Path, *, at_the_top: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module that run, all or those at the top level."""
    nodes: list[ast.AST] = [ast.parse((ROOT / module).read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes = node.orelse + nodes
        elif not (at_the_top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes = list(ast.iter_child_nodes(node)) + nodes


def absolute(module: Path, *, at_the_top: bool = False) -> set[str]:
    """Top-level names of what a module imports by absolute name."""
    found: set[str] = set()
    for node in imports(module, at_the_top=at_the_top):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def relative(module: Path) -> set[Path]:
    """The pack's modules that a module imports by relative name."""
    found: set[Path] = set()
    for node in imports(module):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                candidates = (base / f"{name.name}.py", base / name.name / "__init__.py")
                modules = [path for path in candidates if path in MODULES]
                package = [
                    p for p in (base.with_suffix(".py"), base / "__init__.py") if p in MODULES
                ]
                found |= set(modules or package)
                assert modules or package, f"{module}:{node.lineno} imports what is not there"
    return found


def part(module: Path) -> str:
    """The part of lora_core that a module is or lies in."""
    return module.parts[1].removesuffix(".py")


def in_core(module: Path) -> bool:
    return module.parts[0] == "lora_core" and module != Path("lora_core/__init__.py")


def outside_host(module: Path) -> bool:
    return module.parts[0] == "lora_core" and HOST_FOLDER not in module.parents


def test_modules_are_found() -> None:
    """An empty list would let everything pass."""
    assert {Path("lora_core/training/loop.py"), HOST_FOLDER / "models.py"} <= set(MODULES)
    assert absolute(HOST_FOLDER / "models.py") & HOST_MODULES
    assert Path("lora_core/adapters/base.py") in relative(Path("lora_core/adapters/dora.py"))


@every_module
def test_own_modules_are_imported_by_relative_names(module: Path) -> None:
    """The host loads the pack under its path, so it has no name of its own."""
    assert not absolute(module) & OURS


@every_module
def test_only_the_bridge_imports_the_host(module: Path) -> None:
    """`nodes/` knows the host's node schema, nothing else of it."""
    found = absolute(module) & HOST_MODULES
    if module.parts[0] == "nodes":
        found -= {"comfy_api"}
    if HOST_FOLDER not in module.parents:
        assert not found


@every_module
def test_imports_point_one_way(module: Path) -> None:
    if module == Path("__init__.py"):
        assert relative(module) == {Path("nodes/__init__.py")}
    elif in_core(module):
        own = part(module)
        level = [index for index, parts in enumerate(LEVELS) if own in parts]
        assert level, f"{own} has no level: give it one in LEVELS"
        allowed = ONLY.get(own, set().union(*LEVELS[: level[0]]))
        wanted = {part(other) for other in relative(module) if in_core(other)} - {own}
        assert wanted <= allowed
        assert all(other.parts[0] == "lora_core" for other in relative(module))


def test_every_part_that_has_a_level_is_there() -> None:
    parts = {part(module) for module in MODULES if in_core(module)}
    assert set().union(*LEVELS, ONLY, *ONLY.values()) == parts


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter({module: relative(module) - {module} for module in MODULES}).prepare()


@every_module
def test_core_needs_only_what_every_comfyui_has(module: Path) -> None:
    if outside_host(module):
        found = absolute(module, at_the_top=True) - sys.stdlib_module_names
        assert found <= ({"torch"} if part(module) == "adapters" else LIBRARIES)


def test_every_core_module_imports_without_the_host(tmp_path: Path) -> None:
    """In a fresh interpreter that has no host, nor any library but those of every ComfyUI."""
    names = [
        ".".join(("lora_weave", *module.with_suffix("").parts)).removesuffix(".__init__")
        for module in MODULES
        if outside_host(module)
    ]
    forbidden = sorted(HOST_MODULES - {"utils", "main", "app"} | {"peft", "lycoris", "torchvision"})
    program = f"""
import importlib, sys, types
for name in {forbidden!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
pack = types.ModuleType("lora_weave")
pack.__path__ = [{str(ROOT)!r}]
sys.modules["lora_weave"] = pack
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@every_module
def test_the_document_names_every_module(module: Path) -> None:
    """docs/architecture.md is the map of the pack; a module that it lacks can't be found there."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    if module.name != "__init__.py":
        assert f"`{module.as_posix()}`" in text


def test_the_document_names_no_module_that_is_gone() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:nodes|lora_core|devtools)/[\w/]+\.py)`", text))
    assert named and all((ROOT / name).exists() for name in named)
