"""Pictures: every plot of the library, each a function that returns a matplotlib Figure.

    router_heatmap, site_heatmap    one number for each step and site
    sheet, comparison, rows         images
    lines                           one line for each name, and callers that label it

Figures are made without pyplot, so nothing is kept alive or shown by surprise. Colours can be told
apart in grey and by the colour-blind; lines differ in their marks too. Images are (B, 1 or 3, H, W)
in [−1, 1].
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from harmonica.router import Schedule
from harmonica.search.references import image_mse
from harmonica.site_names import word_of
from harmonica.storage.files import write_whole
from harmonica.values import StrPath, require

MARKS = ("o", "s", "^", "D", "v", "P")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
TITLES = {"attn": "attention", "attn2": "cross-attention", "mlp": "feed-forward"}


def save(figure: Figure, path: StrPath) -> None:
    """Write a figure as a PNG, whole or not at all."""
    write_whole(path, partial(figure.savefig, dpi=120, format="png"))


def router_heatmap(
    table: Schedule | Tensor, site_names: Sequence[str] = (), *, title: str = ""
) -> Figure:
    """Draw a table, or scores (T, N) of named sites, with CUR or mean score; dark computes."""
    if isinstance(table, Schedule):
        value, fig = f"CUR {table.cur:.1%}", site_heatmap(table.compute, table.sites, shades=2)
        fig.axes[-1].set_yticks([0.25, 0.75], labels=["reuse", "compute"])  # the colour bar
    else:
        value = f"mean score {float(table.detach().mean()):.2f}"
        fig = site_heatmap(table, site_names, label="score r (1 computes)", most=1.0)
    fig.suptitle(f"{title}: {value}" if title else value)
    return fig


def site_heatmap(
    values: Tensor, site_names: Sequence[str], *, label: str = "", most: float | None = None,
    shades: int = 256,
) -> Figure:  # fmt: skip
    """Draw values (T, N) of steps and sites: steps across, blocks down, one panel for each kind of
    site. `label` says what is measured, in which unit. Larger is darker, from the least value, or
    0, to `most` or else the largest; what is not finite is grey.
    """
    words = [word_of(name) for name in site_names]
    kinds = {kind: [i for i, word in enumerate(words) if word == kind] for kind in words}
    values = values.detach().float().cpu()
    values = values.where(values.isfinite(), torch.nan)
    finite, tallest = values[~values.isnan()].tolist(), max(map(len, kinds.values()))
    size = (1.5 + 0.16 * len(values) * len(kinds), 1.6 + 0.16 * tallest)
    fig = Figure(size, layout="constrained")
    axes = fig.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, (kind, columns) in zip(axes, kinds.items(), strict=True):
        shown, colours = values[:, columns].T.numpy(), colormaps["cividis_r"].resampled(shades)
        image = ax.imshow(shown, colours, aspect="auto", interpolation="none")
        image.set_clim(min([0.0, *finite]), max(finite or [1.0]) if most is None else most)
        ax.set(xlabel="executed step k", title=TITLES.get(kind, kind), facecolor="lightgrey")
        for axis, count in ((ax.xaxis, len(values)), (ax.yaxis, len(columns))):
            axis.set_ticks([i - 0.5 for i in range(1, count)], minor=True)
            axis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    axes[0].set_ylabel("block")
    fig.colorbar(image, ax=axes, shrink=0.9, label=label)
    return fig


def rows(images: Mapping[str, Tensor], *, labels: Sequence[object] = (), title: str = "") -> Figure:
    """Draw one row of images for each name; labels stand above the columns."""
    width = max(map(len, images.values()))
    fig = Figure((1.2 + 0.75 * width, 0.8 * len(images) + 0.5), layout="constrained")
    axes = fig.subplots(len(images), width, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, (name, row) in zip(axes, images.items(), strict=True):
        line[0].set_ylabel(name, fontsize=7)
        levels = row.detach().float().cpu().add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1)
        for ax, image in zip(line, levels.numpy(), strict=False):
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    for ax, label in zip(axes[0], labels, strict=False):
        ax.set_title(str(label), fontsize=9)
    fig.suptitle(title)
    return fig


def comparison(
    plain: Tensor, cached: Tensor, *, labels: Sequence[object] = (), title: str = ""
) -> Figure:
    """Draw images without a cache, with it, and their difference, enlarged to the whole range."""
    factor = 1.0 / max(float((cached - plain).abs().max()), 1e-6)
    images = {"without cache": plain, "with cache": cached}
    images[f"{factor:.2g}× difference"] = (cached - plain) * factor
    return rows(images, labels=labels, title=title)


def sheet(images: Tensor, *, title: str = "") -> Figure:
    """Draw images on one sheet, ten a row."""
    return rows({" " * i: row for i, row in enumerate(torch.split(images, 10))}, title=title)


def lines(
    points: Mapping[str, Iterable[tuple[float, float]]], *, xlabel: str, ylabel: str, log: bool
) -> Figure:
    """Draw a line through the points (x, y) of each name; raise ValueError for more than six.

    A y that is not finite is left out, on a logarithmic axis also one that is not positive.
    """
    most = len(MARKS)
    require(len(points) <= most, f"{len(points)} lines; at most {most} can be told apart")
    fig = Figure((7.5, 3.4), layout="constrained")
    ax = fig.subplots()
    for (name, line), mark, colour in zip(points.items(), MARKS, COLOURS, strict=False):
        drawn = [(x, float(y)) for x, y in line if math.isfinite(y) and (y > 0 or not log)]
        if drawn:
            marker = mark if len(drawn) <= 60 else ""
            ax.plot(*zip(*drawn, strict=True), marker=marker, color=colour, label=name)
            ax.xaxis.set_major_locator(MaxNLocator(integer=isinstance(drawn[0][0], int)))
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    if ax.lines:
        fig.legend(loc="outside right upper", fontsize="small")  # beside the lines, never on them
    return fig


def per_step(
    values: Mapping[str, Sequence[float]], *, ylabel: str, xlabel: str = "executed step k",
    log: bool = False,
) -> Figure:  # fmt: skip
    """Draw numbers that belong to steps k = 0, 1, …, one line for each name."""
    points = {name: enumerate(line) for name, line in values.items()}
    return lines(points, xlabel=xlabel, ylabel=ylabel, log=log)


def error_along_walk(plain: Sequence[Tensor], walks: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Draw the mean squared difference of x to the plain walk after each step, a line a walk."""
    errors = {name: [*map(image_mse, walk, plain)] for name, walk in walks.items()}
    return per_step(errors, ylabel="mean squared error of x\n(squared pixel units)", log=True)


def tradeoff(methods: Mapping[str, Iterable[tuple[float, float]]], *, ylabel: str) -> Figure:
    """Draw (theoretical speedup, error) of each method's tables, from slow to fast."""
    points = {name: sorted(tables) for name, tables in methods.items()}
    return lines(points, xlabel="theoretical speedup", ylabel=ylabel, log=True)
