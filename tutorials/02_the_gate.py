# %% [markdown]
# # 2. The gate
#
# After this tutorial you can
#
# - write a gate, and say what a cache is (a dict) and who owns it;
# - write a schedule by hand, read one, save and load one;
# - compute CUR and theoretical speedup on paper, and check them against the library and the clock;
# - say why a walk in which everything computes gives the plain model's image, bit for bit.
#
# Two files of the library belong to this tutorial: `harmonica/cache.py` and the `Schedule` in `harmonica/router.py`.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import torch

from harmonica import Schedule, denoise, gated, macs, reuse, sample
from harmonica import pictures as plots
from harmonica.inference.timing import measure
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.search.references import image_mse

torch.set_num_threads(1)
denoiser = load("tiny", steps=20)
x, _ = denoiser.draw(10, torch.Generator().manual_seed(0))  # (10, 1, 8, 8)
labels = torch.arange(10)
plain = sample(denoiser, x, labels)

# %% [markdown]
# ## A gate answers for a site
#
# A site is an attention or a feed-forward. Inside `with gated(…)` a site does not run when the model calls it. It calls
# the gate with two arguments: its number, and a function that would compute its output. What the gate returns is used
# as the site's output. The gate below computes always, and keeps a list of the numbers. `no_grad` tells PyTorch to keep
# nothing for gradients.

# %%
called = []


def gate(site, compute):
    called.append(site)
    return compute()


with torch.no_grad(), gated(denoiser.sites, gate):
    denoiser.predict(x, 0, labels)
print("called for the sites", called)

# %% [markdown]
# After the `with`, the model is as it was. `gated` had overridden the `forward` of 16 module objects, and has removed the
# overrides again. No hook (a function that PyTorch calls around a module) was registered, and no class was changed. So the
# next prediction does not call our gate:

# %%
with torch.no_grad():
    denoiser.predict(x, 0, labels)
print(
    len(called),
    "calls in all; a forward is still overridden:",
    any("forward" in vars(m) for m in denoiser.sites.values()),
)

# %% [markdown]
# ## A cache is a dict
#
# `reuse(row, cache)` returns the gate of inference. `row` is a list of N booleans, one for each site. Where it is true, the
# site computes, and the cache keeps its feature under the site's number. Where it is false, the kept feature is returned,
# and `compute` is never called.

# %%
N = len(denoiser.sites)
cache = {}
with torch.no_grad(), gated(denoiser.sites, reuse([True] * N, cache)):
    first = denoiser.predict(
        x, 0, labels
    )  # (2B, 1, 8, 8): guidance doubles the batch, both halves are returned
print(
    len(cache), "features, each", tuple(cache[0].shape), "(both halves of guidance, tokens, width)"
)

with torch.no_grad(), gated(denoiser.sites, reuse([False] * N, cache)):
    second = denoiser.predict(x, 0, labels)
print("the same output from kept features:", torch.equal(first, second))

# %% [markdown]
# The x and the step were the same, so the output is the same: at the step at which they were computed, kept features are
# exact. At the *next* step they are one step old, and reusing them causes an error. Who owns the dict? The walk. A second
# walk has a second dict, so nothing must be reset and nothing can be mixed up.
#
# ## A schedule is a table of rows
#
# A schedule has one row for each step and one column for each site; true means compute. The first row must be true
# everywhere, because nothing has been kept yet. Here is a schedule made by hand: odd steps reuse the feed-forwards, and
# odd steps after step 10 also reuse the attentions of blocks 4 to 7. **What does the table look like?**

# %%
T = denoiser.steps
compute = torch.ones(T, N, dtype=torch.bool)
compute[1::2, 1::2] = False  # feed-forwards stand in odd columns
compute[11::2, 8::2] = False  # attentions of blocks 4 … 7
mine = Schedule(compute, sites=tuple(denoiser.sites), **denoiser.about)
plots.router_heatmap(mine, title="by hand")

# %% [markdown]
# The same table as text. A schedule also carries what it was made for, so that another model or sampler can refuse it.

# %%
print(mine)
print(mine.model, mine.sampler, mine.guidance, mine.timesteps[:4], "…")

# %% [markdown]
# ## When everything computes
#
# A library that changes how a model runs must keep one promise: with a table of ones, the images are those of the plain
# model. They are not nearly equal; they are equal bit for bit, at every step.

# %%
everything = [True] * N
cache = {}
gated_walk = denoise(denoiser, x, labels, lambda k: reuse(everything, cache))
print(all(torch.equal(a, b) for a, b in zip(gated_walk, denoise(denoiser, x, labels), strict=True)))

# %% [markdown]
# This holds because a gate that computes returns the very tensor that the site computed. `tests/test_laws.py` tests it for
# random models and samplers.
#
# ## CUR and theoretical speedup
#
# **CUR**, the cache utilisation ratio, is the share of the table that is reused. By hand: of 20 × 16 entries, 10
# steps reuse 8 feed-forwards each, and 5 steps reuse 4 attentions each.

# %%
print((10 * 8 + 5 * 4) / (T * N), mine.cur)

# %% [markdown]
# CUR counts entries, but not all entries cost the same. `macs` counts what each site costs: the multiply-accumulates
# (MACs) of one guided prediction for one image.

# %%
cost = macs(denoiser)
for what, macs_of in {
    "attention": cost.sites[0],
    "feed-forward": cost.sites[1],
    "the rest": cost.rest,
}.items():
    print(f"{what:13}{float(macs_of) / 1e6:5.2f} million")

# %% [markdown]
# A feed-forward costs 1.8 times as much as an attention. The rest (embeddings, modulations of all blocks, the last layer)
# always runs. The theoretical speedup is the number of all MACs of the walk divided by the number that still run:

# %%
attention, feed_forward = cost.sites[0], cost.sites[1]
full = T * (8 * attention + 8 * feed_forward + cost.rest)
saved = 10 * 8 * feed_forward + 5 * 4 * attention
print(f"by hand {full / (full - saved):.4f}, by the library {mine.speedup(cost):.4f}")

# %% [markdown]
# **Are two tables with the same CUR equally fast and equally good?** Each of the following tables reuses a quarter of the
# entries. The *image error* is the mean squared difference to the image without a cache.


# %%
def table(*entries):
    """Return the schedule that reuses these (rows, columns)."""
    compute = torch.ones(T, N, dtype=torch.bool)
    for rows, columns in entries:
        compute[rows, columns] = False
    return Schedule(compute, sites=tuple(denoiser.sites), **denoiser.about)


odd, all_sites = slice(1, None, 2), slice(None)
quarters = {
    "attentions at odd steps": table((odd, slice(0, None, 2))),
    "feed-forwards at odd steps": table((odd, slice(1, None, 2))),
    "all, odd steps before 10": table((slice(1, 10, 2), all_sites)),
    "all, odd steps after 10": table((slice(11, None, 2), all_sites)),
}
for name, schedule in quarters.items():
    error = image_mse(sample(denoiser, x, labels, schedule), plain)
    print(
        f"{name:27} CUR {schedule.cur:.0%}  {schedule.speedup(cost):.2f}x in theory  image error {error:.1e}"
    )

# %% [markdown]
# They are not. Feed-forwards save almost twice as much work as attentions, with about the same error. And reuse is cheap in
# the first half of the walk: the same quarter of the table causes a fourteenth of the error that it causes in the second half.
#
# ## The first saving
#
# Now combine both: reuse everything at odd steps before 10, and the feed-forwards at the odd steps 11 to 17. **Can you see
# the difference?**

# %%
better = table((slice(1, 10, 2), all_sites), (slice(11, 18, 2), slice(1, None, 2)))
cached = sample(denoiser, x, labels, better)
plots.comparison(
    plain, cached, labels=labels.tolist(), title=f"{better.speedup(cost):.2f}x in theory"
)

# %% [markdown]
# It is faster than the table that reuses the feed-forwards at all odd steps, and its error is smaller:

# %%
for name, schedule in {
    "feed-forwards at odd steps": quarters["feed-forwards at odd steps"],
    "better": better,
}.items():
    error = image_mse(sample(denoiser, x, labels, schedule), plain)
    print(
        f"{name:27} CUR {schedule.cur:.0%}  {schedule.speedup(cost):.2f}x in theory  image error {error:.1e}"
    )

# %% [markdown]
# ## Theory and the clock
#
# A theoretical speedup assumes that only MACs take time. `measure` runs walks with and without the schedule in turns, and
# takes medians. The numbers below depend on the machine and on what else it is doing. Look at how they rise with the batch,
# and from `sample` to `Walk`. A `Walk` uses the fact that the whole table is known before the walk starts.

# %%
some, some_labels = denoiser.draw(32, torch.Generator().manual_seed(1))
for batch in (1, 8, 32):
    now = some[:batch], some_labels[:batch]
    slow = measure(denoiser, better, *now, repeats=3).speedup
    fast = measure(denoiser, better, *now, repeats=3, walk=Walk(denoiser, better)).speedup
    print(
        f"batch {batch:2}: sample {slow:.2f}x, Walk {fast:.2f}x by the clock, {better.speedup(cost):.2f}x in theory"
    )

# %% [markdown]
# In a model as small as this, much of a step's time goes into other things than products: norms, modulations and Python
# calls. Under `sample` all of this still runs around a skipped site. A `Walk` skips the norms and modulations too, and
# computes in advance whatever depends on the timestep alone. For DiT-XL/2 and PixArt its measured speedup reaches the
# theoretical one (`benchmarks/results/speed.json`).
#
# ## A schedule is a file
#
# A schedule is saved as about one kilobyte of readable JSON, and loading it gives an equal schedule. `Schedule.load` also
# reads the tables of other projects (`docs/files.md`).

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "schedule.json"
    better.save(file)
    print(Schedule.load(file) == better, file.stat().st_size, "bytes")

# %% [markdown]
# ## Exercises
#
# 1. Write a gate that behaves like `reuse` and also counts how many sites were skipped. Walk under `better` and compare
#    the count with CUR.
# 2. Which CUR and which speedup does the table have that reuses the feed-forwards of blocks 2 to 5 at every step except
#    the first? Work it out on paper first.
# 3. What happens if the first row contains a false? If `sample` gets a table for 10 steps? If `reuse` gets the scores of
#    a router instead of decisions? Try all three and read the messages.

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** A gate may wrap another.
#
# ```python
# skipped = 0
# cache = {}
#
#
# def counting(k):
#     inner = reuse(better.compute[k], cache)
#
#     def gate(site, compute):
#         global skipped
#         skipped += not better.compute[k, site]
#         return inner(site, compute)
#
#     return gate
#
#
# for _ in denoise(denoiser, x, labels, counting):
#     pass
# print(skipped, better.cur * T * N)
# ```
#
# ```text
# 112 112.0
# ```
#
# **2.** 19 · 4 of the 320 entries are 23.75 %. Everything runs except 76 feed-forwards.
#
# ```python
# middle = table((slice(1, None), [5, 7, 9, 11]))
# print(middle.cur, f"{full / (full - 76 * feed_forward):.3f} {middle.speedup(cost):.3f}")
# ```
#
# ```text
# 0.2375 1.416 1.416
# ```
#
# **3.** Each message says which value is wrong, what was expected and what to do.
#
# ```python
# wrong = {
#     "a false in the first row": lambda: Schedule([[True, False], [True, True]]),
#     "10 steps": lambda: sample(denoiser, x, labels, Schedule(torch.ones(10, N, dtype=torch.bool))),
#     "scores": lambda: reuse(torch.full((N,), 0.5), {}),
# }
# for what, attempt in wrong.items():
#     try:
#         attempt()
#     except (ValueError, TypeError) as error:
#         print(f"{what}: {type(error).__name__}: {error}")
# ```
#
# ```text
# a false in the first row: ValueError: step 0 reuses site1, but nothing is cached yet; its row must be true
# 10 steps: ValueError: this schedule has 10 steps (unknown sampler), the run has 20; run 10 or train a schedule for 20, or call schedule.resample(20)
# scores: TypeError: row holds scores such as 0.5; reuse takes bools: router.schedule(tau).compute[k]
# ```
#
# </details>
