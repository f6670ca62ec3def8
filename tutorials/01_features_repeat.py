# %% [markdown]
# # 1. Features repeat
#
# After this tutorial you can
#
# - say what a diffusion transformer computes at one step, and where its work goes;
# - measure how alike the features of neighbouring steps are, by block and by kind;
# - say how well the change of features predicts the damage to a picture.
#
# The model comes with the library: a DiT of 0.63 million weights that draws 8×8 digits. It is built like DiT-XL/2, only
# smaller, so every experiment here runs in seconds on a CPU. The numbers of a larger model differ; the code that
# measures them is the same.
#
# You need to know this: a diffusion model turns noise into an image in T steps. At each step a network predicts the noise
# that is still in x. The symbols are the paper's (arXiv 2410.01723), with one exception: steps are counted in the order in
# which they run, k = 0, 1, … T − 1. The paper's t is T − k.

# %%
# %matplotlib inline
import torch

from harmonica import Schedule, denoise, macs, sample
from harmonica import pictures as plots
from harmonica.models import load
from harmonica.search import baselines
from harmonica.search.references import image_mse

torch.set_num_threads(1)  # the model is too small to share among cores
denoiser = load("tiny", steps=20)  # frozen weights, DDIM with T = 20, guidance 1.5

# %% [markdown]
# ## What is a walk?
#
# A *denoiser* is a model together with its sampler and its guidance. (Guidance means that the model runs twice for each
# prediction, with the label and without it, and that the difference is exaggerated. So a batch of B images is a batch
# of 2B inside the model.) A *walk* is the way from one noise to one image, T steps long. `draw` gives noise to start from.
# The labels say which digit each noise shall become. `denoise` yields x after each step, k = 0 … 19.
# **What does x look like on the way?** Each row below is a moment of the walk, each column is a digit: first pure
# noise, then x after steps 4, 9, 14, 19.

# %%
x, _ = denoiser.draw(10, torch.Generator().manual_seed(0))  # (B, C, H, W) = (10, 1, 8, 8)
labels = torch.arange(10)  # one of each digit
walk = list(denoise(denoiser, x, labels))  # T × (10, 1, 8, 8)
plots.sheet(
    torch.cat([x, walk[4], walk[9], walk[14], walk[19]]),
    title="noise, then x after steps 4, 9, 14, 19",
)

# %% [markdown]
# In the first half of the walk no digit can be recognised. Still, each of the 20 steps ran the whole network.
#
# ## What does a step compute?
#
# A DiT is a stack of blocks. Each block adds two things to its tokens: the output of an *attention* and the output of a
# *feed-forward* network. The timestep and the label scale and shift the *input* of each of them, and multiply its output by
# a factor before it is added (`adaLN_modulation`; the paper of DiT calls this factor a gate).

# %%
denoiser.model.blocks[0]

# %% [markdown]
# The attentions and the feed-forwards are the *sites*: the modules whose output could be kept and used again. Such an
# output is called a *feature*. The bundled model has 8 blocks, so it has N = 16 sites.

# %%
print(len(denoiser.sites), "sites:", ", ".join(denoiser.sites))

# %% [markdown]
# **How much of a step's work happens at sites?** `macs` counts multiply-accumulates (MACs) while the model runs. The work
# outside of all sites (embeddings, modulation, the last layer) is the `rest`. It must run at every step.

# %%
cost = macs(denoiser)
for kind in ("attn", "mlp"):
    here = torch.tensor([name.endswith(kind) for name in denoiser.sites])
    print(f"{kind:5}{float(cost.sites[here].sum()) / cost.total:6.1%}")
print(f"rest {cost.rest / cost.total:6.1%}")

# %% [markdown]
# ## How alike are the features of neighbouring steps?
#
# A *gate* is a function that stands between a site and the rest of the model. Every site asks the gate for its output.
# The gate below lets the site compute, measures the result, and returns it unchanged. It measures
# ‖f⁽ᵏ⁾ − f⁽ᵏ⁻¹⁾‖ / ‖f⁽ᵏ⁾‖: how far the feature f has moved since the step before, divided by its size. `denoise` takes a
# function that returns the gate of step k. (Tutorial 2 is about gates.)

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
# top to bottom. A light cell means that the feature is nearly the same as one step ago. Step 0 is grey, because no step
# comes before it. The colours end at 0.4. The last step lies beyond that, so the next cell prints it.

# %%
plots.site_heatmap(
    change, tuple(denoiser.sites), label="relative change since step k − 1", most=0.4
)

# %%
print(f"median over sites, steps 1 to 18:   {change[1:19].median():.2f}")
print(f"median over sites, step 19 (last):  {change[19].median():.2f}")
print(f"entries below 0.1: {(change[1:] < 0.1).float().mean():.0%} of the table")

# %% [markdown]
# Three things to see.
#
# - Features repeat. A typical feature differs from the one before by 15 % of its size, and 30 % of the features differ
#   by less than 10 %.
# - They repeat unevenly. Early steps change less than late ones, feed-forwards less than attentions, and the attention of
#   block 0 less than all others. A method that treats all sites alike cannot use this.
# - The last step is different. Almost no noise is left to predict there, and the features have little in common with
#   those of the step before.
#
# ## How long does a feature stay good?
#
# **How does the change grow if we wait 2, 3, … steps?** `drift` measures the same change (in the ℓ₁ norm) against the
# feature of i steps ago. The plot shows its mean over the walk and the blocks for each i.

# %%
gaps = 10


def drift(denoiser, gap):
    """Return (T, gap, N): entry [k, i − 1] says how far outputs of step k are from those i steps ago."""
    change, past = torch.zeros(denoiser.steps, gap, len(denoiser.sites)), {}

    def watch(k):
        def gate(site, compute):
            fresh, kept = compute(), past.get(site, [])
            size = fresh.abs().sum((1, 2))
            for i, old in enumerate(kept):
                change[k, i, site] = ((fresh - old).abs().sum((1, 2)) / size).mean()
            past[site] = [fresh, *kept][:gap]  # newest first
            return fresh

        return gate

    for _ in denoise(denoiser, x, labels, watch):
        pass
    return change


moved = drift(denoiser, gaps)
lines = {
    kind: [0.0, *(float(moved[i:, i - 1, first::2].mean()) for i in range(1, gaps + 1))]
    for first, kind in enumerate(("attn", "mlp"))
}
plots.per_step(dict(sorted(lines.items())), xlabel="steps ago", ylabel="relative change")

# %% [markdown]
# At first the change grows almost in proportion to the number of steps, then more slowly. After ten steps the feature of
# an attention has changed by about its own size: it is another feature. Reuse can be cheap over one or two steps.
#
# ## What does blind reuse do to a picture?
#
# The simplest cache computes everything at every second step and reuses everything in between. (The method FORA does
# this.) A `Schedule` is a table that says which site computes at which step, and `sample` walks under it.
# **Which pictures change, and where?**

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
# All ten digits can still be read, although half of the features were not computed. **How far can we go?** The rows:
# everything computes, then every 2nd, 3rd, 5th and 10th step.

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
# The error is the mean squared difference to the picture without a cache; pixels lie in [−1, 1]. It rises much faster than
# the share of reuse: from 50 % to 65 % it grows more than fourfold.
#
# ## Is the feature that moves least the one to reuse?
#
# Several methods reuse wherever features have changed little. We can test this idea. Reuse *one whole step* k, compute
# all others, and compare the damage with the measured change. **Does the damage follow the change?**

# %%
damage = [0.0]
for k in range(1, denoiser.steps):
    compute = torch.ones(denoiser.steps, len(denoiser.sites), dtype=torch.bool)
    compute[k] = False
    damage.append(image_mse(sample(denoiser, x, labels, Schedule(compute)), plain))
squared_change = change.square().mean(1).tolist()  # (T,)
lines = {
    "image, when step k is reused": damage,
    "features, relative, since step k − 1": squared_change,
}
plots.per_step(lines, ylabel="mean squared change", log=True)

# %%
ranks = torch.tensor([damage[1:], squared_change[1:]]).argsort(1).argsort(1).float()
print(f"rank correlation of the two, steps 1 to 19: {torch.corrcoef(ranks)[0, 1]:.2f}")
for k in (17, 18, 19):
    print(f"step {k}: features {squared_change[k]:.2e}, image {damage[k]:.2e}")

# %% [markdown]
# In order, yes: the rank correlation is 0.91. In size, no. At step 19 the squared change of the features is 38 times that of
# step 18, but the damage is a fifth, because DDIM's last step has almost no noise left to remove. From step 17 to 18 the
# squared change grows by half and the damage grows sevenfold. So the change of a feature is a useful first guess. What
# counts is the effect on the final image. This library compares the model's own outputs, with and without reuse, and
# weighs each step by that effect (tutorial 4). It needs no real pictures for this.
#
# ## Exercises
#
# 1. At T = 50 the steps are shorter. Take the mean change of each step from 1 to T − 2 (`drift`). How much smaller is
#    the median of these means?
# 2. Are the changes the same for another batch of noises? (If they were not, one table for all images would make no
#    sense.)
# 3. Which one of the 8 blocks would you reuse at *every* step except the first? Measure all eight.

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** It is about 0.4 times as large, which is 20/50. A longer walk leaves more to reuse.
#
# ```python
# longer = load("tiny", steps=50)
# medians = [drift(d, 1)[1:-1, 0].mean(-1).median() for d in (denoiser, longer)]
# print(f"{medians[1] / medians[0]:.2f}")
# ```
#
# ```text
# 0.39
# ```
#
# **2.** Yes. The change depends on the step and the site, and hardly on the image: the two tables are almost perfectly
# correlated.
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
# **3.** The last one, block 7. But the error is 0.014, twenty-five times the error of computing every second step. No
# block can be reused for a whole walk.
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
