"""Schedule fields: each is held to what a `Schedule`, a table of decisions, must be.

Whatever passes can be saved, and comes back from its file the same.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harmonica.table import default_names, numbers, outputs_before
from harmonica.values import items, number, require, whole

FACTS = "model", "sampler", "guidance", "threshold", "order", "timesteps", "provenance"
"""The fields of a schedule other than its table, its weights and its site names."""


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Schedule`, checked, and copied as what a file gives back."""
    compute, names = numbers("compute", fields["compute"]), items("sites", fields["sites"])
    shape = tuple(compute.shape)
    flat = len(shape) == 2 and 0 not in shape
    require(flat, f"compute has shape {shape}; it must be (steps, sites), neither of them 0")
    binary = bool(((compute == 0) | (compute == 1)).all())
    require(binary, "compute has entries other than 0 and 1; scores go to router.schedule(tau)")
    compute, names = compute.bool(), names or default_names(shape[1])
    facts = checked_facts({name: fields[name] for name in FACTS})
    (T, N), distinct, times = shape, len(set(names)), len(facts["timesteps"])
    fit = len(names) == distinct == N and times in (0, T)
    has = f"comes with {distinct} distinct site names and {times} timesteps"
    todo = f"name each site differently, and give {T} timesteps or none"
    require(fit, f"the table is {T} × {N} (steps × sites) and {has}; {todo}")
    for i, name in enumerate(names):
        require(isinstance(name, str), f"site {i} is {name!r:.60}; expected a string")
        computes = f"step 0 reuses {name}, but nothing is cached yet; its row must be true"
        require(bool(compute[0, i]), computes)
    weights = fields["weights"]
    weights = None if weights is None else checked_weights(weights, compute)
    return {**facts, "compute": compute, "sites": names, "weights": weights}


def checked_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a schedule tells besides its table, checked, and as a file gives it back."""
    checked = dict(facts)
    for name, value in checked.items():
        require(name in FACTS, f"no schedule has a field {name!r:.40}; expected {', '.join(FACTS)}")
        if name == "order":
            checked[name] = whole(name, value, 0, 10)
        elif name == "timesteps":
            checked[name] = tuple(number("a timestep", t) for t in items(name, value))
        elif name == "provenance":
            checked[name] = _as_json(value)
        elif value is not None and name in ("guidance", "threshold"):
            checked[name] = number(name, value, *([0, 1] if name == "threshold" else []))
        elif name in ("model", "sampler"):
            checked[name] = "" if value is None else value
            require(isinstance(checked[name], str), f"{name} is {value!r:.60}; expected a string")
    return checked


def _as_json(facts: Any) -> Any:
    try:
        text = json.dumps(dict(facts), default=lambda value: value.tolist(), allow_nan=False)
    except (AttributeError, TypeError, ValueError) as error:
        rule = f"expected names with strings and finite numbers ({error})"
        raise ValueError(f"provenance is {facts!r:.60}; {rule}") from None
    return json.loads(text)


def checked_weights(values: Any, compute: Tensor) -> Tensor:
    """Return weights as (T, N, 1 + m) float32, or raise ValueError where the table forbids them."""
    weights = numbers("weights", values)
    require(not weights.is_complex(), f"weights are {weights.dtype}; expected real numbers")
    weights = weights.float()
    (T, N), shape = compute.shape, tuple(weights.shape)
    fit = shape[:2] == (T, N) and len(shape) == 3 and shape[2] >= 2
    todo = f"the table is {T} × {N}, so they must be ({T}, {N}, 1 + m) for m ≥ 1 past outputs"
    require(fit, f"weights has shape {shape}; {todo}")
    past = outputs_before(compute)
    forbidden = torch.arange(shape[2]) > past[:, :, None]
    forbidden[:, :, 0] = ~compute
    for k, i, j in (~weights.isfinite() | (weights != 0) & forbidden).nonzero().tolist():
        output = f"last output {j}" if j else "the fresh output"
        why = f"only {past[k, i]} outputs were computed" if j else "that entry is skipped"
        value, must = f"{float(weights[k, i, j]):g}", forbidden[k, i, j]
        rule = f", but {why}; it must be 0" if must else "; every weight must be finite"
        raise ValueError(f"the weight of {output} at step {k}, site {i} is {value}{rule}")
    return weights
