# %% [markdown]
# # 6. Bring your own
#
# After this tutorial you can
#
# - write a `Denoiser` for a model that this library has never seen, and have `check_denoiser` tell you whether it is
#   one;
# - train a router for it, without changing a line of the library;
# - write a caching method of your own as a function that returns a `Schedule`;
# - put both on a bench, and read the plot that it makes.
#
# The model: a small network without attention, which draws points of two moons. It has nothing in common with a DiT
# but this: it is called T times, and it is made of branches that are added up.

# %%
# %matplotlib inline
import torch
from torch import nn

from harmonica import Schedule, check_denoiser, denoise, macs, sample, train_sdt
from harmonica import pictures as plots
from harmonica.samplers import DDIM, alphas_cumprod
from harmonica.search import baselines

torch.set_num_threads(1)


class Moons(nn.Module):
    """Noise in points (B, 2) at timesteps (B,), for moon 0 or 1 (B,): six branches that are added up."""

    def __init__(self, width=64, depth=6):
        super().__init__()
        self.points, self.time = nn.Linear(2, width), nn.Linear(32, width)
        self.moon = nn.Embedding(2, width)
        self.branches = nn.ModuleList(self.branch(width) for _ in range(depth))
        self.out = nn.Linear(width, 2)

    @staticmethod
    def branch(width):
        layers = nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        return nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, x, t, moon):
        waves = t[:, None] / 1000 * torch.exp(torch.linspace(0, 7, 16))  # (B, 16)
        condition = self.time(torch.cat([waves.sin(), waves.cos()], dim=1)) + self.moon(moon)
        h = self.points(x) + condition
        for branch in self.branches:
            h = h + branch(h + condition)
        return self.out(h)


# %% [markdown]
# Train it, as any diffusion model is trained: 1500 updates on points to which noise was added.


# %%
def two_moons(count, generator):
    """Return points (B, 2) on two half circles, and which of the two, (B,)."""
    angle = torch.rand(count, generator=generator) * torch.pi
    moon = torch.randint(2, (count,), generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.where(moon[:, None] == 0, upper, lower) - torch.tensor([0.5, 0.25])
    return points + 0.05 * torch.randn(count, 2, generator=generator), moon


generator = torch.Generator().manual_seed(0)
with torch.random.fork_rng():
    torch.manual_seed(0)
    model = Moons()
signal = alphas_cumprod().float()  # (1000,), what is left of a point at each timestep
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(1500):
    points, moon = two_moons(256, generator)
    t = torch.randint(1000, (256,), generator=generator)
    noise = torch.randn(256, 2, generator=generator)
    a = signal[t][:, None]
    noisy = a.sqrt() * points + (1 - a).sqrt() * noise
    loss = (model(noisy, t, moon) - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# ## A denoiser
#
# Six members. `steps` and `sites` are what a table has rows and columns for. `predict` is the model at step k, `step`
# the sampler; `draw` gives a noise and a condition to start from; `about` is what a schedule will remember.


# %%
class MoonsDenoiser:
    """Moons under DDIM, frozen."""

    def __init__(self, model, steps):
        self.model = model.eval()
        self.sampler, self.steps = DDIM(steps), steps
        self.sites = {f"branches.{i}.mlp": branch for i, branch in enumerate(model.branches)}

    @property
    def about(self):
        return {"model": "moons", "sampler": self.sampler.name, "timesteps": self.sampler.timesteps}

    def predict(self, x, k, cond):
        return self.model(x, torch.full((len(x),), float(self.sampler.timesteps[k])), cond)

    def step(self, x, out, k, memory):
        return self.sampler.step(x, out, k, memory)

    def draw(self, batch_size, generator):
        x = torch.randn(batch_size, 2, generator=generator)
        return x, torch.randint(2, (batch_size,), generator=generator)


# %% [markdown]
# ## Is it one?
#
# `check_denoiser` holds it to the laws that the rest of the library relies on: each site is asked once in a
# prediction, computing everything is the plain model, a forked walk ends where the original does, and so on. It
# raises where one is broken.

# %%
denoiser = MoonsDenoiser(model, steps=20)
try:
    check_denoiser(denoiser)
except AssertionError as error:
    print("not yet:", error)

# %% [markdown]
# It found what was forgotten: the weights must be frozen, or a training of the router would spend its time on
# gradients that nobody wants.

# %%
model.requires_grad_(False)
check_denoiser(denoiser)
cost = macs(denoiser)
print(f"a denoiser; sites cover {cost.covered:.0%} of its MACs")

# %% [markdown]
# **What does it draw?** Left, points from the data; right, 1000 noises after 20 steps.

# %%
from matplotlib.figure import Figure

x, moons = denoiser.draw(1000, torch.Generator().manual_seed(1_000_003))
plain = sample(denoiser, x, moons)
real, real_moons = two_moons(1000, torch.Generator().manual_seed(1))


def scatter(**sets):
    """Draw sets of (points, moon) side by side."""
    figure = Figure(figsize=(3 * len(sets), 2.6), layout="constrained")
    panels = zip(figure.subplots(1, len(sets)), sets.items(), strict=True)
    for ax, (title, (points, moon)) in panels:
        ax.scatter(*points.T.numpy(), c=moon.numpy(), cmap="cividis", s=4)
        ax.set(title=title.replace("_", " "), xlim=(-2, 2), ylim=(-1.3, 1.3))
    return figure


scatter(data=(real, real_moons), drawn=(plain, moons))

# %% [markdown]
# ## Everything else works now
#
# Routers, λ, other methods, the bench: none of them knows what a denoiser is made of. Train a router (`proxy=None` is
# λ = 1, plain step-wise training). **What does it reuse?**

# %%
schedule = train_sdt(
    denoiser, iterations=570, batch_size=32, beta=1e-3, lr=0.2, proxy=None, progress=False
).schedule()
plots.router_heatmap(schedule, title=f"{schedule.speedup(cost):.2f}x in theory")

# %% [markdown]
# Unlike with the digits, each branch has a rhythm of its own: it is refreshed now and then, also early.
#
# **Do the moons survive?**

# %%
scatter(without_cache=(plain, moons), with_cache=(sample(denoiser, x, moons, schedule), moons))

# %% [markdown]
# ## A method of your own
#
# A caching method, as far as the engine is concerned, is a function that returns a `Schedule`. Here is an idea to
# try: whole steps compute, but not evenly spread. Add up how far features move from step to step
# and compute whenever another equal share of the whole way has been covered.


# %%
def equal_drift(denoiser, x, cond, computed):
    """Compute `computed` whole steps, between which features move equally far."""
    moved, previous = torch.zeros(denoiser.steps, len(denoiser.sites)), {}

    def watch(k):
        def gate(site, compute):
            fresh = compute()
            if k > 0:
                size = fresh.abs().sum(1)
                moved[k, site] = ((fresh - previous[site]).abs().sum(1) / size).mean()
            previous[site] = fresh
            return fresh

        return gate

    for _ in denoise(denoiser, x, cond, watch):
        pass
    way = moved.mean(1).cumsum(0) / moved.mean(1).sum() * computed
    share = way.clamp_max(computed - 1e-6).floor()  # 0 … computed − 1
    starts = torch.tensor([True, *(share[1:] > share[:-1]).tolist()])  # (T,)
    compute = starts[:, None].expand(-1, len(denoiser.sites))
    about = {**denoiser.about, "provenance": {"method": "equal drift"}}
    return Schedule(compute, sites=tuple(denoiser.sites), **about)


# to measure on, others than those we judge by
few, few_moons = denoiser.draw(64, torch.Generator().manual_seed(1))
print(equal_drift(denoiser, few, few_moons, 10))

# %% [markdown]
# ## The bench
#
# Each method at several speeds, judged on the same 1000 noises: the mean squared distance to the point that the same
# noise becomes without a cache. A table is only as good as the best that another method does *at its speed*, so one
# number each would say nothing. A table is on the *Pareto front* if no other is both faster and better; it runs along
# the lower right of the plot. **Which methods are on it?**


# %%
def judge(tables):
    """Return (speedup, error) of each table."""
    drawn = [sample(denoiser, x, moons, table) for table in tables]
    errors = [float((points - plain).square().mean()) for points in drawn]
    return [(table.speedup(cost), error) for table, error in zip(tables, errors, strict=True)]


def train_to(speedup, **how):
    """Train for a speedup; unless budget=0, a search then flips single entries of the table."""
    settings = {"iterations": 570, "batch_size": 32, "lr": 0.2, "proxy": None, "progress": False}
    return train_sdt(denoiser, target_speedup=speedup, **how, **settings).schedule()


speeds = (1.2, 1.5, 2.0)
bench = {
    "SDT": judge([train_to(s, budget=0) for s in speeds]),
    "SDT, refined": judge([train_to(s) for s in speeds]),
    "SDT, refined, forecasts": judge([train_to(s, order=1) for s in speeds]),
    "every n-th step": judge([baselines.every(denoiser, speedup=s) for s in speeds]),
    "dynamic programming": judge(
        [baselines.dynamic_programming(denoiser, few, few_moons, speedup=s) for s in speeds]
    ),
    "equal drift (ours)": judge([equal_drift(denoiser, few, few_moons, n) for n in (17, 13, 10)]),
}
plots.tradeoff(bench, ylabel="mean squared distance")

# %%
for name, tables in {**bench, "the table above": judge([schedule])}.items():
    row = "  ".join(f"{speedup:.2f}x {error:.1e}" for speedup, error in sorted(tables))
    print(f"{name:23}", row)

# %% [markdown]
# Up to 2× only refined tables are on the front. At each speed the error of the better one is below a fifth of the
# best other method's. Which of the two is better depends on the speed: with forecasts a skipped branch does not repeat
# its last output but continues it by one difference (`harmonica/forecast.py`). Here that has the lower error at 1.2×, and
# also at 1.7×, where plain reuse stops at 1.5×; at 2× it has the higher one. The search does not find the best table, only one that no tried change made better.
#
# SDT alone is about as good as dynamic programming. It judges a step by that step's output, and never sees what
# computing now saves later. The search sees that, because it judges whole walks. It may also give each branch a rhythm
# of its own, which whole steps cannot. Equal drift is never on the front. The lines need not rise: every n-th step is
# worse at 1.5× than at 2.2×, because there it skips a step that matters. This is one seed and one small model: it shows
# a direction, not a figure.
#
# `benchmarks/quality.py` does this for the bundled models with two more measures, the distance to the reference and the
# Fréchet distance, and these rank the methods differently (see `docs/results.md`). Tutorial 7 explains the
# reference. Whatever you find, say at which speed, on which noises, and against which methods.
#
# ## Exercises
#
# 1. Break the denoiser: let `predict` call the first branch twice. What does `check_denoiser` say?
# 2. A method that is not in `baselines`: reuse in reverse, that is, take the schedule that SDT has learned and turn
#    it upside down in time (keeping row 0). Where does it stand on the bench? What does that tell?
# 3. How good would chance be, at the speed of the learned table?

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** That the site is asked twice. It would have one feature for two different outputs.
#
# ```python
# class Twice(MoonsDenoiser):
#     def predict(self, x, k, cond):
#         self.model.branches[0](torch.zeros(len(x), 64))
#         return super().predict(x, k, cond)
#
#
# try:
#     check_denoiser(Twice(model, 20))
# except AssertionError as error:
#     print(error)
# ```
#
# ```text
# a site is asked twice in a call of the model: [0, 0, 1, 2, 3, 4, 5]
# ```
#
# **2.** Both have the same speed and CUR. Upside down, the error is about fifty times that of the learned table (first
# line), and larger than chance gives (exercise 3). *When* to reuse matters more than how much.
#
# ```python
# upside_down = Schedule(torch.cat([schedule.compute[:1], schedule.compute[1:].flip(0)]))
# for speedup, error in judge([schedule, upside_down]):
#     print(f"{speedup:.2f}x {error:.1e}")
# ```
#
# ```text
# 1.69x 8.4e-04
# 1.69x 4.6e-02
# ```
#
# **3.** Shuffle its decisions; row 0 stays. The median of five such tables has seven times the error of the learned
# one. A bench without this line flatters every method.
#
# ```python
# first, rest = schedule.compute[:1], schedule.compute[1:]
# orders = [torch.randperm(rest.numel(), generator=torch.Generator().manual_seed(i)) for i in range(5)]
# shuffled = [Schedule(torch.cat([first, rest.flatten()[order].view_as(rest)])) for order in orders]
# print(f"{torch.tensor([error for _, error in judge(shuffled)]).median():.1e}")
# ```
#
# ```text
# 6.2e-03
# ```
#
# </details>
