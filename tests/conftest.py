"""Small denoisers for the laws: a DiT of a few hundred weights, none of them zero, in float64. And other processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from harmonica import Schedule
from harmonica.models.dit import DiT, DiTDenoiser
from harmonica.samplers import DDIM

ROOT = Path(__file__).parents[1]
options = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}
settings.register_profile("laws", max_examples=10, **options)
settings.load_profile("laws")
torch.set_num_threads(1)  # the models here are too small to share


class TwoStep(DDIM):
    """DDIM on the extrapolated output 1.5·now − 0.5·last, as Adams and Bashforth would."""

    def step(self, x, out, k, memory):
        last = memory.get("last", out)
        memory["last"] = out
        return super().step(x, 1.5 * out - 0.5 * last, k, memory)


SMALL = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 8, "num_heads": 2}
SMALL |= {"num_classes": 3}


def make(steps=4, depth=2, *, guidance=1.5, seed=0, dtype=torch.float64, remembers=False):
    """Return a denoiser with random weights, adaLN gates included, so that every site matters.

    With `remembers`, its sampler is a two-step one, whose memory is the last output.
    """
    model = redrawn(DiT(**SMALL, depth=depth).to(dtype), seed)
    sampler = TwoStep(steps) if remembers else DDIM(steps)
    return DiTDenoiser(model, sampler, guidance=guidance, guided_channels=1, name="small")


def single(*args, **options):
    """Return that denoiser in single precision, which training takes."""
    return make(*args, dtype=torch.float32, **options)


def redrawn(model, seed: int):
    """Draw all weights of a model anew in its precision, and return it."""
    generator = seeded(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(denoiser, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise and conditions."""
    return denoiser.draw(batch, seeded(seed))


def with_noise(denoiser, batch: int = 2, seed: int = 1) -> tuple:
    """Return a denoiser, and noise and conditions drawn for it."""
    return denoiser, *start(denoiser, batch, seed)


def equal(one, other) -> bool:
    """Tell whether two sequences of as many tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def noting(log):
    """Return a gate that computes every site and notes it in `log`."""
    return lambda site, compute: log.append(site) or compute()


def raising(error):
    """Return a function that raises, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


def attributes(model) -> dict:
    """Return what stands on each module: names set by whoever overrides, hooks, buffers, gradients, everything."""
    copied = lambda value: dict(value) if isinstance(value, dict) else value  # noqa: E731
    of = lambda m: {key: copied(value) for key, value in vars(m).items()}  # noqa: E731
    gradients = [parameter.grad for parameter in model.parameters()]
    return {name: of(module) for name, module in model.named_modules()} | {"gradients": gradients}


def counted(denoiser):
    """Count predictions and note for each whether the sites were gated and gradients on."""
    calls, predict, site = [], denoiser.predict, next(iter(denoiser.sites.values()))
    told = lambda k: (k, "forward" in vars(site), torch.is_grad_enabled())  # noqa: E731
    denoiser.predict = lambda x, k, cond: calls.append(told(k)) or predict(x, k, cond)
    return calls


def said(module, options, capsys):
    """Return exit code, stdout and stderr of a command that is given options, a string or a list."""
    options = options.split() if isinstance(options, str) else map(str, options)
    try:
        code = module.main(list(options))
    except SystemExit as exit:  # argparse's way
        code = exit.code
    return code, *capsys.readouterr()


def refused(message):
    """Expect a ValueError whose text matches."""
    return pytest.raises(ValueError, match=message)


def started(*arguments, **how):
    """Start Python with these arguments, as a terminal would."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    how |= {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    return subprocess.Popen([sys.executable, *arguments], **how)


def torchrun(*command):
    """Run two processes on a free port and wait for them, three minutes at most (gloo itself would wait thirty)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    clean = {key: value for key, value in os.environ.items() if key not in theirs}
    environment = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    how = {"capture_output": True, "text": True, "timeout": 180, "env": environment}
    return subprocess.run([*launch, *map(str, command)], check=False, **how)


def press_ctrl_c(child, send=None, timeout=30):
    """Interrupt a process, by `send` if the signal is not for it alone, until it ends; return stdout and stderr.

    Python drops an interrupt that lands in a destructor; a person presses again.
    """
    for _ in range(3):
        (send or child.send_signal)(signal.SIGINT)
        try:
            return child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            continue
    child.kill()
    raise AssertionError(f"three interrupts did not end {child.args}")


@pytest.fixture
def small() -> DiTDenoiser:
    return make()


@pytest.fixture
def small_models(monkeypatch):
    """Let `load` make small models of the real classes (small.py)."""
    from small import shrink

    shrink(monkeypatch)


@pytest.fixture
def few_noises(monkeypatch):
    """Let a search judge its tables on few noises."""
    monkeypatch.setattr("harmonica.search.refine_router.NOISES", 16)


@pytest.fixture
def short_demo(monkeypatch):
    """Let the demo draw few noises, learn for two updates, and paint nothing, which takes longest."""
    for name, value in {"HELD_OUT": 20, "TIMED": 2, "POOL": 4, "CHOOSING": 2, "UPDATES": 2}.items():
        monkeypatch.setattr(f"harmonica.demo.{name}", value)
    touch = lambda self, path, **_: Path(path).touch()  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", touch)


def tables(steps: int = 4, sites: int = 4) -> st.SearchStrategy[Schedule]:
    """Draw a schedule: any decisions, a first row of true."""
    row = st.lists(st.booleans(), min_size=sites, max_size=sites)
    rows = st.lists(row, min_size=steps - 1, max_size=steps - 1)
    return rows.map(lambda rows: Schedule([[True] * sites, *rows]))


seeds = st.integers(0, 2**31)
