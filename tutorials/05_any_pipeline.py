# %% [markdown]
# # 5. Any pipeline
#
# After this tutorial you can
#
# - make a table for a diffusers pipeline with one call, and run the pipeline under it;
# - do so for a pipeline that this library has never seen;
# - use a table from another project, and recognise when a table does not fit;
# - turn a pipeline into a denoiser, so that everything of the tutorials before works on it.
#
# Nothing is downloaded. We use two small pipelines: diffusers' own `DiTPipeline` around the digits model of this library,
# which draws real images, and a tiny Flux with random weights, which shows that the model inside does not matter.

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import harmonica
from harmonica import Schedule, image_error, sample
from harmonica import pictures as plots
from harmonica.models import digits, load
from harmonica.models.pipelines import disable_cache, enable_cache, from_pipeline
from harmonica.models.sites import sites
from harmonica.search.references import image_mse

torch.set_num_threads(1)
pipe = digits.pipeline(load("tiny"))
print(type(pipe).__name__, "=", type(pipe.transformer).__name__, "+", type(pipe.scheduler).__name__)

# %% [markdown]
# ## A stock pipeline
#
# The pipeline knows nothing of this library. **What does it draw by itself?**

# %%
call = {"num_inference_steps": 10, "guidance_scale": 1.5}


def draw(**options):
    """Return the pipeline's images, (B, C, H, W) in [−1, 1], always from the same noise."""
    settings = {**call, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    images = pipe(list(range(10)), **settings | options).images
    return torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1  # from (B, H, W, C) in [0, 1]


stock = draw()
plots.sheet(stock, title="the stock pipeline")

# %% [markdown]
# ## A table for it
#
# `tune` makes a table for a pipeline, at the number of steps and the guidance that the pipeline will run with. It lets the
# pipeline run itself, so it needs to know nothing about the model. First dynamic programming chooses whole steps. Then a
# search flips single entries while the error falls, and last it learns weights for the gates (`docs/targets.md`). `budget` is the
# number of predictions that it may spend. Here it is enough for the first stage, and takes seconds.
#
# `cached` puts the table in force as long as the `with` is open. **Can you see the difference?** The third row shows it,
# enlarged by the factor at its left.

# %%
schedule = harmonica.tune(pipe, speedup=1.5, budget=1500, progress=False, **call)
with harmonica.cached(pipe, schedule) as session:
    images = draw()
print(schedule)
print(session)
print(f"image error {image_mse(images, stock):.1e}")
plots.comparison(stock, images, labels=range(10), title="a tuned table")

# %% [markdown]
# The same on the command line, for a pipeline that lies in a folder or on the Hugging Face Hub. Prompts are read from a file,
# and `--call` takes all other arguments of the pipeline:
#
# ```text
# python -m harmonica.tune --pipeline FOLDER --speedup 1.5 --steps 28 --prompts prompts.txt --call height=1024 width=1024
# ```
#
# It writes `schedule.json`, which `Schedule.load` reads, and one image without and with the table.
#
# ## What is exact
#
# A schedule that computes everything gives the stock images, bit for bit. After the `with` the pipeline is what it was.

# %%
names = tuple(sites(pipe.transformer))
everything = Schedule(torch.ones(10, len(names), dtype=torch.bool), sites=names)
with harmonica.cached(pipe, everything):
    same = draw()
print("inside the with:", torch.equal(same, stock), " after it:", torch.equal(draw(), stock))

# %% [markdown]
# ## A table from another project
#
# Other projects have tables for the same idea. SmoothCache writes JSON with one column for each kind of site, here "attn"
# and "mlp", where 1 computes. Learning-to-Cache and the authors of the paper write `.pt` files. `Schedule.load` reads all of
# them, and executes nothing that is in them. **What does such a table do to the images?**

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "table.json"
    columns = {"attn": [int(k % 2 == 0) for k in range(10)]}
    columns["mlp"] = [int(k % 3 == 0) for k in range(10)]
    file.write_text(json.dumps(columns))
    foreign = Schedule.load(file)
with harmonica.cached(pipe, foreign) as session:
    images = draw()
print(session)
print(f"image error {image_mse(images, stock):.1e}")
plots.comparison(stock, images, labels=range(10), title="another project's table")

# %% [markdown]
# The table has two columns, and the model has 16 sites with other names. `cached` knows the kinds of sites, and the names that
# other code uses for them. It is faster than the tuned table, and its error is about eighty times as large.
#
# ## What does not fit is refused
#
# A schedule is for one number of steps and one list of timesteps. The commonest mistake is to run another number.

# %%
try:
    with harmonica.cached(pipe, schedule):
        draw(num_inference_steps=20)
except ValueError as error:
    print(error)

# %% [markdown]
# ## A pipeline that nobody has written an adapter for
#
# Here is a tiny Flux: one dual-stream block, two single-stream blocks, random weights, no text encoder. A pipeline that has one
# is given `prompts`. What else differs from sample to sample is given in `each`, here the embeddings of 4 prompts.

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
size = {"guidance_scale": 3.5, "height": 128, "width": 128}
table = harmonica.tune(
    flux, each=prompts, speedup=1.5, budget=300, progress=False, num_inference_steps=8, **size
)
print(table)

# %% [markdown]
# ## The pipeline as a denoiser
#
# `tune` stands on `from_pipeline`, which turns a pipeline into a denoiser. The pipeline's own `__call__` is its walk. A condition
# is a pair of numbers: the row of the prompt, and the seed of the sample's generator. So the pipeline can be called for the
# same sample, and gives the same latent.

# %%
denoiser = from_pipeline(flux, steps=8, each=prompts, **size)
noise, cond = denoiser.draw(1, generator)
walked = sample(denoiser, noise, cond, table)
row, seed = cond[0].tolist()
own = {name: values[row : row + 1] for name, values in prompts.items()}
with harmonica.cached(flux, table):
    latent = flux(
        **own, **size, num_inference_steps=8, output_type="latent", generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
print("the same latent, under the table:", torch.equal(walked, latent))

# %% [markdown]
# With a denoiser, everything of the tutorials before works: training (`train_sdt`), the search, and λ. **Which steps of this walk
# are sensitive?** λ answers (tutorial 4), here for a table with random scores.

# %%
scores = torch.rand(denoiser.steps, len(denoiser.sites), generator=generator)
scores[0] = 1.0
lam = image_error(denoiser, scores, noise, cond)
plots.per_step({"λ": lam.tolist()}, ylabel="mean squared change of the latent")

# %% [markdown]
# ## Without a `with`
#
# A service keeps a pipeline cached until it is told otherwise. (`examples/server.py` is a small server.)

# %%
session = enable_cache(pipe, schedule)
draw(), draw()
print(session)
disable_cache(pipe)

# %% [markdown]
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
#     longer = schedule.resample(20)
# plain = draw(num_inference_steps=20)
# with harmonica.cached(pipe, longer):
#     print(f"{image_mse(draw(num_inference_steps=20), plain):.1e}")
# ```
#
# ```text
# 2.8e-04
# ```
#
# **2.** The table survives. The model, the sampler and the timesteps are lost, so nothing can be checked any more. (The format
# has no place for forecasts and weights either, and a table that has them cannot be written.)
#
# ```python
# from harmonica.storage.foreign import write_smoothcache
#
# with tempfile.TemporaryDirectory() as folder:
#     write_smoothcache(Path(folder) / "table.json", schedule)
#     back = Schedule.load(Path(folder) / "table.json")
# print(torch.equal(back.compute, schedule.compute))
# print(schedule.sampler, len(schedule.timesteps), "and", repr(back.sampler), len(back.timesteps))
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
