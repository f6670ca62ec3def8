# %% [markdown]
# # 7. Nearer than without a cache
#
# After this tutorial you can
#
# - say what the reference of a noise is, and why an uncached walk is not the best image that a model can make of it;
# - show that methods rank differently by distance to the uncached image and by distance to the reference;
# - learn the weights of a table's gates, so that a walk of half the cost ends nearer to the reference than the uncached one.
#
# This is beyond the paper. The files that belong to this tutorial are `harmonica/search/references.py` and
# `harmonica/search/learn.py`.

# %%
# %matplotlib inline
from dataclasses import replace

import torch
from matplotlib.figure import Figure

from harmonica import learn_weights, macs, references, sample
from harmonica import pictures as plots
from harmonica.inference.walk import Walk
from harmonica.models import load
from harmonica.search import baselines
from harmonica.search.references import image_mse

torch.set_num_threads(1)
denoiser = load("tiny", steps=20)
cost = macs(denoiser)

# %% [markdown]
# ## The reference
#
# A deterministic sampler such as DDIM follows a curve from the noise to an image: the solution of a differential equation
# (the probability-flow ODE). It follows it in T straight pieces, so it leaves the curve a little at each step. More
# steps stay nearer. The *reference* of a noise is the image that the same sampler makes of it with 10·T steps; it is
# close to the end of the curve. `references` draws noises and makes their references. It returns a `Pool`: noises `x`,
# conditions `cond` and `images`.
#
# **How far from the reference are walks of fewer steps?**

# %%
held_out = references(denoiser, noises=64, generator=torch.Generator().manual_seed(1_000_003))
counts = (10, 14, 20, 28, 40)
walks = {T: sample(load("tiny", steps=T), held_out.x, held_out.cond) for T in counts}
far = {T: image_mse(image, held_out.images) for T, image in walks.items()}
figure = Figure(figsize=(5, 3), layout="constrained")
axes = figure.subplots()
axes.loglog(list(far), list(far.values()), marker="o")
axes.set(xlabel="steps, nothing cached", ylabel="distance to the reference")
figure

# %% [markdown]
# Twice the steps end four to six times nearer (these are 64 noises; 1000 give 9.0e-3 and 2.4e-3). So the uncached walk of 20 steps is itself an approximation. A cache
# adds an error of its own, but that error need not point away from the reference.
#
# ## Two questions, two rankings
#
# Here are four ways to pay about half. FORA computes every second step (1.93×). Dynamic programming chooses the nine
# steps that are computed (2.13×). *Order 1* continues the last output by its change since the output before: at the
# step after a computed one, h₁ + (h₁ − h₂) / d, where hⱼ is the j-th last computed output and d the number of steps
# between the two. Or one can take 10 steps (2.00×). **How far does each end from the uncached image, and how far from
# the reference?**

# %%
few = denoiser.draw(32, torch.Generator().manual_seed(0))
chosen = baselines.dynamic_programming(denoiser, *few, speedup=2.0)
tables = {
    "FORA": baselines.every(denoiser, 2),
    "dynamic programming": chosen,
    "dynamic programming, order 1": replace(chosen, order=1),
}
images = {name: Walk(denoiser, table)(held_out.x, held_out.cond) for name, table in tables.items()}
images = {"uncached": walks[20], "10 steps": walks[10], **images}


def report(name):
    """Print both distances of a method."""
    both = (image_mse(images[name], other) for other in (walks[20], held_out.images))
    print("{:30} to uncached {:.1e}   to the reference {:.1e}".format(name, *both))


for name in images:
    report(name)

# %% [markdown]
# All of them end farther from the reference than the uncached walk. But the distance to the uncached image does not say
# how much farther. It asks for a copy of an image that is off by itself. If the reference is what we want, then the
# reference should be what a method is tuned for.
#
# ## Learn the weights of the gate
#
# A skipped site returns a weighted sum of its past outputs. Reuse has the single weight 1. Order 1 has two fixed weights.
# These weights can be learned. So can those of computed entries, whose output is then a sum
# of the fresh one and the past ones. The image at the end of the walk is differentiable in all of them. `learn_weights`
# therefore follows the gradient of the distance to the reference, through the whole walk, with the table kept.
#
# For the noises that we learn from, walks of four times the steps are good enough, and they cost less.

# %%
pool = references(denoiser, noises=96, factor=4)
learned = learn_weights(denoiser, chosen, pool, iterations=60, batch_size=8)
images["weights learned"] = Walk(denoiser, learned)(held_out.x, held_out.cond)
for name in ("uncached", "weights learned"):
    report(name)
print(f"speedup {learned.speedup(cost):.2f}x")

# %% [markdown]
# The walk with learned weights computes less than half of the uncached one, and it ends nearer to the reference, on noises
# that it was not tuned on. More noises and more updates, which are the defaults of both functions, bring it nearer still
# (`benchmarks/quality.py`).
#
# **Can one see it?** The rows are the reference, the uncached walk, dynamic programming's table with reuse, and the same
# table with learned weights. The columns are the noises that the uncached walk misses most.

# %%
away = (walks[20] - held_out.images).square().mean((1, 2, 3))
worst = away.topk(10).indices
shown = {
    "reference": held_out.images,
    "uncached": walks[20],
    "reuse": images["dynamic programming"],
    "learned": images["weights learned"],
}
labels = held_out.cond[worst].tolist()
plots.rows({name: image[worst] for name, image in shown.items()}, labels=labels)

# %% [markdown]
# ## What was learned
#
# **Which weights does it use?** Each line is one of the weights, averaged over the sites of a step: of the fresh output and
# of the three before it.

# %%
names = ("fresh output", "last output", "last but one", "last but two")
plots.per_step(
    {name: learned.weights[:, :, j].mean(1).tolist() for j, name in enumerate(names)},
    ylabel="weight, mean over sites",
)

# %% [markdown]
# Where a step is computed, the fresh output has nearly all of the weight. Where it is skipped, the last output counts more
# than once and the one before it counts negatively: a forecast, as in order 1, but fitted to what the image needs.
#
# ## Exercises
#
# 1. What does `learn_weights` do if the target is the uncached image? (Hint: `references` with `factor=1`.)
# 2. How much does it gain if nothing is skipped?
# 3. Does a reference exist for a sampler that draws noise during the walk, such as IDDPM?

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** It brings images nearer to the uncached image, and no nearer to the reference than the uncached walk is.
#
# ```python
# copy = learn_weights(denoiser, chosen, references(denoiser, noises=48, factor=1), iterations=10, batch_size=8)
# images["copied"] = Walk(denoiser, copy)(held_out.x, held_out.cond)
# report("copied")
# ```
#
# ```text
# copied                         to uncached 3.3e-04   to the reference 3.5e-03
# ```
#
# **2.** Then it corrects the sampler alone, at full price. After 20 updates the images are a quarter nearer to the reference
# than the uncached ones.
#
# ```python
# ones = replace(chosen, compute=torch.ones_like(chosen.compute))
# corrected = learn_weights(denoiser, ones, pool, iterations=20, batch_size=8)
# images["nothing skipped"] = Walk(denoiser, corrected)(held_out.x, held_out.cond)
# report("nothing skipped")
# ```
#
# ```text
# nothing skipped                to uncached 1.8e-03   to the reference 1.7e-03
# ```
#
# **3.** No. With more steps it draws other noise, and ends at another image. `references` then takes the uncached walk's image
# as the target, and warns.
#
# ```python
# import warnings
#
# with warnings.catch_warnings(record=True) as said:
#     warnings.simplefilter("always")
#     references(load("tiny", steps=4, sampler="iddpm"), noises=2)
# print(said[0].message)
# ```
#
# ```text
# the sampler draws noise during the walk, so a noise has no reference; the uncached walk's image is the target
# ```
#
# </details>
