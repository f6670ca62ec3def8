# %% [markdown]
# # 5. Real pipelines
#
# After this tutorial you can
#
# - find what can be cached in a diffusers pipeline;
# - run a stock pipeline under a schedule: your own, or one from somebody else's file;
# - train a schedule on the very walk that a pipeline runs;
# - do the same on several GPUs.
#
# It runs as it stands, without any download: on diffusers' own `DiTPipeline` class around the digits model that comes
# with this library. **To run it on DiT-XL/2**, set `WEIGHTS = "facebook/DiT-XL-2-256"` in the next cell. That needs a
# GPU, and the cell that trains then takes hours.

# %%
# %matplotlib inline
WEIGHTS = None

import json
import tempfile
from pathlib import Path

import torch

from harmonica import Schedule, macs, train_sdt
from harmonica.evaluation import pictures as plots
from harmonica.evaluation.distances import image_mse
from harmonica.models import digits, load
from harmonica.models.pipelines import cached, disable_cache, enable_cache, from_pipeline, summary
from harmonica.models.sites import sites
from harmonica.search import baselines

torch.set_num_threads(1)
if WEIGHTS is None:
    pipe = digits.pipeline(load("tiny"))
    steps, guidance, classes = 10, 1.5, list(range(10))
    training = {
        "iterations": 180,
        "batch_size": 16,
        "beta": 1e-4,
        "lr": 0.2,
        "proxy": None,
    }  # no proxy: λ = 1
    REFINE = 9000
else:
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    steps, guidance, classes = 20, 4.0, [207, 360, 387, 974, 88, 979, 417, 279, 388, 33]
    training = {}  # the authors' settings are the defaults
    REFINE = None  # the default: about half of what training costs
print(type(pipe).__name__, "=", type(pipe.transformer).__name__, "+", type(pipe.scheduler).__name__)

# %% [markdown]
# ## A stock pipeline
#
# It knows nothing of this library. **What does it draw by itself?**


# %%
def draw(**options):
    """Return the pipeline's images, (B, C, H, W) in [−1, 1], always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": generator,
        **options,
    }
    images = pipe(classes, output_type="np", **options).images  # (B, H, W, C) in [0, 1]
    return torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1


stock = draw()
plots.sheet(stock, title="the stock pipeline")

# %% [markdown]
# ## What can be cached in it?
#
# `sites` finds attentions and feed-forwards by the names of modules. It knows the transformers of diffusers; of the
# 75 that are denoisers, all are exact under its rule (`benchmarks/results/zoo.json`).

# %%
found = sites(pipe.transformer)
print(found)

# %% [markdown]
# ## The first promise: everything computes
#
# `cached(pipe, schedule)` puts a schedule in force for as long as the `with` is open. A schedule that computes
# everything gives the stock images bit for bit, and afterwards the pipeline is what it was.

# %%
everything = Schedule(torch.ones(steps, len(found), dtype=torch.bool), sites=tuple(found))
with cached(pipe, everything):
    same = draw()
print(
    "the same images:",
    torch.equal(same, stock),
    "- and after the with:",
    torch.equal(draw(), stock),
)

# %% [markdown]
# ## Somebody else's table
#
# Tables for the same idea exist elsewhere. SmoothCache writes JSON with a column for each kind of site, here "attn"
# and "mlp", where 1 computes. Learning-to-Cache and the authors of the paper write `.pt` files, which `Schedule.load`
# reads as well, without executing anything in them. **What does such a table look like, once it is loaded?**

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "table.json"
    alternating = [int(k % 2 == 0) for k in range(steps)]
    file.write_text(
        json.dumps({"attn": alternating, "mlp": [int(k % 3 == 0) for k in range(steps)]})
    )
    foreign = Schedule.load(file)
print(foreign)

# %% [markdown]
# It has two columns, the model has many sites, named otherwise. `cached` understands kinds and the names that DiT's
# lineages use. **What does it do to the images?**

# %%
with cached(pipe, foreign) as session:
    images = draw()
print(session)
plots.comparison(stock, images, labels=classes, title="somebody else's table")

# %% [markdown]
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
# ## Train on this pipeline's own walk
#
# A table is best trained on the walk that it will be used on, which for a pipeline is its own scheduler and guidance.
# `from_pipeline` makes a denoiser of it, with the same images bit for bit, and `train_sdt` takes any denoiser. With
# `WEIGHTS = None` this takes seconds: 180 updates at a high learning rate. The authors' settings, which are the
# defaults, are 20 000 updates at a batch of 32; give a `checkpoint=` then, and `resume=True` after an interruption.
#
# **What has it learned to reuse?**

# %%
denoiser = from_pipeline(pipe, steps=steps, guidance=guidance)
router = train_sdt(denoiser, **training, progress=False)
schedule = router.schedule(tau=0.1)
plots.router_heatmap(schedule, title=f"{schedule.speedup(macs(denoiser)):.2f}x in theory")

# %% [markdown]
# **Can you see it in the images?**

# %%
with cached(pipe, schedule) as session:
    images = draw()
print(session)
plots.comparison(stock, images, labels=classes, title="the trained table")

# %% [markdown]
# ## Ask for a speed
#
# β, the price of computing, decides how fast the table gets, and nobody can tell in advance which β gives which speed.
# So ask for the speed: `target_speedup` steers β during training, lands the table on the target, and then refines it
# on whole walks, exchanging steps and turning over entries while the image gets better. `refine` is how many predictions
# that may cost. **How do the tables compare with each other, and with computing every n-th step?** Whole steps are
# coarse: the nearest such table beyond 1.25× is faster than ours.

# %%
asked = {name: value for name, value in training.items() if name != "beta"} | {
    "target_speedup": 1.25
}
landed = train_sdt(denoiser, **asked, refine=0, progress=False).schedule(tau=0.1)
refined = train_sdt(denoiser, **asked, refine=REFINE, progress=False).schedule(tau=0.1)
tables = {"trained": schedule, "target": landed, "target, refined": refined}
tables["every n-th"] = baselines.every(denoiser, speedup=1.25)
for name, table in tables.items():
    with cached(pipe, table):
        error = image_mse(draw(), stock)
    print(
        f"{name:15} {table.speedup(macs(denoiser)):.2f}x in theory, CUR {table.cur:.1%}, image error {error:.1e}"
    )

# %% [markdown]
# ## Without a `with`
#
# In a service, a pipeline stays cached until told otherwise.

# %%
enable_cache(pipe, schedule)
draw(), draw()
print(summary(pipe))
disable_cache(pipe)

# %% [markdown]
# ## PixArt
#
# PixArt's blocks have a third site, the cross-attention to the prompt. Below is its real class with two blocks and
# random weights. With the real ones the lines are
#
# ```text
# pipe = PixArtAlphaPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-512x512", torch_dtype=torch.float16).to("cuda")
# denoiser = from_pipeline(pipe, steps=20, guidance=4.5, prompts="prompts.txt")
# ```
#
# and all else is as above: `train_sdt(denoiser)`, `cached(pipe, schedule)`. The prompts that it trains on are one a
# line in your file; a list of some comes with the library.

# %%
from diffusers import PixArtTransformer2DModel

pixart = PixArtTransformer2DModel(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, caption_channels=12,
    sample_size=8, patch_size=2, use_additional_conditions=False,
)  # fmt: skip
print(sites(pixart))

# %% [markdown]
# ## Several GPUs
#
# Training shares the batch among processes and averages the router's gradient, the loss and λ; the router that comes
# out is that of one process with the whole batch, to rounding (`benchmarks/results/two_processes.json`). With the
# command line it is a matter of how it is started:
#
# ```text
# torchrun --nproc-per-node 4 -m harmonica.train --model dit-xl --device cuda --dtype bfloat16 --out out/dit-xl
# ```
#
# It writes `out/dit-xl/schedule.json`; the same command with `--resume` continues. For a model that is not among the
# library's names, call `train_sdt` in a script of your own that torchrun starts.
#
# ## Exercises
#
# 1. The pipeline shall run twice as many steps. `schedule.resample` stretches the table. Is it still good? Compare
#    with the stock images of that many steps.
# 2. What is lost when a schedule is written as SmoothCache's JSON and read back?
# 3. What are the sites of a model that this tutorial has not mentioned? Take Flux, with random weights, one
#    dual-stream and two single-stream blocks. (Its class is `FluxTransformer2DModel`.)

# %% [markdown]
# <details><summary>Answers</summary>
#
# **1.** It warns, since the table was not trained there, and runs. Judge by the number.
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
# 1.7e-04
# ```
#
# **2.** The table survives; the model, the sampler and the timesteps it was made for do not, so nothing can be
# checked any more.
#
# ```python
# with tempfile.TemporaryDirectory() as folder:
#     schedule.export_smoothcache(Path(folder) / "table.json")
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
# **3.** The dual-stream block has two feed-forwards, one for the text, one for the image. The single-stream blocks
# have no feed-forward of their own; there the three linear parts are sites.
#
# ```python
# from diffusers import FluxTransformer2DModel
#
# flux = FluxTransformer2DModel(
#     patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
#     joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
# )
# print("\n".join(sites(flux)))
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
