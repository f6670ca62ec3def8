# %% [markdown]
# # 5. Any pipeline
#
# After this tutorial you can
#
# - find what can be cached in a diffusers pipeline;
# - make a table for a pipeline that this library has never seen, and run the pipeline under it;
# - use a table from another project, and recognise when a table does not fit;
# - train a table on the very walk that a pipeline runs, on one GPU or several.
#
# Nothing is downloaded. We use two small pipelines: diffusers' own `DiTPipeline` around the digits model of this library,
# which draws real images, and a tiny Flux with random weights, which shows that the model inside does not matter.

# %%
# %matplotlib inline
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from harmonica import Schedule, image_error, macs, sample, train_sdt
from harmonica.evaluation import pictures as plots
from harmonica.evaluation.distances import image_mse
from harmonica.models import digits, load
from harmonica.models.pipelines import cached, disable_cache, enable_cache, from_pipeline, summary
from harmonica.models.sites import sites
from harmonica.search import baselines

torch.set_num_threads(1)
pipe = digits.pipeline(load("tiny"))
steps, guidance = 10, 1.5
print(type(pipe).__name__, "=", type(pipe.transformer).__name__, "+", type(pipe.scheduler).__name__)

# %% [markdown]
# ## A stock pipeline
#
# The pipeline knows nothing of this library. **What does it draw by itself?**


# %%
def draw(**options):
    """Return the pipeline's images, (B, C, H, W) in [−1, 1], always from the same noise."""
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    images = pipe(list(range(10)), generator=generator, **{**settings, **options}).images
    return torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1  # from (B, H, W, C) in [0, 1]


stock = draw()
plots.sheet(stock, title="the stock pipeline")

# %% [markdown]
# ## What can be cached in it?
#
# `sites` finds attentions and feed-forwards by the names of the modules. It is exact for all 75 denoisers among the
# transformer classes of diffusers (`benchmarks/results/zoo.json`).

# %%
all_sites = sites(pipe.transformer)
print(all_sites)

# %% [markdown]
# ## Everything computes
#
# `cached(pipe, schedule)` puts a schedule in force as long as the `with` is open. A schedule that computes everything gives
# the stock images, bit for bit. After the `with` the pipeline is what it was.

# %%
everything = Schedule(torch.ones(steps, len(all_sites), dtype=torch.bool), sites=tuple(all_sites))
with cached(pipe, everything):
    same = draw()
print("inside the with:", torch.equal(same, stock), " after it:", torch.equal(draw(), stock))

# %% [markdown]
# ## A table for this pipeline
#
# A table should be made on the walk that it will be used on: the pipeline's own scheduler, guidance and number of steps.
# `from_pipeline` turns the pipeline into a denoiser that takes this very walk. With a denoiser, everything of the
# tutorials before works: λ, training, and the search. Dynamic programming chooses whole steps in seconds. With `order=1` a
# skipped site continues its last output instead of repeating it.
#
# **Can you see the difference?** The third row shows it, enlarged by the factor at its left.

# %%
denoiser = from_pipeline(pipe, steps=steps, guidance=guidance)
noise, cond = denoiser.draw(16, torch.Generator().manual_seed(1))
schedule = replace(baselines.dynamic_programming(denoiser, noise, cond, speedup=1.5), order=1)
with cached(pipe, schedule) as session:
    images = draw()
print(session)
plots.comparison(stock, images, labels=range(10), title="the table of dynamic programming")

# %% [markdown]
# ## A table from another project
#
# Other projects have tables for the same idea. SmoothCache writes JSON with one column for each kind of site, here "attn"
# and "mlp", where 1 computes. Learning-to-Cache and the authors of the paper write `.pt` files. `Schedule.load` reads all of
# them, and executes nothing that is in them. **What does such a table look like, and what does it do to the images?**

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "table.json"
    columns = {"attn": [int(k % 2 == 0) for k in range(steps)]}
    columns["mlp"] = [int(k % 3 == 0) for k in range(steps)]
    file.write_text(json.dumps(columns))
    foreign = Schedule.load(file)
print(foreign)
with cached(pipe, foreign):
    images = draw()
plots.comparison(stock, images, labels=range(10), title="another project's table")

# %% [markdown]
# The enlargement is smaller now: these differences are about ten times as large as those above. The table has two columns, and
# the model has 16 sites with other names. `cached` knows the kinds of sites, and the names that other code uses for them.
#
# ## What does not fit is refused
#
# A schedule is for one number of steps and one list of timesteps. The commonest mistake is to run another number.

# %%
try:
    with cached(pipe, foreign):
        draw(num_inference_steps=2 * steps)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Train on the pipeline's walk
#
# `train_sdt` takes any denoiser, so also this one. With `target_speedup` it adjusts β until the table has that speed, and a
# search improves the table afterwards (`docs/targets.md`). The settings below take seconds; the defaults are the authors':
# 20 000 updates at a batch of 32. **Which table is closest to the stock images at about the same speed?**

# %%
settings = {"iterations": 90, "batch_size": 8, "lr": 0.2, "proxy": None, "progress": False}
tables = {
    "trained": train_sdt(denoiser, target_speedup=1.5, refine=0, **settings).schedule(),
    "trained, refined": train_sdt(denoiser, target_speedup=1.5, refine=3000, **settings).schedule(),
    "every n-th step": baselines.every(denoiser, speedup=1.5),
    "dynamic programming": schedule,
}
for name, table in tables.items():
    with cached(pipe, table):
        error = image_mse(draw(), stock)
    print(f"{name:20} {table.speedup(macs(denoiser)):.2f}x in theory  image error {error:.1e}")

# %% [markdown]
# Dynamic programming (with forecasts) and the refined table are about equal, and every n-th step has eight times their error.
# The table that was only trained is far behind: 90 updates are not enough, and training cannot see what computing a site
# does for later steps (tutorial 3).
#
# ## A pipeline that nobody has written an adapter for
#
# `from_pipeline` never looks at the model. It lets the pipeline's own `__call__` run, and takes the walk from what the
# pipeline does with its transformer and its scheduler. Here is a tiny Flux: one dual-stream block, two single-stream blocks,
# random weights, no text encoder. What differs from sample to sample is given in `each`, here the embeddings of 4
# prompts. Everything else is passed on to the pipeline.

# %%
with torch.random.fork_rng():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
flux = FluxPipeline(scheduler, None, None, None, None, None, transformer.eval())
flux.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
prompts = {
    "prompt_embeds": torch.randn(4, 6, 12, generator=generator),
    "pooled_prompt_embeds": torch.randn(4, 8, generator=generator),
}
call = {"guidance_scale": 3.5, "height": 128, "width": 128}
flux_denoiser = from_pipeline(flux, steps=8, each=prompts, **call)
print(
    flux_denoiser.about["model"], flux_denoiser.steps, "steps,", len(flux_denoiser.sites), "sites"
)

# %% [markdown]
# Is the denoiser's walk really the pipeline's? A condition is a pair of numbers: the row of the prompt, and the seed of the
# sample's generator. So the pipeline can be called for the same sample.

# %%
noise, cond = flux_denoiser.draw(1, generator)
walked = sample(flux_denoiser, noise, cond)
row, seed = cond[0].tolist()
own = {name: values[row : row + 1] for name, values in prompts.items()}
latent = flux(
    **own, **call, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(seed),
).images  # fmt: skip
print("the same latent:", torch.equal(walked, latent))

# %% [markdown]
# **Which steps of this walk are sensitive?** λ answers (tutorial 4), here for a table with random scores.

# %%
scores = torch.rand(flux_denoiser.steps, len(flux_denoiser.sites), generator=generator)
scores[0] = 1.0
lam = image_error(flux_denoiser, scores, noise, cond)
plots.per_step({"λ": lam.tolist()}, ylabel="mean squared change of the latent")

# %% [markdown]
# ## Without a `with`
#
# A service keeps a pipeline cached until it is told otherwise. (`examples/server.py` is a small server.)

# %%
enable_cache(pipe, schedule)
draw(), draw()
print(summary(pipe))
disable_cache(pipe)

# %% [markdown]
# ## Several GPUs
#
# Training shares the batch among the processes, and averages the gradient of the router, the loss and λ. The router is that
# of one process with the whole batch, to rounding (`benchmarks/results/two_processes.json`). For a model that the library
# knows by name, only the start of the command differs:
#
# ```text
# torchrun --nproc-per-node 4 -m harmonica.train --model dit-xl --device cuda --dtype bfloat16 --out out/dit-xl
# ```
#
# It writes `out/dit-xl/schedule.json`. If it is interrupted, the same command with `--resume` continues. For other models,
# call `train_sdt` in a script of your own, and start the script with torchrun.
#
# ## Exercises
#
# 1. Let the pipeline run twice as many steps. `schedule.resample` stretches the table. How large is the error, compared with
#    the stock images of that many steps?
# 2. What is lost when a schedule is written as SmoothCache's JSON and read back?
# 3. Which sites does the tiny Flux have?

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** It warns, because the table was not made for this number of steps, and then runs. The number tells whether the result is
# good enough.
#
# ```python
# import warnings
#
# with warnings.catch_warnings():
#     warnings.simplefilter("ignore")
#     longer = schedule.resample(2 * steps)
# plain = draw(num_inference_steps=2 * steps)
# with cached(pipe, longer):
#     print(f"{image_mse(draw(num_inference_steps=2 * steps), plain):.1e}")
# ```
#
# ```text
# 1.2e-04
# ```
#
# **2.** The table survives. The model, the sampler and the timesteps are lost, so nothing can be checked any more. (The format
# has no place for forecasts either, so we take a table that reuses.)
#
# ```python
# reusing = replace(schedule, order=0)
# with tempfile.TemporaryDirectory() as folder:
#     reusing.export_smoothcache(Path(folder) / "table.json")
#     back = Schedule.load(Path(folder) / "table.json")
# print(torch.equal(back.compute, reusing.compute))
# print(reusing.sampler, len(reusing.timesteps), "and", repr(back.sampler), len(back.timesteps))
# ```
#
# ```text
# True
# DPMSolverMultistepScheduler 10 and '' 0
# ```
#
# **3.** The dual-stream block has two feed-forwards, one for the text and one for the image. A single-stream block has no
# feed-forward of its own; its linear layers are sites.
#
# ```python
# print("\n".join(sites(flux.transformer)))
# ```
#
# ```text
# transformer_blocks.0.attn
# transformer_blocks.0.ff
# transformer_blocks.0.ff_context
# single_transformer_blocks.0.proj_mlp
# single_transformer_blocks.0.proj_out
# single_transformer_blocks.0.attn
# single_transformer_blocks.1.proj_mlp
# single_transformer_blocks.1.proj_out
# single_transformer_blocks.1.attn
# ```
#
# </details>
