"""The zoo: every transformer that diffusers exports, tiny and random, under the general rule of harmonica.models.sites.

Every entry is exact.
"""

import ast
import contextlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import equal, raising
from zoo import LEFT_OUT, UNCOUNTED, ZOO, called, examine, leaves

from harmonica import cost
from harmonica.models import sites as sites_module
from harmonica.models.sites import sites


@pytest.fixture
def arithmetic(monkeypatch):
    """Count with real tensors: on models of this size that is ten times faster than with fake ones."""
    counted, unreal = cost.count, raising(RuntimeError("not on fake tensors"))
    count = lambda *call, fake: unreal() if fake else counted(*call, fake=False)  # noqa: E731
    monkeypatch.setattr(cost, "count", count)


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.filterwarnings("ignore")
def test_every_entry_is_exact(name, arithmetic):
    model, inputs = ZOO[name]()
    with torch.no_grad():
        before = leaves(model(**inputs))
    with contextlib.suppress(RuntimeError):  # a mask of zeros is no input for two of them
        assert (cost.cost_of_call(model, sites(model), ((), inputs)) is None) == (name in UNCOUNTED)
    found = called(model, inputs)
    with torch.no_grad():
        assert equal(before, leaves(model(**inputs))), "counting left something behind in the model"
    assert not examine(model, inputs, found)


def test_every_transformer_that_diffusers_exports_is_in_the_zoo_or_left_out_with_a_reason():
    package = Path(find_spec("diffusers").origin).parent / "models" / "transformers" / "__init__.py"
    nodes = [n for n in ast.walk(ast.parse(package.read_text())) if isinstance(n, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.level == 1 for alias in node.names}
    assert len(names) >= 75
    assert names - ZOO.keys() - LEFT_OUT.keys() == set()
    assert all(LEFT_OUT.values())
    assert not ZOO.keys() & LEFT_OUT.keys()


def test_a_wrong_rule_is_caught(monkeypatch):
    """The laws can fail: a module that is called twice and changes its output."""
    model, inputs = ZOO["CogView4Transformer2DModel"]()
    monkeypatch.setattr(sites_module, "CALLED_TWICE", {})
    with pytest.raises(AssertionError, match="called several times"):
        called(model, inputs)
    with pytest.raises(RuntimeError, match="size of tensor"):
        examine(model, inputs, sites(model))
