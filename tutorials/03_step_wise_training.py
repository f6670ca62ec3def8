# %% [markdown]
# # 3. Step-wise training
#
# After this tutorial you can
#
# - say what a router learns, and from what;
# - show that errors accumulate along a walk, and that training on single random steps does not see this;
# - follow the paper's Algorithm 1 line by line in `harmonica/sdt.py`, and run one update of it by hand;
# - train a router, watch it, freeze it, and compare it with other methods at the same speed.
#
# T is 10 here, so that a training takes seconds. All tables are judged on noises that no training has used.

# %%
# %matplotlib inline
import inspect
import sys

import torch
from matplotlib.figure import Figure
from torch.optim import AdamW

from harmonica import Router, blend, denoise, gated, macs, objective, reuse, sample, sdt
from harmonica import pictures as plots
from harmonica.models import load
from harmonica.search import baselines
from harmonica.search.references import image_mse

# This tutorial runs in a clone: Learning-to-Cache and the real digits are in its folder benchmarks.
sys.path += ["benchmarks", "../benchmarks"]
from judges import digits
from rivals import learning_to_cache

torch.set_num_threads(1)
denoiser = load("tiny", steps=10)
T, N, cost = denoiser.steps, len(denoiser.sites), macs(denoiser)
held_out, held_out_labels = denoiser.draw(100, torch.Generator().manual_seed(1_000_003))
plain = list(denoise(denoiser, held_out, held_out_labels))  # T × (100, 1, 8, 8)

# %% [markdown]
# ## Errors accumulate
#
# A cached walk has two kinds of error. At each step a reused feature makes the output a little wrong: that is the step's
# own error. But the step also *starts* from an x that earlier reuse has already changed. Learning-to-Cache, an earlier
# method, draws steps at random: it adds noise to a real image, computes the features of one step, reuses them at the
# next, and compares the outputs. It sees the first kind of error and never the second.
#
# We can look at one table in both ways. In `as_a_single_step` the plain walk arrives at step k, with features that the
# plain model has computed on the way, and only this one step runs under the table.

# %%
third = baselines.every(denoiser, 3)  # steps 0, 3, 6, 9 compute


def as_a_single_step(schedule):
    """Yield x after each step, when all steps before it were free of error."""
    x, cache = held_out, {}
    for k, row in enumerate(schedule.compute):
        kept, full = cache.copy(), {}
        yield next(denoise(denoiser, x, held_out_labels, lambda _: reuse(row, kept), start=k))
        x = next(denoise(denoiser, x, held_out_labels, lambda _: reuse([True] * N, full), start=k))
        cache |= {site: feature for site, feature in full.items() if row[site]}


def along_its_own_walk(schedule):
    """Yield x after each step of the walk that will really be run."""
    cache = {}
    return denoise(denoiser, held_out, held_out_labels, lambda k: reuse(schedule.compute[k], cache))


# %% [markdown]
# **How far is x from the x of the plain walk after each step, seen in both ways?** (The paper has a figure like this one
# for DiT-XL/2.)

# %%
seen, real = list(as_a_single_step(third)), list(along_its_own_walk(third))
plots.error_along_walk(plain, {"as random steps see it": seen, "on its own walk": real})

# %%
last_but_one = [image_mse(walk[-2], plain[-2]) for walk in (seen, real)]
print(
    f"after step 8: {last_but_one[0]:.1e} seen, {last_but_one[1]:.1e} real, {last_but_one[1] / last_but_one[0]:.0f} times as much"
)
print(
    f"in the image: {image_mse(seen[-1], plain[-1]):.1e} seen, {image_mse(real[-1], plain[-1]):.1e} real"
)

# %% [markdown]
# Seen as single steps, the error returns to zero whenever a step computes everything. On the real walk it does not: such a
# step gives the exact output for a wrong x. The last step computes everything. As a single step it has no error at all,
# but the image at the end of the real walk has kept the error of all steps before.
#
# ## The router
#
# Training learns a table r of scores in (0, 1), one for each step and site. During training a site returns the mixture
# r·fresh + (1 − r)·cached, so that the loss has a gradient with respect to r. Row 0 is always one. `router()` has the
# shape (T, N). **What does it look like before training?**

# %%
x, labels = denoiser.draw(4, torch.Generator().manual_seed(0))
router = Router(T, denoiser.sites, generator=torch.Generator().manual_seed(0), about=denoiser.about)
plots.router_heatmap(router(), tuple(denoiser.sites), title="Untrained")

# %% [markdown]
# ## Algorithm 1, by hand
#
# Here is one walk of step-wise denoising training (SDT). It starts from pure noise and needs no image. Its state is x and
# two dicts: the cache, and the memory of the sampler. The *student* is the model under the router's gate.
#
# **Step 0.** Nothing has been kept yet. The student computes everything, and `blend` keeps the features.

# %%
tau, beta, lr = 0.1, 3e-4, 0.2
optimizer = AdamW(router.parameters(), lr=lr, weight_decay=0.0)
cache, memory = {}, {}
with torch.no_grad(), gated(denoiser.sites, blend(router.row(0), cache, tau)):
    out = denoiser.predict(x, 0, labels)
x1 = denoiser.step(x, out, 0, memory)
print(len(cache), "features kept")

# %% [markdown]
# **Step 1, the teacher.** The teacher is the same model without a gate. It predicts from the *student's* x. Its output is the
# target.

# %%
with torch.no_grad():
    target = denoiser.predict(x1, 1, labels)

# %% [markdown]
# **Step 1, the student.** The student predicts from the same x, under `blend`. Every site computes and mixes its output
# with the kept one. Where r > τ, the mixture replaces the kept feature.

# %%
r = router.row(1)  # (N,), σ(logits), with a gradient
with gated(denoiser.sites, blend(r, cache, tau)):
    out = denoiser.predict(x1, 1, labels)

# %% [markdown]
# **Step 1, the loss.** The loss is λ·MSE + β·Σr. The MSE says how wrong the output is. λ is 1 here (tutorial 4 is about λ).
# β is the price of computing one site. The first term pushes scores up, the second pulls them down.

# %%
loss = objective(out, target, r, 1.0, beta)
print(
    f"MSE {image_mse(out.detach(), target):.2e} + β·Σr {beta * float(r.detach().sum()):.2e} = {loss.item():.2e}"
)

# %% [markdown]
# The second term is about 130 times the first. Still it does not decide everything, because a score follows the *slopes* of
# the two terms and not their sizes. The slope of β·Σr is β for every score at every step. The slope of the MSE is large
# where computing would make the output much better. At step 1 computing would hardly improve the output, so the scores will
# fall. The MSE grows from step to step: it is about ten times larger at step 2, and a hundred thousand times at the last
# (tutorial 4 plots it). There, many scores will rise.
#
# **Step 1, the update.** The gradient reaches row 1 of the router and nothing else: the weights are frozen, and kept
# features are detached (cut off from the gradient computation), so no gradient reaches an earlier step. AdamW skips a
# parameter whose gradient is None, so other rows do not move. A zero gradient would not be enough, because momentum would
# still move them. That is why `set_to_none=True` is there.

# %%
optimizer.zero_grad(set_to_none=True)
loss.backward()
optimizer.step()
print(
    "rows with a gradient:",
    [k for k, row in enumerate(router.rows, start=1) if row.grad is not None],
)

# %% [markdown]
# **On to step 2.** The sampler steps with the *student's* output. This line makes training and inference the same walk: at
# step 2 student and teacher both start from an x that contains the student's errors.

# %%
x2 = denoiser.step(x1, out.detach(), 1, memory)
print(
    f"the teacher's output would have led to another x, mean squared difference {image_mse(x2, denoiser.step(x1, target, 1, {})):.1e}"
)

# %% [markdown]
# This continues to step T − 1, and then with the next noise. Here is the library's loop. Step 0 is `next(denoise(…))`, which runs
# one step of the walk. `_update` is the update. It also averages loss and MSE over several processes, multiplies the loss
# by a power of two that half precision needs, and keeps the logits within ±5, as the released code does. Find the rest of
# the lines above.

# %%
source = inspect.getsource(sdt)
print(source[source.index("    for ") :])

# %% [markdown]
# Is it really the same? From the same start, one update of `sdt` must give the same router, bit for bit.

# %%
twin = Router(T, denoiser.sites, generator=torch.Generator().manual_seed(0))
updates = sdt(denoiser, twin, [(x, labels)], tau=tau, beta=beta, lr=lr, proxy=None)
print(next(updates))
print("the same router:", torch.equal(twin.logits, router.logits))

# %% [markdown]
# ## Train
#
# `sdt` is a generator: it yields after every update, and the caller decides when to stop. `train_sdt` adds a progress
# bar, checkpoints and resuming. Below: 25 walks of 9 updates each, with 4 noises in a batch. The learning rate is twenty
# times the authors', because the run is a hundredth of theirs. **Does the table settle?**


# %%
def train(denoiser, beta, seed=0, watch=None):
    """Train a router on 25 walks, call `watch` with each update, and return the router."""
    router = Router(
        T, denoiser.sites, generator=torch.Generator().manual_seed(seed), about=denoiser.about
    )
    generator = torch.Generator().manual_seed(seed + 1)
    noise = (denoiser.draw(4, generator) for _ in range(25))
    for update in sdt(denoiser, router, noise, tau=tau, beta=beta, lr=lr, proxy=None):
        if watch:
            watch(update)
    return router


history = []
router = train(denoiser, beta, watch=history.append)
ends = [update for update in history if update.k == T - 1]  # the last update of each walk
plots.per_step({"CUR": [u.cur for u in ends]}, xlabel="walk", ylabel="share of the table reused")

# %% [markdown]
# At first hardly anything is reused: the scores start around a half and have to fall below τ = 0.1. After twenty walks
# little changes. **What has it learned?** First the scores, then the decisions.

# %%
plots.router_heatmap(router(), tuple(denoiser.sites), title="Scores after training")

# %%
schedule = router.schedule(tau)
plots.router_heatmap(schedule, title=f"Decisions, {schedule.speedup(cost):.2f}x in theory")

# %%
scores = router()[1:]
between = ((scores > 0.05) & (scores < 0.95)).float().mean()
print(f"{between:.0%} of the scores lie between 0.05 and 0.95")

# %% [markdown]
# It reuses mostly the first steps, where tutorial 1 has shown that reuse is cheap. Many scores are still far from 0 and from 1. For these
# entries training has judged a mixture, but inference will compute or reuse. The paper leaves this gap open.
#
# ## Judge
#
# How good is the table at this speed? We compare it with FORA, which computes every n-th step and trains nothing, and
# with Learning-to-Cache, which trains on real digits at random steps. Each is a function that returns a schedule of at
# least the given speedup. A training depends on its seed, so we train three times.
# **Whose image is closest to the one without a cache?** A dot is one table, a bar is the mean.

# %%
speedup = schedule.speedup(cost)
images, image_labels = digits()
tables = {
    "SDT": [schedule, *(train(denoiser, beta, seed).schedule(tau) for seed in (1, 2))],
    "Learning-to-Cache": [
        learning_to_cache(
            denoiser, images, image_labels, speedup=speedup, updates=150, batch_size=4, beta=1e-3, lr=lr,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(3)
    ],
    "every n-th step": [baselines.every(denoiser, speedup=speedup)],
}  # fmt: skip


def judge(table):
    """Return the image error of a table on the held-out noises."""
    return image_mse(sample(denoiser, held_out, held_out_labels, table), plain[-1])


errors = {name: [judge(table) for table in some] for name, some in tables.items()}
figure = Figure(figsize=(5, 2.6), layout="constrained")
ax = figure.subplots()
ax.bar(list(errors), [sum(values) / len(values) for values in errors.values()], color="0.8")
for name, values in errors.items():
    ax.scatter([name] * len(values), values, color="black", zorder=2)
ax.set_ylabel("image error")
figure

# %%
for name, some in tables.items():
    for table, error in zip(some, errors[name], strict=True):
        print(f"{name:18} {table.speedup(cost):.2f}x  CUR {table.cur:.1%}  image error {error:.1e}")

# %% [markdown]
# By this measure step-wise training is not ahead. The single-step view is wrong, as you have seen, and still the tables
# that were trained with it are at least as good here. What is the reason? Look at the decisions again: SDT reuses the first
# steps in one long run. The gradient of row k knows the output of step k alone. It cannot know that computing once in
# between would refresh the features for *all later* steps. The other two methods compute every now and then by construction.
# A search on whole walks does see this effect; `harmonica/search/refine.py` has one (tutorial 6 uses it).
#
# Two cautions. On DiT-XL/2 the paper finds step-wise training ahead of Learning-to-Cache, and a model of 0.63 million weights
# cannot refute that. And the distance to the image without a cache is only one measure. By the distance of a whole set of
# images to real ones, as in the paper, the learned tables are nearer than no cache at 1.4× (`docs/results.md`).
#
# ## Exercises
#
# 1. A router has scores, a schedule has decisions, and τ turns the first into the second. How does CUR depend on τ for the
#    trained router? And for an untrained one?
# 2. Let the sampler step with the *teacher's* output, and change nothing else. What happens to the schedule and its image
#    error? (Hint: write a denoiser that wraps another one. At each step the teacher calls `predict` first.)
# 3. How does CUR depend on β? Train with β = 1e-3 too.

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** After training it depends little on τ. Before training τ decides everything.
#
# ```python
# untrained = Router(T, denoiser.sites, generator=torch.Generator().manual_seed(0))
# for tau_ in (0.05, 0.1, 0.3, 0.5):
#     print(f"{tau_:.2f}  trained {router.schedule(tau_).cur:.1%}  untrained {untrained.schedule(tau_).cur:.1%}")
# ```
#
# ```text
# 0.05  trained 28.1%  untrained 0.0%
# 0.10  trained 30.6%  untrained 1.2%
# 0.30  trained 32.5%  untrained 17.5%
# 0.50  trained 33.8%  untrained 44.4%
# ```
#
# **2.** Almost nothing on this model: a few entries differ, and the error is about the same. At these scores the
# student's walk is never far from the teacher's. The argument for the student's walk is right; how much it matters has
# to be measured.
#
# ```python
# class TeacherWalks:
#     """The denoiser, except that a step is taken with the first prediction made at it."""
#
#     def __init__(self, inner):
#         self.inner, self.steps, self.sites, self.about = inner, inner.steps, inner.sites, inner.about
#         self.draw, self.k = inner.draw, None
#
#     def predict(self, x, k, cond):
#         out = self.inner.predict(x, k, cond)
#         if k != self.k:
#             self.k, self.first = k, out.detach()
#         return out
#
#     def step(self, x, out, k, memory):
#         return self.inner.step(x, self.first, k, memory)
#
#
# def say(table):
#     return f"{table.speedup(cost):.2f}x  CUR {table.cur:.1%}  image error {judge(table):.1e}"
#
#
# taught = train(TeacherWalks(denoiser), beta).schedule(tau)
# print("student's steps", say(schedule))
# print("teacher's steps", say(taught), "entries that differ", int((taught.compute != schedule.compute).sum()))
# ```
#
# ```text
# student's steps 1.38x  CUR 30.6%  image error 2.2e-03
# teacher's steps 1.36x  CUR 28.7%  image error 2.2e-03 entries that differ 3
# ```
#
# **3.** If computing costs more, more is reused.
#
# ```python
# print(say(train(denoiser, 1e-3).schedule(tau)))
# ```
#
# ```text
# 1.52x  CUR 36.9%  image error 4.7e-03
# ```
#
# </details>
