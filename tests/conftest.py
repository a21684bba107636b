"""What the tests share: a tiny random base, tiny random images, and a way to run a script in this process."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def feature_cache(tmp_path_factory):
    os.environ["MEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a Stable-Diffusion-shaped base with random weights: 64 px, 8 x 8 latents, a few thousand weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    torch.manual_seed(0)
    letters = list(bytes_to_unicode().values())
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1))
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4, sample_size=64)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                             set_alpha_to_one=False, steps_offset=1)
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, schedule, None, None,
                            requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 24 images in two class folders."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for i in range(24):
        place = folder / ("calm", "sore")[i % 2]
        place.mkdir(exist_ok=True)
        pixels = draw.randint(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((70, 64)).save(place / f"{i}.png")
    return str(folder)


@pytest.fixture
def run(monkeypatch):
    """run(module, flag, flag, …): what the script of that module does with these flags, in this process."""
    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        return module.main(module.parse_args())
    return call


@pytest.fixture
def refused(run, capsys):
    """refused(module, flag, …): the one line with which the script refuses, after checking that it is one, status 2."""
    def call(module, *flags):
        with pytest.raises(SystemExit) as stop:
            run(module, *flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and lines[-1].startswith("error: ") and not any("Traceback" in s for s in lines)
        return lines[-1]
    return call
