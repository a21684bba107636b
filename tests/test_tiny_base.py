"""The embedded base is no stand-in: it listens to its prompt, and an adapter teaches it what it never saw."""
import numpy as np
import pytest
import torch
from PIL import Image

import lora
import phantoms
import sample
import train
from metrics import frechet_draws, joint_matrices, permutation_draws, texture

CPU = torch.device("cpu")
KINDS = list(phantoms.BASE_KINDS)
UNSEEN = 600_000   # seeds that neither the base's training nor tests/phantoms/ used


@pytest.fixture(scope="module")
def tiny():
    return sample.load_base("tiny", CPU)


def features(images, size=128):
    """Texture features (N, 368) of PIL images at `size` pixels."""
    pixels = torch.stack([torch.from_numpy(np.array(Image.fromarray(np.array(image)).resize((size, size), Image.BOX)))
                          for image in images]).permute(0, 3, 1, 2)
    return torch.cat([texture(part) for part in pixels.split(32)]).double().numpy()


def drawn(kinds, seed):
    return [phantoms.draw(kind, seed + i)[0] for i, kind in enumerate(kinds)]


def test_the_base_draws_the_kind_it_is_asked_for_and_not_with_the_empty_prompt(tiny):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    kinds = KINDS * 80   # at 64 px, where the VAE's blur says nothing
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(features(drawn(kinds, UNSEEN), 64), kinds)
    asked = KINDS * 5
    prompts = [phantoms.draw(kind, UNSEEN + 5000 + i, 16)[1] for i, kind in enumerate(asked)]
    told = judge.predict(features(sample.generate(tiny, list(zip(prompts, range(35))), steps=20, guidance_scale=4), 64))
    assert np.mean(told == asked) >= 0.9
    untold = judge.predict(features(sample.generate(tiny, [("", i) for i in range(35)], steps=20, guidance_scale=1), 64))
    assert np.mean(untold == asked) <= 0.45   # chance: 1 in 7


def excess(real, generated):
    """Fréchet distance in texture features, less what chance gives at these sizes."""
    n, m = len(real), len(generated)
    values = frechet_draws(joint_matrices(real, generated, True), permutation_draws(n, m, 30, 0))
    return values[0] - np.median(values[1:])


def test_an_adapter_learns_a_kind_that_the_base_never_saw(tiny, tmp_path, run):
    phantoms.write(tmp_path / "mpox", 48, seed=UNSEEN, kinds=["mpox lesion"])
    run(train, "--base", "tiny", "--data", tmp_path / "mpox", "--prompt", "mpox lesions on the skin", "--steps", 100,
        "--lr", 1e-3, "--val-split", 0, "--val-samples", 0, "--out", tmp_path / "run", "--ema", 0.98)
    jobs = [("mpox lesions on the skin", i) for i in range(32)]
    real = features(phantoms.draw("mpox lesion", UNSEEN + 9000 + i)[0] for i in range(96))
    before = features(sample.generate(tiny, jobs, steps=12, guidance_scale=2))
    pairs, _, _ = lora.load(tmp_path / "run" / "lora.safetensors")
    with lora.merged({"unet": tiny.unet}, [(pairs, 1.0)]):
        after = features(sample.generate(tiny, jobs, steps=12, guidance_scale=2))
    assert excess(real, after) <= 0.5 * excess(real, before)
