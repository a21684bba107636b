"""What tests share: tiny random bases and images, and a way to run a script in this process."""

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core a worker
os.environ["MEDLORA_CACHE"] = tempfile.mkdtemp(prefix="medlora-tests-")  # metrics reads it once
os.environ["TORCH_HOME"] = os.environ["MEDLORA_CACHE"]
atexit.register(shutil.rmtree, os.environ["MEDLORA_CACHE"], ignore_errors=True)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: bases of real size, gigabytes and minutes each; run by -m slow only"
    )
    config.option.markexpr = config.option.markexpr or "not slow"
    for text in ("__array__ implementation", "Detected pickle"):  # of other packages
        config.addinivalue_line("filterwarnings", f"ignore:{text}")


def tiny_parts(prediction_type="epsilon", **unet_flags):
    """VAE, text encoder, tokenizer, UNet, scheduler and text configuration of SD's shape.

    They have some thousand random weights, the same each time.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    letters = list(bytes_to_unicode().values())
    endings = [letter + "</w>" for letter in letters]
    words = [*letters, *endings, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    text_config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=24,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    unet = UNet2DConditionModel(**settings | unet_flags)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return vae, CLIPTextModel(text_config), tokenizer, unet, scheduler, text_config


def save_base(folder, *prediction_type, **unet_flags):
    """Save these parts as a Stable Diffusion pipeline; returns the folder's name."""
    from diffusers import StableDiffusionPipeline

    *parts, _ = tiny_parts(*prediction_type, **unet_flags)
    pipeline = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return str(folder)


def write_selector(path, **settings):
    """A selector for 64 px that likes bright pictures and knows no labels; returns its path."""
    import filter as filter_script

    count = sum(filter_script.BLOCKS)
    weights = np.zeros((count + 1, 1))
    weights[:16] = 3 / 16  # texture begins with the grey values of a 4 x 4 thumbnail
    selector = filter_script.Selector(size=64, good=3, classes=[], measured={}, weights=weights)
    for name, value in settings.items():
        setattr(selector, name, value)
    filter_script.save_selector(path, selector)
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a base of SD 1.5's kind with random weights: 64 px, 8 x 8 latents."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sd21(tmp_path_factory):
    """The same of SD 2.1-768's kind: v-prediction, linear projections, upcast attention."""
    return save_base(
        tmp_path_factory.mktemp("sd21"),
        "v_prediction",
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
    )


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """The same of SDXL's kind: two text encoders, pooled text and sizes as added embeddings."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    vae, text_encoder, tokenizer, unet, scheduler, config = tiny_parts(
        cross_attention_dim=64,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    folder = tmp_path_factory.mktemp("sdxl")
    StableDiffusionXLPipeline(
        vae,
        text_encoder,
        CLIPTextModelWithProjection(config),
        tokenizer,
        tokenizer,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 24 images in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.RandomState(0)
    for i in range(24):
        place = folder / ("calm", "sore")[i % 2]
        place.mkdir(exist_ok=True)
        pixels = draw.randint(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((70, 64)).save(place / f"{i}.png")
    return str(folder)


@pytest.fixture
def handlers():
    """Put the signal handlers back that run_script replaces."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def run(monkeypatch):
    """run(module, flag, flag, …): run the script of that module with these flags, here."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        return module.main(module.parse_args())

    return call


@pytest.fixture
def refused(run, capsys):
    """refused(module, flag, …): the one line with which the script refuses, with status 2."""

    def call(module, *flags):
        with pytest.raises(SystemExit) as stop:
            run(module, *flags)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert lines[-1].startswith("error: ")
        for line in lines[:-1]:
            assert "error: " not in line
            assert "Traceback" not in line
        return lines[-1]

    return call


@pytest.fixture
def make_run(tmp_path):
    """make_run(splits, flag=value, …): a folder as train.py leaves it; splits: name -> split."""

    def make(splits, **flags):
        from metrics import write_csv, write_file

        folder = tmp_path / "runs" / "dfu"
        usual = dict(data="real", crop="center", slices="middle", window=None, range=None)
        write_file(folder / "args.json", json.dumps({"args": usual | flags}))
        rows = [[name, "", split] for name, split in splits.items()]
        write_csv(folder / "split.csv", ["file_name", "group", "split"], rows)
        return str(folder)

    return make
