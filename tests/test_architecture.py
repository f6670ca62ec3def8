"""The house: who imports whom, what importing costs, how long the core is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harmonica"
CORE = ("router", "cache", "denoise", "iepo", "sdt")

MAY_IMPORT = {
    "cache": {"shadows"},
    "shadows": set(),
    "plan": {"cache", "forecast"},
    "graph": {"fast"},
    "fast": {"cache", "cost", "denoise", "models", "plan", "router"},
    "files": set(),
    "samplers": set(),
    "metrics": set(),
    "denoise": {"cache", "forecast"},
    "hub": {"files"},
    "router": {"hub"},
    "formats": {"files", "router"},
    "iepo": {"cache", "denoise"},
    "search": {"cache", "denoise", "metrics"},
    "baselines": {"cache", "cost", "denoise", "iepo", "router", "samplers", "search"},
    "cost": {"cache", "denoise"},
    "check": {"cache", "denoise"},
    "cli": {"distributed"},
    "distributed": set(),
    "prompts": {"files"},
    "target": {"cost", "denoise", "router"},
    "forecast": {"cache"},
    "quadratic": {"cache", "denoise", "forecast", "target"},
    "refine": {"denoise", "distributed", "metrics", "quadratic", "router", "search", "target"},
    "checkpoint": {"cost", "denoise", "distributed", "files", "formats", "router"},
    "sdt": {"cache", "checkpoint", "cost", "denoise", "distributed", "files", "iepo", "refine", "router", "target"},
    "samples": {"cli", "denoise", "distributed", "fast", "files", "names", "router"},
    "scores": {"files"},
    "plots": {"files", "router"},
    "names": {"router"},
    "models": {"files", "samplers", "cache", "router", "denoise", "cost", "names", "plan", "prompts", "shadows"},
}
"""Who may import whom when loaded. Imports inside a function, and for types only, are not arrows of the house."""


def arrows(path: Path) -> set[str]:
    """Return the modules of ours that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("harmonica"):
            found.add((node.module + ".").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("harmonica.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name not in ("__init__", "demo", "train"):  # these see everything
        assert arrows(path) - {name} <= MAY_IMPORT[name]


def test_the_core_never_imports_models_not_even_inside_a_function():
    for name in CORE:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert "harmonica.models" not in ast.unparse(node), name


def test_importing_the_library_costs_torch_only():
    heavy = ("diffusers", "transformers", "matplotlib", "sklearn", "scipy", "tqdm", "safetensors", "harmonica.models")
    script = f"import sys, harmonica; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # torch itself may bring some of these along; what counts is what we add to it
    bare = subprocess.run(
        [sys.executable, "-c", script.replace("harmonica; ", "torch; ")], capture_output=True, text=True, check=True
    )
    assert out.stdout == bare.stdout


def test_the_core_fits_on_a_train_ride():
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in CORE}
    assert sum(lines.values()) < 700, lines


def test_no_file_of_the_library_prints_but_the_command_line():
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not prints or path.name in ("demo.py", "train.py", "samples.py"), path


def test_models_and_samplers_need_no_transformers():
    """Only PixArt's prompts do; `from diffusers import AutoencoderKL` would bring transformers along."""
    script = (
        "import sys; import harmonica.models.pipelines, harmonica.models.autoencoder\n"
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
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout) == (0, "[]\n"), out.stderr
