"""Plots: every picture of the library, each a function that returns a matplotlib Figure.

Figures are made without pyplot, so nothing is drawn twice, kept alive or shown by surprise. Colours
are told apart in grey and by the colour-blind; where lines cross, their marks differ too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib import colormaps
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from harmonica.router import Schedule
from harmonica.storage.files import StrPath, write_whole

_MARKS = ("o", "s", "^", "D", "v", "P")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_STYLES = ("-", "--", "-.", ":")


def save(figure: Figure, path: StrPath) -> None:
    """Write a figure as a PNG, whole or not at all."""
    write_whole(path, partial(figure.savefig, dpi=120, format="png"))


def _kinds(sites: Sequence[str]) -> dict[str, list[int]]:
    """Group the columns of a table by kind of site, the last part of its name."""
    kinds: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        kinds.setdefault(site.rsplit(".", 1)[-1], []).append(i)
    return kinds


_TITLES = {"attn": "attention", "attn1": "attention", "attn2": "cross-attention"}
_TITLES |= {"mlp": "feed-forward", "ff": "feed-forward"}


def router_heatmap(
    table: Schedule | Tensor, sites: Sequence[str] = (), *, title: str = ""
) -> Figure:
    """Draw a table: steps across, blocks down, one panel for each kind of site; dark computes,
    light reuses.

    Args:
        table: a schedule, or scores (T, N) with the names of their N sites.
        sites: names, when table is a tensor.
        title: stands before the CUR.
    """
    hard = isinstance(table, Schedule)
    values = (
        table.compute.float() if isinstance(table, Schedule) else table.detach().float().cpu()
    )  # (T, N)
    names = table.sites if isinstance(table, Schedule) else sites
    fig, bar = _panels(
        values, names, colormaps["cividis_r"].resampled(2 if hard else 256), (0.0, 1.0)
    )
    if hard:
        bar.set_ticks([0.25, 0.75], labels=["reuse", "compute"])
    else:
        bar.set_label("score r (1 computes)")
    reused = (
        f"CUR {table.cur:.1%}"
        if isinstance(table, Schedule)
        else f"mean score {float(values.mean()):.2f}"
    )
    fig.suptitle(f"{title}: {reused}" if title else reused)
    return fig


def site_heatmap(
    values: Tensor, sites: Sequence[str], *, label: str, most: float | None = None, title: str = ""
) -> Figure:
    """Draw a measurement of every step and site as `router_heatmap` draws a table; dark is much.

    Args:
        values: (T, N), entries that are not finite are left white.
        sites: N names.
        label: what is measured, in which unit; stands at the colour bar.
        most: value of the darkest colour, larger ones look the same; the largest value if None.
        title: above all.
    """
    values = values.detach().float().cpu()
    finite = values[values.isfinite()]
    low, high = (min(0.0, float(finite.min())), float(finite.max())) if len(finite) else (0.0, 1.0)
    limits = (low, high if most is None else most)
    fig, bar = _panels(
        values.masked_fill(~values.isfinite(), float("nan")), sites, colormaps["cividis_r"], limits
    )
    bar.set_label(label)
    fig.suptitle(title)
    return fig


def _panels(
    values: Tensor, sites: Sequence[str], colours: Colormap, limits: tuple[float, float]
) -> tuple[Figure, Colorbar]:
    """Draw (T, N) numbers, steps across, blocks down, one panel for each kind of site."""
    kinds = _kinds(sites)
    tall = max(len(columns) for columns in kinds.values())
    fig = Figure(
        figsize=(1.5 + 0.16 * len(values) * len(kinds), 1.6 + 0.16 * tall), layout="constrained"
    )
    axes = fig.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    low, high = limits
    for ax, (kind, columns) in zip(axes, kinds.items(), strict=True):
        image = ax.imshow(
            values[:, columns].T.numpy(),
            cmap=colours,
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="none",
        )
        ax.set(xlabel="executed step k", title=_TITLES.get(kind, kind), facecolor="lightgrey")
        ax.set_xticks([i - 0.5 for i in range(1, len(values))], minor=True)
        ax.set_yticks([i - 0.5 for i in range(1, len(columns))], minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("block")
    return fig, fig.colorbar(image, ax=axes, shrink=0.9)


def comparison(
    plain: Tensor, cached: Tensor, *, labels: Sequence[object] = (), title: str = ""
) -> Figure:
    """Draw images (B, 1 or 3, H, W) in [−1, 1] without a cache, with it, and their difference, one
    column each.
    """
    count = len(plain)
    fig = Figure(figsize=(1.2 + 0.75 * count, 3.1), layout="constrained")
    axes = fig.subplots(3, count, squeeze=False)
    difference = (cached - plain).float().mean(1).cpu()  # (B, H, W)
    largest = max(float(difference.abs().max()), 1e-6)
    for row, name in enumerate(("without cache", "with cache", "difference")):
        for i, ax in enumerate(axes[row]):
            if row < 2:
                image = (
                    (plain, cached)[row][i]
                    .float()
                    .cpu()
                    .add(1)
                    .div(2)
                    .clamp(0, 1)
                    .permute(1, 2, 0)
                    .numpy()
                )
                ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            else:
                shown = ax.imshow(
                    difference[i].numpy(),
                    cmap="PuOr",
                    vmin=-largest,
                    vmax=largest,
                    interpolation="nearest",
                )
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0 and i < len(labels):
                ax.set_title(str(labels[i]), fontsize=9)
        axes[row][0].set_ylabel(name, fontsize=8)
    fig.colorbar(shown, ax=axes[2], shrink=0.9).set_label("of a range of 2", fontsize=7)
    fig.suptitle(title)
    return fig


def sheet(images: Tensor, *, columns: int = 10, title: str = "") -> Figure:
    """Draw images (B, 1 or 3, H, W) in [−1, 1] on one sheet, `columns` a row."""
    rows = -(-len(images) // columns)
    fig = Figure(
        figsize=(0.7 * columns, 0.7 * rows + (0.4 if title else 0.0)), layout="constrained"
    )
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, image in zip(
        axes, images.float().cpu().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1), strict=False
    ):
        ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    fig.suptitle(title)
    return fig


def error_along_walk(plain: Sequence[Tensor], walks: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Draw the mean squared error of x after each step, against the same walk without a cache (a
    figure of the paper).

    Args:
        plain: x (B, C, H, W) after each of T steps, without a cache.
        walks: the same under each method, by the method's name.
    """
    fig = Figure(figsize=(6.0, 3.4), layout="constrained")
    ax = fig.subplots()
    for i, (name, walk) in enumerate(walks.items()):
        errors = [float((a - b).square().mean()) for a, b in zip(walk, plain, strict=True)]
        ax.plot(
            range(len(errors)),
            errors,
            _STYLES[i % 4],
            marker=_MARKS[i % 6],
            color=_COLOURS[i % 6],
            label=name,
        )
    ax.set(xlabel="executed step k", ylabel="mean squared error of x\n(squared pixel units)")
    ax.set_yscale("symlog", linthresh=1e-6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def per_step(
    lines: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    xlabel: str = "executed step k",
    log: bool = False,
) -> Figure:
    """Draw numbers that belong to steps, one line for each name; what is not finite is left out, on
    a log axis 0 too.

    Args:
        lines: one number for each step k = 0, 1, …, by the name of the line.
        ylabel: what is measured, in which unit.
        xlabel: what the numbers belong to, if not the steps of a walk.
        log: draw the numbers on a logarithmic axis.
    """
    fig = Figure(figsize=(6.0, 3.2), layout="constrained")
    ax = fig.subplots()
    for i, (name, line) in enumerate(lines.items()):
        points = [
            (k, float(v)) for k, v in enumerate(line) if math.isfinite(v) and (v > 0 or not log)
        ]
        steps, values = zip(*points, strict=True) if points else ((), ())
        marker = _MARKS[i % 6] if len(line) <= 60 else ""
        ax.plot(steps, values, _STYLES[i % 4], marker=marker, color=_COLOURS[i % 6], label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def tradeoff(
    methods: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str = "image error"
) -> Figure:
    """Draw what methods make of their speedups: further right is faster, lower is better; marks on
    lines are tables.

    Args:
        methods: (theoretical speedup, error) of each table, by the name of the method; tables
            without an error are left out, since the axis is logarithmic. A method without any holds
            its place, so that the others look the same in every picture.
        ylabel: which error.
    """
    many = len(methods) > 6  # a legend of so many lines would hide some of them
    fig = Figure(figsize=(8.0 if many else 6.0, 3.8), layout="constrained")
    ax = fig.subplots()
    for i, (name, tables) in enumerate(methods.items()):
        drawn = sorted((speedup, error) for speedup, error in tables if error > 0)
        ax.plot(
            [speedup for speedup, _ in drawn], [error for _, error in drawn],
            _STYLES[i % 4], marker=_MARKS[(i + i // 6) % 6], color=_COLOURS[i % 6], label=name if drawn else "_none",
        )  # fmt: skip
    ax.set(xlabel="theoretical speedup", ylabel=ylabel, yscale="log")
    ax.grid(alpha=0.3)
    if many:
        fig.legend(loc="outside right upper")
    else:
        ax.legend()
    return fig


def lambda_per_step(lams: Mapping[str, Tensor]) -> Figure:
    """Draw λ (T,) for each step on a logarithmic scale, one line for each definition or router;
    zeros are left out.
    """
    fig = Figure(figsize=(6.0, 3.2), layout="constrained")
    ax = fig.subplots()
    for i, (name, lam) in enumerate(lams.items()):
        steps = [k for k, value in enumerate(lam.tolist()) if value > 0]
        values = [value for value in lam.tolist() if value > 0]
        ax.plot(
            steps, values, _STYLES[i % 4], marker=_MARKS[i % 6], color=_COLOURS[i % 6], label=name
        )
    ax.set(xlabel="executed step k", ylabel="λ (mean squared change\nof the image)", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig
