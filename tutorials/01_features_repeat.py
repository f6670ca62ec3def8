# %% [markdown]
# # 1. Features repeat
#
# After this tutorial you can
#
# - say what a diffusion transformer computes at one step, and where its work goes;
# - measure how alike the features of neighbouring steps are, by block and by kind;
# - predict what a picture loses when features are used twice.
#
# The model is the one that comes with the library: a DiT of 0.63 million weights which draws 8×8 digits. It is built
# as DiT-XL/2 is, only smaller, so that every experiment here runs in seconds on a processor. Numbers of other sizes
# will differ; the code to take them is the same.
#
# You need to know: a diffusion model turns noise into an image in T steps, at each of which a network predicts the
# noise that is still in x. Symbols are the paper's (arXiv 2410.01723), except that steps are counted as they are
# executed: k = 0, 1, … T − 1, where the paper's t is T − k.

# %%
# %matplotlib inline
import torch

from harmonica import Schedule, denoise, macs, sample
from harmonica.evaluation import pictures as plots
from harmonica.evaluation.distances import image_mse
from harmonica.models import load
from harmonica.search import baselines

torch.set_num_threads(1)  # the model is too small to share among cores
denoiser = load("tiny", steps=20)  # frozen weights, DDIM with T = 20, guidance 1.5

# %% [markdown]
# ## What is a walk?
#
# A *denoiser* is a model with its sampler and its guidance. (Guidance: each prediction runs the model with the label
# and without it, and exaggerates the difference. So a batch of B is 2B inside.) `draw` gives noise to start from;
# labels say which digit each one shall become. `denoise` yields x after each of the T executed steps, k = 0 … 19.
# **What does x look like on the way?** Each row below is a moment of the walk, each column a digit: first pure noise,
# then x after steps 4, 9, 14, 19.

# %%
x, _ = denoiser.draw(10, torch.Generator().manual_seed(0))  # (B, C, H, W) = (10, 1, 8, 8)
labels = torch.arange(10)  # one of each digit
walk = list(denoise(denoiser, x, labels))  # T × (10, 1, 8, 8)
plots.sheet(
    torch.cat([x, walk[4], walk[9], walk[14], walk[19]]),
    title="noise, then x after steps 4, 9, 14, 19",
)

# %% [markdown]
# For half of the walk nothing can be recognised. All the same, each of the 20 steps ran the whole network.
#
# ## What does a step compute?
#
# A DiT is a stack of blocks, and each block adds two things to its tokens: what the *attention* says and what the
# *feed-forward* says. Both are scaled and shifted by the timestep and the label (`adaLN_modulation`).

# %%
denoiser.model.blocks[0]

# %% [markdown]
# Attention and feed-forward are the *sites*: the places whose output could be kept and used again. The bundled model
# has 8 blocks, hence N = 16 sites.

# %%
print(len(denoiser.sites), "sites:", ", ".join(denoiser.sites))

# %% [markdown]
# **How much of a step's work happens at sites?** `macs` counts multiply-accumulates while the model runs. What no
# site covers (embeddings, modulation, the last layer) is the `rest`: it must run at every step, whatever is cached.

# %%
cost = macs(denoiser)
for kind in ("attn", "mlp"):
    here = torch.tensor([name.endswith(kind) for name in denoiser.sites])
    print(f"{kind:5}{float(cost.sites[here].sum()) / cost.total:6.1%}")
print(f"rest {cost.rest / cost.total:6.1%}")

# %% [markdown]
# ## How alike are the features of neighbouring steps?
#
# To see a feature, stand at its site. While a model is `gated`, every site asks a *gate* for its output; the gate
# below lets the site compute, looks at the result, and hands it on. It measures ‖f⁽ᵏ⁾ − f⁽ᵏ⁻¹⁾‖ / ‖f⁽ᵏ⁾‖: how far
# feature f has moved since the step before, as a share of its size. `denoise` takes a function from the step k to the
# gate of that step. (Tutorial 2 is about gates.)

# %%
change = torch.full((denoiser.steps, len(denoiser.sites)), torch.nan)  # (T, N)
previous = {}


def watch(k):
    def gate(site, compute):
        fresh = compute()
        if k > 0:
            change[k, site] = (fresh - previous[site]).norm() / fresh.norm()
        previous[site] = fresh
        return fresh

    return gate


for _ in denoise(denoiser, x, labels, watch):
    pass

# %% [markdown]
# **At which blocks and steps do features move, and where do they stay?** Steps run from left to right, blocks from
# top to bottom. Light means: nearly the same as a step ago. Step 0 has no step before it. The colours end at 0.4 and
# the last step lies beyond them, so the next cell prints it.

# %%
plots.site_heatmap(
    change, tuple(denoiser.sites), label="relative change since step k − 1", most=0.4
)

# %%
print(f"median over sites, steps 1 to 18:   {change[1:19].median():.2f}")
print(f"median over sites, step 19 (t = 0): {change[19].median():.2f}")
print(f"entries below 0.1: {(change[1:] < 0.1).float().mean():.0%} of the table")

# %% [markdown]
# Three things to see.
#
# - Features do repeat. The typical one differs from its predecessor by a seventh of its size, three in ten of all by
#   less than a tenth.
# - They do so unevenly: early steps more than late ones, feed-forward more than attention, the first block more than
#   the middle ones. A method that treats all sites alike leaves something on the table.
# - The last step is another matter. At t = 0 there is no noise left to predict, and the features there have little to
#   do with those before.
#
# ## How long does a feature stay good?
#
# **How does the change grow if we wait 2, 3, … steps?** `baselines.drift` takes the same measurement (in ℓ₁ norm,
# mean over blocks) against the feature of i steps ago. The plot shows its mean over the walk for each i.

# %%
gaps = 10
drift = baselines.drift(denoiser, x, labels, gap=gaps)  # kind → (T, gaps)
lines = {
    kind: [0.0, *(float(rows[i:, i - 1].mean()) for i in range(1, gaps + 1))]
    for kind, rows in drift.items()
}
plots.per_step(dict(sorted(lines.items())), xlabel="steps ago", ylabel="relative change")

# %% [markdown]
# About in proportion at first, then ever more slowly: after ten steps an attention's feature has changed by about its
# own size, which is to say that it is another feature. One or two steps is the range where reuse can be cheap.
#
# ## What does blind reuse do to a picture?
#
# The simplest cache: compute everything at every second step, reuse everything in between (FORA does this). A
# `Schedule` is a table that says what computes; `sample` walks under it. **Which pictures change, and where?**

# %%
plain = sample(denoiser, x, labels)
half = baselines.every(denoiser, 2)
plots.comparison(
    plain,
    sample(denoiser, x, labels, half),
    labels=labels.tolist(),
    title="every second step computes",
)

# %% [markdown]
# All ten digits survive, although half of the features were not computed. **How far can one go?** Rows: everything
# computes, then every 2nd, 3rd, 5th and 10th step.

# %%
tables = {n: baselines.every(denoiser, n) for n in (1, 2, 3, 5, 10)}
images = {n: sample(denoiser, x, labels, table) for n, table in tables.items()}
plots.sheet(torch.cat(list(images.values())), title="every 1st, 2nd, 3rd, 5th, 10th step computes")

# %%
for n, table in tables.items():
    error = image_mse(images[n], plain)
    print(
        f"n = {n:2}  reused {table.cur:5.1%}  {table.speedup(cost):.2f}x in theory  error {error:.1e}"
    )

# %% [markdown]
# The error is the mean squared difference to the uncached picture, on a range of [−1, 1]. It rises steeply: twice the
# reuse is not twice the damage.
#
# ## Is the feature that moves least the one to reuse?
#
# It seems natural, and several methods do just that: reuse where features have changed little. Test it. Reuse *one
# whole step* k, compute all others, and compare with the measured change. **Does the damage follow the change?**

# %%
damage = [0.0]
for k in range(1, denoiser.steps):
    compute = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
    compute[k] = False
    damage.append(image_mse(sample(denoiser, x, labels, Schedule(compute)), plain))
moved = change.square().mean(1).tolist()  # (T,)
lines = {"image, when step k is reused": damage, "features, relative, since step k − 1": moved}
plots.per_step(lines, ylabel="mean squared change", log=True)

# %% [markdown]
# Only roughly. At step 19 the features change several times more than anywhere else, but the picture hardly notices:
# DDIM's last step has almost no noise left to remove. From step 17 to 18 the squared change grows by half, the damage
# sevenfold. What counts is not how much a feature moves but what the picture makes of it. So the table has to be
# *learned* from pictures, and that is the subject of this library.
#
# ## Exercises
#
# 1. At T = 50 the steps are shorter. How much smaller is the median change over steps 1 to T − 2?
# 2. Are the changes of another batch of noises the same? (If not, one table for all images would make no sense.)
# 3. Which one of the 8 blocks would you reuse at *every* step but the first? Measure all eight.

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** About 0.4 times as large, as 20/50 lets one expect: a longer walk leaves more to reuse.
#
# ```python
# longer = load("tiny", steps=50)
# drifts = [baselines.drift(d, x, labels, gap=1) for d in (denoiser, longer)]
# medians = [torch.cat([rows[1:-1, 0] for rows in kinds.values()]).median() for kinds in drifts]
# print(f"{medians[1] / medians[0]:.2f}")
# ```
#
# ```text
# 0.41
# ```
#
# **2.** They are. What moves depends on the step and the site, hardly on the image: the two tables correlate almost
# perfectly.
#
# ```python
# first = change.clone()
# other, some = denoiser.draw(10, torch.Generator().manual_seed(99))
# for _ in denoise(denoiser, other, some, watch):
#     pass
# both = torch.stack([first[1:19].flatten(), change[1:19].flatten()])  # without the last step, which would outweigh all
# print(f"{torch.corrcoef(both)[0, 1]:.3f}")
# ```
#
# ```text
# 0.996
# ```
#
# **3.** The last one, 7; but it costs an error of 0.014, twenty-five times that of computing every second step. No
# block is free for a whole walk.
#
# ```python
# for block in range(8):
#     compute = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
#     compute[1:, 2 * block : 2 * block + 2] = False
#     print(block, f"{image_mse(sample(denoiser, x, labels, Schedule(compute)), plain):.1e}")
# ```
#
# ```text
# 0 2.0e-01
# 1 1.4e-01
# 2 5.5e-02
# 3 4.7e-02
# 4 2.2e-02
# 5 4.9e-02
# 6 3.1e-02
# 7 1.4e-02
# ```
#
# </details>
