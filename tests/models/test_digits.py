"""The pipeline that draws digits is the bundled model in diffusers' classes."""

import torch
from conftest import seeded, start

from harmonica.models import digits, load
from harmonica.models.pipelines import from_pipeline
from harmonica.models.sites import sites
from harmonica.models.weights import dit_from_diffusers, dit_to_diffusers


def test_renaming_to_diffusers_keeps_the_parameters_and_the_predictions():
    state = load("tiny").model.state_dict()
    back = dit_from_diffusers(dit_to_diffusers(state), state["pos_embed"])
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    ours = load("tiny", steps=5, sampler="dpm-solver++", guidance=1.5)
    theirs = from_pipeline(digits.pipeline(load("tiny")), steps=5, guidance=1.5)
    x, labels = start(ours, 4, 0)
    cond = torch.stack([labels, torch.arange(4)], 1)
    for k in range(5):
        found, expected = theirs.predict(x, k, cond), ours.predict(x, k, labels)[: len(x)]
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_all_classes_of_the_pipeline_are_digits():
    pipe = digits.pipeline(load("tiny"))
    options = {"num_inference_steps": 4, "output_type": "pt"}
    one, other = (pipe([label], generator=seeded(1), **options).images for label in (3, 993))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert len(sites(pipe.transformer)) == 16
