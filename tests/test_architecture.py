"""The house: who imports whom, what importing costs, how long the core is."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "harmonica"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
CORE = ("router", "cache", "denoise", "iepo", "sdt")

LAYERS = (
    {"calls", "fused_sum", "override", "samplers", "site_names"}
    | {"processes", "memory", "run_again", "storage", "table", "schedule_fields", "values"},
    {"cache", "forecast", "router"},
    {"denoise"},
    {"iepo", "sdt", "cost", "check"},
    {"search", "inference"},
    {"training"},
    {"models"},
    {"command_line", "pictures"},
    {"demo", "train", "image_sets", "tune"},
)
"""From the ground floor up: a file imports from its own layer and from those below it."""


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, deferred and type-only imports counted."""
    modules = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("harmonica."):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= inner & FILES.keys() or {node.module} - {"harmonica"}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("harmonica.")}
    return modules


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_imports_point_down_even_inside_a_function_and_make_no_circle():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            parts = {module.split(".")[1] for module in imports(path)}
            up = {(str(path), part) for part in parts if level(part) > level(name)}
            assert not up
    graph = {name: imports(path) - {name} for name, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # a circle is a CycleError


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_the_library_costs_torch_only():
    heavy = "diffusers transformers matplotlib sklearn scipy tqdm safetensors harmonica.models"
    script = f"def seen(): return [m for m in {heavy.split()} if m in sys.modules]"
    script = f"import sys, torch\n{script}\nbefore = seen()\nimport harmonica\n"
    # torch itself may bring some; what counts is what we add
    assert run(f"{script}print(before == seen())") == "True\n"


def test_the_core_fits_on_a_train_ride():
    lines = [len(FILES[f"harmonica.{name}"].read_text("utf-8").splitlines()) for name in CORE]
    assert sum(lines) <= 700, dict(zip(CORE, lines, strict=True))


def test_lines_functions_and_files_of_the_library_stay_short():
    for name, path in FILES.items():
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) <= 300, name
        assert all(len(line) <= 100 for line in lines), name
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{name}: {node.name}"


def test_training_by_the_paper_loads_1100_lines_at_most():
    """The package's `__init__` apart, which a bare module stands in for."""
    bare = "package = sys.modules['harmonica'] = types.ModuleType('harmonica')"
    loaded = "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('harmonica.')))"
    script = f"import sys, types\n{bare}\npackage.__path__ = [{str(PACKAGE)!r}]\n"
    files = [Path(file) for file in run(f"{script}import harmonica.sdt\n{loaded}").split()]
    lines = {file.name: len(file.read_text("utf-8").splitlines()) for file in files}
    assert "sdt.py" in lines
    assert sum(lines.values()) <= 1100, lines


def test_no_file_of_the_library_prints_but_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        calls = [getattr(n.func, "id", "") for n in nodes(path) if isinstance(n, ast.Call)]
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
