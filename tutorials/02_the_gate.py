# %% [markdown]
# # 2. The gate
#
# After this tutorial you can
#
# - write a gate, and say what a cache is (a dict) and who owns it;
# - write a schedule by hand, read one, save and load one;
# - compute CUR and theoretical speedup on paper and check them against the library and the clock;
# - say why a walk in which everything computes is the plain model, bit for bit.
#
# It is about two files of the library, `harmonica/cache.py` and the first half of `harmonica/router.py`.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import torch

from harmonica import Schedule, denoise, gated, macs, reuse, sample
from harmonica.cost import measure
from harmonica.evaluation import pictures as plots
from harmonica.evaluation.distances import image_mse
from harmonica.inference.walk import Walk
from harmonica.models import load

torch.set_num_threads(1)
denoiser = load("tiny", steps=20)
x, _ = denoiser.draw(10, torch.Generator().manual_seed(0))  # (10, 1, 8, 8)
labels = torch.arange(10)
plain = sample(denoiser, x, labels)

# %% [markdown]
# ## A gate answers for a site
#
# A site is an attention or a feed-forward. While the model is `gated`, a site does not run when it is called. It asks
# the gate: *here is my number, and here is a function that would compute my output; what is my output?* This gate
# only keeps a list of who asked.

# %%
asked = []


def gate(site, compute):
    asked.append(site)
    return compute()


with gated(denoiser.sites, gate):
    denoiser.predict(x, 0, labels)
print("asked, in this order:", asked)

# %% [markdown]
# After the `with`, the model is as it was: the gate overridden the `forward` of 16 module objects and has been taken
# off again. Nothing was registered, and no class was changed.

# %%
denoiser.predict(x, 0, labels)
print(
    len(asked),
    "asked in all; forward still overridden:",
    any("forward" in vars(m) for m in denoiser.sites.values()),
)

# %% [markdown]
# ## A cache is a dict
#
# `reuse(row, cache)` is the gate of inference. Where the row is true the site computes and its feature is kept under
# its number; where it is false the feature that was kept is returned, and `compute` is never called.

# %%
N = len(denoiser.sites)
cache = {}
with torch.no_grad(), gated(denoiser.sites, reuse([True] * N, cache)):
    first = denoiser.predict(x, 0, labels)  # (2B, 1, 8, 8): both halves of guidance
print(
    len(cache), "features, each", tuple(cache[0].shape), "(both halves of guidance, tokens, width)"
)

with torch.no_grad(), gated(denoiser.sites, reuse([False] * N, cache)):
    second = denoiser.predict(x, 0, labels)
print("the same output from kept features:", torch.equal(first, second))

# %% [markdown]
# Same x, same step, same output: at the step at which they were made, kept features are the right ones. At the *next*
# step they are a step old, which is the whole gamble. Who owns the dict? The walk. A second walk brings a second
# dict, so there is nothing to reset and nothing to mix up.
#
# ## A schedule is a table of rows
#
# One row for each executed step, one column for each site; true computes. The first row must be true, because there
# is nothing to reuse yet. Here is one by hand: odd steps reuse the feed-forwards, and from step 10 on they reuse the
# attentions of blocks 4 to 7 too. **What does the table look like?**

# %%
T = denoiser.steps
compute = torch.ones(T, N, dtype=torch.bool)
compute[1::2, 1::2] = False  # feed-forwards stand in odd columns
compute[11::2, 8::2] = False  # attentions of blocks 4 … 7
mine = Schedule(compute, sites=tuple(denoiser.sites), **denoiser.about)
plots.router_heatmap(mine, title="by hand")

# %% [markdown]
# The same in text, for terminals. A schedule also carries what it was made for, so that it can be refused elsewhere.

# %%
print(mine)
print(mine.model, mine.sampler, mine.guidance, mine.timesteps[:4], "…")

# %% [markdown]
# ## When everything computes
#
# A library that touches a model owes you this: with a table of ones, the images are those of the plain model. Not
# nearly. Bit for bit, at every step.

# %%
everything = [True] * N
cache = {}
gated_walk = denoise(denoiser, x, labels, lambda k: reuse(everything, cache))
print(all(torch.equal(a, b) for a, b in zip(gated_walk, denoise(denoiser, x, labels), strict=True)))

# %% [markdown]
# It holds because a gate that computes returns the very tensor which the site made. `tests/test_laws.py` holds it for
# random models and samplers.
#
# ## CUR and theoretical speedup
#
# **CUR**, the cache utilisation ratio, is the share of the table that is reused. By hand: of 20 × 16 entries, 10
# steps reuse 8 feed-forwards each, and 5 steps reuse 4 attentions each.

# %%
print((10 * 8 + 5 * 4) / (T * N), mine.cur)

# %% [markdown]
# CUR counts entries, but entries do not cost the same. What does each site cost? `macs` counts the
# multiply-accumulates of one guided prediction for one image.

# %%
cost = macs(denoiser)
for what, macs_of in {
    "attention": cost.sites[0],
    "feed-forward": cost.sites[1],
    "the rest": cost.rest,
}.items():
    print(f"{what:13}{float(macs_of) / 1e6:5.2f} million")

# %% [markdown]
# A feed-forward costs 1.8 times an attention; the rest (embeddings, modulations, the last layer, all blocks together)
# always runs. The theoretical speedup is all MACs of the walk over those that still run:

# %%
attention, feed_forward = cost.sites[0], cost.sites[1]
full = T * (8 * attention + 8 * feed_forward + cost.rest)
saved = 10 * 8 * feed_forward + 5 * 4 * attention
print(f"by hand {full / (full - saved):.4f}, by the library {mine.speedup(cost):.4f}")

# %% [markdown]
# **Two tables of one CUR need not be equally fast, nor equally good.** Each of these reuses a quarter of the table.


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
# Feed-forwards save twice what attentions save, for the same damage. And the first half of the walk can be had nearly
# for nothing: the same quarter costs fourteen times less there than in the second half.
#
# ## The first saving
#
# Put both together: reuse everything at odd steps before 10, and feed-forwards at odd steps up to 17. **Can you see
# the difference?**

# %%
better = table((slice(1, 10, 2), all_sites), (slice(11, 18, 2), slice(1, None, 2)))
cached = sample(denoiser, x, labels, better)
plots.comparison(
    plain, cached, labels=labels.tolist(), title=f"{better.speedup(cost):.2f}x in theory"
)

# %% [markdown]
# It is faster than the quarter that reused feed-forwards at all odd steps, and better too:

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
# A theoretical speedup assumes that time is MACs. `measure` walks with and without the schedule by turns and takes
# medians. The numbers below depend on the machine and on what else it is doing. Look at how they rise with the batch,
# and from `sample` to a `Walk`, which knows the whole table before it starts.

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
# In a model this small, much of a step is not products: norms, modulations, calls, Python. Under `sample` all of that
# still runs around a skipped site. A `Walk` skips the norms and modulations as well, and computes what depends on the
# timestep alone before it sets out; for DiT-XL/2 and PixArt its clock meets the theory
# (`benchmarks/results/speed.json`).
#
# ## A schedule is a file
#
# A kilobyte of readable JSON, and the same table again when it is loaded. `Schedule.load` also reads the tables of
# other people's methods (tutorial 5).

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "schedule.json"
    better.save(file)
    print(Schedule.load(file) == better, file.stat().st_size, "bytes")

# %% [markdown]
# ## Exercises
#
# 1. Write a gate that behaves like `reuse` and also counts how many sites were skipped. Walk under `better` and check
#    the count against CUR.
# 2. Which CUR and speedup has the table that reuses the feed-forwards of blocks 2 to 5 at every step but the first?
#    Work it out on paper first.
# 3. What happens if the first row has a false in it? If `sample` is given a table for 10 steps? If `reuse` is given
#    the scores of a router instead of decisions? Try all three and read the messages.

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** A gate may wrap another.
#
# ```python
# skipped = 0
#
#
# def counting(k, cache={}):
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
# **2.** 19 · 4 of 320 entries are 23.75 %. What runs: all, less 76 feed-forwards.
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
# **3.** Each message says what was found, what was expected and what to do.
#
# ```python
# wrong = {
#     "a false in the first row": lambda: Schedule([[True, False], [True, True]]),
#     "10 steps": lambda: sample(denoiser, x, labels, Schedule(torch.ones(10, N, dtype=torch.bool))),
#     "scores": lambda: reuse(torch.rand(N), {}),
# }
# for what, attempt in wrong.items():
#     try:
#         attempt()
#     except (ValueError, TypeError) as error:
#         print(f"{what}: {type(error).__name__}: {error}")
# ```
#
# ```text
# a false in the first row: ValueError: step 0 reuses site1, but nothing is cached yet; the first row must be all true
# 10 steps: ValueError: this schedule has 10 steps (unknown sampler), the run has 20; run 10 or train a schedule for 20, or call schedule.resample(20)
# scores: TypeError: row is torch.float32; reuse takes the bools of a schedule, router.schedule(tau).compute[k]
# ```
#
# </details>
