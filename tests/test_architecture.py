"""The house: who imports whom, what importing costs, how long the core is."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harmonica"
CORE = ("router", "cache", "denoise", "iepo", "sdt")

LAYERS = (
    {"calls", "override", "samplers", "site_names"}
    | {"processes", "memory", "run_again", "storage", "table"},
    {"cache", "forecast", "router"},
    {"columns", "denoise"},
    {"iepo", "sdt", "cost", "check"},
    {"search", "inference"},
    {"training"},
    {"models"},
    {"evaluation"},
    {"command_line"},
    {"demo", "train", "image_sets", "tune"},
)
"""From the ground floor up: a file imports from its own layer and from those below it."""


def arrows(path: Path) -> set[str]:
    """Return the parts of ours that a file imports, deferred and type-only imports counted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harmonica."):
            found.add(node.module.split(".")[1])
    return found


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name != "__init__":
        up = {(name, other) for other in arrows(path) if level(other) > level(name)}
        assert not up


def test_the_core_never_imports_models_not_even_inside_a_function():
    for name in CORE:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert "harmonica.models" not in ast.unparse(node), name


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, by their dotted names."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harmonica."):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= inner & FILES.keys() or {node.module}
    return modules


FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: imports(path) - {name} for name, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # a circle is a CycleError


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_library_costs_torch_only():
    heavy = "diffusers transformers matplotlib sklearn scipy tqdm safetensors harmonica.models"
    script = f"def seen(): return [m for m in {heavy.split()} if m in sys.modules]"
    script = (
        f"import sys, torch\n{script}\nbefore = seen()\nimport harmonica\nprint(before == seen())"
    )
    assert run(script) == "True\n"  # torch itself may bring some; what counts is what we add


def test_the_core_fits_on_a_train_ride():
    lines = [len(FILES[f"harmonica.{name}"].read_text("utf-8").splitlines()) for name in CORE]
    assert sum(lines) <= 700, dict(zip(CORE, lines, strict=True))


def test_no_file_of_the_library_prints_but_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        calls = [getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)]
        commands = ("demo.py", "train.py", "image_sets.py", "tune.py")
        assert "print" not in calls or path.name in commands, path


def test_models_and_samplers_need_no_transformers():
    """Only PixArt's prompts do; `from diffusers import AutoencoderKL` would bring transformers along."""
    script = (
        "import sys; import harmonica.models.pipelines.caching, harmonica.models.autoencoder\n"
        "print([m for m in ('diffusers', 'transformers') if m in sys.modules])\n"
        "import importlib.util as u; real = u.find_spec; hidden = ('transformers', 'peft', 'accelerate')\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] in hidden else real(name, *a)\n"
        "sys.modules.update(dict.fromkeys(hidden))\n"
        "from harmonica.samplers import SAMPLERS, make_sampler\n"
        "for name in SAMPLERS: make_sampler(name, 3)\n"
        "from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL\n"
        "from harmonica.models.pixart import PIXART, transformer_of\n"
        "import torch\n"
        "with torch.device('meta'): transformer_of(PIXART['pixart-alpha-256'])\n"
    )
    assert run(script) == "[]\n"
