"""The embedded base listens to its prompt, and an adapter teaches it what it never saw."""

import numpy as np
import pytest
import torch
from PIL import Image

import lora
import phantoms
import sample
import train
from metrics import texture

CPU = torch.device("cpu")
KINDS = list(phantoms.BASE_KINDS)
UNSEEN = 600_000  # seeds that neither the base's training nor the quick start used


@pytest.fixture(scope="module")
def tiny():
    return sample.load_base("tiny", CPU)


def features(images, size=128):
    """Texture features (N, 368) of PIL images at `size` pixels."""
    resized = [image.convert("RGB").resize((size, size), Image.BOX) for image in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    return torch.cat([texture(part) for part in pixels.split(32)]).double().numpy()


def generated(base, jobs, **settings):
    """Features at 64 px, where the VAE's blur says little, of pictures drawn in few steps."""
    settings = sample.Settings(steps=6, scheduler="dpm", **settings)
    return features(sample.generate(base, jobs, settings), 64)


def drawn(kinds, seed, size=64):
    arrays = [phantoms.draw(kind, seed + i, size)[0] for i, kind in enumerate(kinds)]
    return [Image.fromarray(array) for array in arrays]


def a_judge():
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))


def test_the_base_draws_the_kind_it_is_asked_for_and_not_with_the_empty_prompt(tiny):
    kinds = KINDS * 20
    judge = a_judge().fit(features(drawn(kinds, UNSEEN), 64), kinds)
    asked = KINDS * 2
    prompts = [phantoms.draw(kind, UNSEEN + 5000 + i, 16)[1] for i, kind in enumerate(asked)]
    jobs = [(prompt, i) for i, prompt in enumerate(prompts)]
    empty = [("", i) for i in range(14)]
    prompted = generated(tiny, jobs, guidance_scale=4)
    unprompted = generated(tiny, empty, guidance_scale=1)
    assert np.mean(judge.predict(prompted) == asked) >= 0.75  # measured: 0.86
    assert np.mean(judge.predict(unprompted) == asked) <= 0.45  # 0.21; chance: 1 in 7


def test_an_adapter_teaches_a_kind_that_the_base_never_saw(tiny, tmp_path, run):
    kinds = list(phantoms.KINDS) * 12
    judge = a_judge().fit(features(drawn(kinds, UNSEEN, 128), 64), kinds)
    data = tmp_path / "mpox"
    phantoms.write(data, 64, seed=UNSEEN + 20_000, kinds=["mpox lesion"])
    flags = ["--base", "tiny", "--data", data, "--steps", 60, "--lr", 5e-3, "--ema", 0.9]
    flags += ["--targets", "all", "--resolution", 64, "--val-split", 0, "--val-samples", 0]
    run(train, *flags, "--out", tmp_path / "run")
    jobs = [(phantoms.draw("mpox lesion", UNSEEN + 9000 + i, 16)[1], i) for i in range(12)]
    pairs, _, _ = lora.load(tmp_path / "run" / "lora.safetensors")
    shares = []
    for adapters in ([], [(pairs, 1.0)]):
        with lora.merged(tiny.parts(), adapters):
            pictures = generated(tiny, jobs, guidance_scale=2)
        shares.append(np.mean(judge.predict(pictures) == "mpox lesion"))
    assert shares[0] <= 0.3
    assert shares[1] >= 0.7  # measured: 0.25 and 0.92
