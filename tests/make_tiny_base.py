"""Build the embedded base tests/tiny-base from tests/phantoms.py. The recipe, on two cores:

    python tests/phantoms.py POOL --count 16000 --seed 2000000 --processes 2 --kinds "\
inflammatory ulcer,remodelling ulcer,normal chest,pleural effusion,lung nodule,normal fundus,\
retinal haemorrhages"
    python tests/make_tiny_base.py vae       --out TINY --data POOL --steps 2200 --bf16
    python tests/make_tiny_base.py decoder   --out TINY --data POOL --minutes 8
    python tests/make_tiny_base.py text      --out TINY --data POOL --steps 1550
    python tests/make_tiny_base.py init-unet --out TINY
    python train.py --base TINY --data POOL --out RUN --method full --snr-gamma 5 --ema 0.999 \
--prompt-dropout 0.1 --batch-size 32 --lr 6e-4 --warmup 200 --precision bf16 --steps 7000 \
--val-split 0.02
    python tests/make_tiny_base.py pack --trained RUN/model --out tests/tiny-base
    python tests/make_tiny_base.py check     --out tests/tiny-base

Once there is a base, its training goes on from it, on a new pool: `vae --start tests/tiny-base`,
then `decoder`; text encoder, tokenizer and UNet are copied from tests/tiny-base to TINY, and
train.py does the rest, with `--lr 5e-4`. The present base had 40,000 steps in all, the last 18,000
on its final autoencoder. tests/judge_tiny_base.py measures what came of it.

The pool leaves out mpox: an adapter must have something to learn. `vae` fits an autoencoder with
factor 8 and 4 latent channels; `text` fits a byte-level CLIP tokenizer and a small CLIP text
encoder, contrastively against the VAE's latents; `init-unet` writes a random UNet and the
scheduler, so that TINY is a whole Stable Diffusion pipeline whose UNet train.py can fit. `pack`
writes half-precision safetensors and refuses more than 16,000,000 bytes. `vae`, `decoder` and
`text` save a checkpoint in TINY-state and resume from it; --steps instead of --minutes makes a run
independent of the clock.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import re
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import phantoms

ROOT = pathlib.Path(__file__).resolve().parent.parent
LATENT_STD = 1 / 0.18215  # as in Stable Diffusion, so that a forgotten scaling factor shows
UNSEEN = {  # wordings that no caption uses, to see what the text encoder makes of a user's own
    "inflammatory ulcer": [
        "open inflamed ulcer on the heel",
        "red inflammatory wound",
        "inflammatory stage",
    ],
    "remodelling ulcer": [
        "remodelling stage of healing",
        "scar of a closed ulcer",
        "wound remodelling, pale scar",
    ],
    "normal chest": [
        "normal x-ray of the chest",
        "clear lungs",
        "chest x-ray of a healthy patient, no finding",
    ],
    "pleural effusion": [
        "x-ray: effusion on the left",
        "right effusion",
        "large fluid collection, pleural space",
    ],
    "lung nodule": [
        "x-ray: nodule on the left",
        "round nodule",
        "chest x-ray with a small nodule, upper zone",
    ],
    "normal fundus": [
        "healthy eye, fundus",
        "normal retina photograph",
        "fundus with a clear macula and normal disc",
    ],
    "retinal haemorrhages": [
        "fundus with haemorrhages",
        "many bleedings in the retina",
        "diabetic retinopathy",
    ],
}
WORDS = """
a an the of in on with and without no patient skin lesion disease normal abnormal acute chronic
image photo photograph photography x-ray radiograph ct mri ultrasound scan film chest lung heart
brain liver kidney bone foot leg arm hand face eye retina fundus macula disc vessel wound ulcer
diabetic inflammation inflammatory proliferation remodelling phase healing scar tissue red
yellow black white pink dark light brown pale small medium large left right upper lower middle
side zone effusion pneumonia fibrosis cardiomegaly nodule mass edema atelectasis consolidation
emphysema pneumothorax infiltration thickening hernia tumor tumour cancer melanoma nevus
monkeypox mpox rash vesicle pustule crust papule haemorrhage hemorrhage retinopathy glaucoma
drusen exudate microscopy histology clinical dermatology showing close-up view frontal lateral
portrait high quality severe mild moderate
""".split()


def save_safely(state, path):
    """Save atomically: a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def read_rows(folder):
    with open(pathlib.Path(folder) / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_pool(folder):
    """(uint8 images (N, 3, H, W), captions, labels) of a folder that phantoms.write made."""
    rows = read_rows(folder)
    images = []
    for row in rows:
        images.append(np.asarray(Image.open(pathlib.Path(folder) / row["file_name"])))
    captions = [row["text"] for row in rows]
    labels = [row["label"] for row in rows]
    return to_tensor(images), captions, labels


def to_tensor(images):
    """A list of arrays (H, W, 3) as one uint8 tensor (N, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def unseen(count):
    """Pictures outside every pool: (kinds * count, 3, 128, 128) in -1..1, `count` of each kind."""
    images = []
    for kind in phantoms.BASE_KINDS:
        for i in range(count):
            images.append(phantoms.draw(kind, 500_000 + i)[0])
    return to_tensor(images).float() / 127.5 - 1


def fit(args, name, modules, loss_of_batch, lr):
    """Fit `modules` (name -> Module) under `loss_of_batch(step)`.

    AdamW, cosine to zero over --minutes or --steps. An average of the weights (EMA 0.998) is put
    into the modules at the end. Resumes from its checkpoint.
    """
    torch.manual_seed(0)
    path = pathlib.Path(f"{args.out.rstrip('/')}-state") / f"{name}.pt"
    weights = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    averaged = [p.detach().clone() for p in weights]
    step = 0
    spent = 0.0
    began = time.time()
    if path.exists():
        state = torch.load(path, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        averaged = state["averaged"]
        step = state["step"]
        spent = state["spent"]
        print(f"{name}: resumed at step {step}")
    saved = time.time()
    spent_before = spent
    while True:
        spent = spent_before + time.time() - began
        progress = step / args.steps if args.steps else spent / 60 / args.minutes
        if progress >= 1 or time.time() - saved > 60:
            state = {key: module.state_dict() for key, module in modules.items()}
            state["averaged"] = averaged
            state["optimizer"] = optimizer.state_dict()
            state["step"] = step
            state["spent"] = spent
            save_safely(state, path)
            saved = time.time()
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        loss, words = loss_of_batch(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in weights], 1 - decay)
        step += 1
        if step % 50 == 0:
            print(f"{name} step {step} {spent:.0f} s loss {loss.item():.4f} {words()}", flush=True)
    with torch.no_grad():
        for p, mean in zip(weights, averaged, strict=True):
            p.copy_(mean)


# ---- the autoencoder


def make_vae(args):
    """Fit the autoencoder, give its latents zero mean and LATENT_STD a channel, and save it.

    With --start, from that base's autoencoder on, at a lower rate.
    """
    from diffusers import AutoencoderKL

    if args.start:
        vae = AutoencoderKL.from_pretrained(pathlib.Path(args.start) / "vae")
    else:
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=128,
            scaling_factor=1 / LATENT_STD,
        )
    images, _, _ = read_pool(args.data)
    test = unseen(4)

    def loss_of_batch(step):
        draw = torch.Generator().manual_seed(step)
        x = images[torch.randint(len(images), (8,), generator=draw)].float() / 127.5 - 1
        if step % 2:
            x = x.flip(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            # More noise than the posterior's: the decoder must bear what a denoiser leaves behind.
            shake = torch.sqrt(logvar.exp() + (0.05 * mean.detach().std()) ** 2)
            y = vae.decode(mean + shake * torch.randn(mean.shape, generator=draw)).sample
        error = y.float() - x
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes(error)
        loss = loss + 40 * tints(error) + 1e-5 * divergence

        def progress():
            squared = error.detach().square().mean()
            return f"mse {squared:.5f} std {mean.std():.2f} psnr {psnr(vae, test).mean():.2f}"

        return loss, progress

    fit(args, "vae", {"vae": vae}, loss_of_batch, 5e-4 if args.start else 2e-3)
    standardise(vae, images)
    vae.eval().save_pretrained(pathlib.Path(args.out) / "vae")
    check_vae(vae)


def slopes(error):
    """Mean absolute difference of neighbouring pixels of `error` (B, C, H, W), both ways."""
    across = error[..., 1:] - error[..., :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


def tints(error):
    """Mean square of the colour of `error` (B, 3, H, W) in patches of 4 x 4 pixels.

    Patches of another colour are what wounds are made of, and little of the whole error.
    """
    return F.avg_pool2d(error - error.mean(1, keepdim=True), 4).square().mean()


def make_decoder(args):
    """Sharpen the decoder alone, so that latents, and a UNet trained on them, stay what they are.

    Added to absolute error, slopes and tints are the distances in log energies of oriented textures
    (metrics.texture), what a blur loses first and squared error hardly sees, and in noise and the
    pattern of 8 x 8 cells (metrics.grey_grain).
    """
    sys.path.insert(0, str(ROOT))
    from diffusers import AutoencoderKL

    from metrics import grey_grain, texture, to_grey

    vae = AutoencoderKL.from_pretrained(pathlib.Path(args.out) / "vae").eval()
    vae.encoder.requires_grad_(False)
    images, _, _ = read_pool(args.data)
    latents = encode(vae, images)
    test = unseen(4)

    def loss_of_batch(step):
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(len(images), (8,), generator=draw)
        z = latents[rows] + 0.02 * LATENT_STD * torch.randn(8, *latents.shape[1:], generator=draw)
        x = images[rows].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            y = vae.decode(z).sample
        y = y.float() * 127.5 + 127.5
        error = (y - x) / 127.5
        top, left = torch.randint(65, (2,), generator=draw).tolist()
        crop = (..., slice(top, top + 64), slice(left, left + 64))
        distance = (texture(y[crop]) - texture(x[crop])).abs().mean()
        grain_error = grey_grain(255 * to_grey(y)) - grey_grain(255 * to_grey(x))
        loss = error.abs().mean() + 0.5 * slopes(error) + 40 * tints(error)
        loss = loss + 0.1 * distance + 0.05 * grain_error.abs().mean()

        def progress():
            return f"texture {distance.item():.3f} psnr {psnr(vae, test).mean():.2f}"

        return loss, progress

    fit(args, "decoder", {"decoder": vae.decoder}, loss_of_batch, 1e-3)
    vae.eval().save_pretrained(pathlib.Path(args.out) / "vae")
    check_vae(vae)


@torch.no_grad()
def encode(vae, images):
    """Posterior means (N, 4, H/8, W/8) of images in -1..1 or uint8."""
    means = []
    for batch in images.split(64):
        if batch.dtype == torch.uint8:
            batch = batch / 127.5 - 1
        means.append(vae.encode(batch).latent_dist.mean)
    return torch.cat(means)


@torch.no_grad()
def psnr(vae, images):
    """PSNR (N,) in dB of the decoded posterior mean; images (N, 3, H, W) in -1..1."""
    ratios = []
    for batch in images.split(32):
        decoded = vae.decode(encode(vae, batch)).sample.clamp(-1, 1)
        squared = (decoded - batch).square().mean((1, 2, 3))
        ratios.append(10 * torch.log10(4 / squared))
    return torch.cat(ratios)


@torch.no_grad()
def standardise(vae, images):
    """Make each latent channel mean 0 and LATENT_STD, by the 1x1 convolutions on both sides."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    latents = encode(vae, images[order[:2000]])
    mean = latents.mean((0, 2, 3))
    scale = LATENT_STD / latents.std((0, 2, 3))
    into = vae.quant_conv
    out = vae.post_quant_conv
    into.weight[:4] *= scale[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * scale
    into.bias[4:] += 2 * scale.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= scale[None, :, None, None]


def check_vae(vae, count=256):
    """Print PSNR by kind on `count` unseen phantoms each, and the scaled latents' moments."""
    images = unseen(count)
    ratios = psnr(vae, images)
    for kind, ratios_of_kind in zip(phantoms.BASE_KINDS, ratios.split(count), strict=True):
        print(f"psnr {kind}: {ratios_of_kind.mean():.2f} dB")
    print(f"psnr {ratios.mean():.2f} dB (lowest {ratios.min():.2f})")
    latents = encode(vae, images) * vae.config.scaling_factor
    mean = [round(value, 3) for value in latents.mean((0, 2, 3)).tolist()]
    std = [round(value, 3) for value in latents.std((0, 2, 3)).tolist()]
    print(f"scaled latents: mean {mean} std {std}")


# ---- words


def make_tokenizer(captions, folder):
    """Write a CLIPTokenizer of bytes, bytes that end a word, learned merges and two specials."""
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = CLIPTokenizer().backend_tokenizer
    learner.model = models.BPE(end_of_word_suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions + WORDS * 40, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # Both halves of a merge must exist; a half may be a byte that the learner never met as an end.
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(tokenizer, folder):
    """Write vocab.json and merges.txt, which transformers before 5 reads."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_encoder_of(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def thinned(caption, random):
    """The caption without some of its words, so that the encoder does not need whole sentences."""
    words = caption.split()
    kept = [word for word in words if random.random() > 0.2]
    return " ".join(kept) if len(kept) > 1 else caption


def make_text(args):
    """Fit the text encoder: a caption must find the latents of its picture among a batch of 128.

    Contrastive, as CLIP (Radford et al. 2021); equal captions count as one.
    """
    from diffusers import AutoencoderKL

    images, captions, labels = read_pool(args.data)
    out = pathlib.Path(args.out)
    tokenizer = make_tokenizer(captions, out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    latents = encode(vae, images) * vae.config.scaling_factor
    torch.manual_seed(0)
    encoder = text_encoder_of(tokenizer)
    image_head = torch.nn.Sequential(
        torch.nn.Conv2d(4, 64, 3, 2, 1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(64, 128, 3, 2, 1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(128, 128, 3, 2, 1),
        torch.nn.SiLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 128),
    )
    text_head = torch.nn.Linear(128, 128)
    wordings = {caption: i for i, caption in enumerate(sorted(set(captions)))}

    def loss_of_batch(step):
        random = np.random.default_rng((7, step))
        rows = random.choice(len(captions), 128, replace=False)
        texts = [thinned(captions[i], random) for i in rows]
        # A causal encoder never sees the padding after the end token: pad to the longest caption.
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        states = encoder(tokens)
        image_vectors = F.normalize(image_head(latents[rows]), dim=-1)
        text_vectors = F.normalize(text_head(states.pooler_output), dim=-1)
        wording = torch.tensor([wordings[captions[i]] for i in rows])
        target = (wording[:, None] == wording[None]).float()
        target = target / target.sum(1, keepdim=True)
        scores = text_vectors @ image_vectors.T / 0.07
        contrast = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        # Each state keeps its own word, which the pooled loss alone would let fade: the UNet's
        # attention reads the states.
        table = F.normalize(encoder.get_input_embeddings().weight, dim=-1)
        keep = F.cross_entropy((states.last_hidden_state @ table.T).flatten(0, 1), tokens.flatten())

        def progress():
            batch_labels = np.array([labels[i] for i in rows])
            right = batch_labels == batch_labels[scores.argmax(1).numpy()]
            return f"kind retrieved {right.mean():.3f} contrast {contrast.item():.3f}"

        return contrast + 0.1 * keep, progress

    modules = {"encoder": encoder, "eye": image_head, "hand": text_head}
    fit(args, "text", modules, loss_of_batch, 1e-3)
    encoder.eval().save_pretrained(out / "text_encoder")
    check_text(encoder, tokenizer)


@torch.no_grad()
def check_text(encoder, tokenizer):
    """Print and return the share of unseen wordings that lie nearest to their kind."""

    def pooled(texts):
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return F.normalize(encoder(tokens.input_ids).pooler_output, dim=-1)

    kinds = list(UNSEEN)
    centres = []
    for kind in kinds:
        captions = [phantoms.draw(kind, 400_000 + i, 16)[1] for i in range(64)]
        centres.append(pooled(captions).mean(0))
    wrong = []
    total = 0
    for kind, texts in UNSEEN.items():
        nearest = (pooled(texts) @ torch.stack(centres).T).argmax(1).tolist()
        for text, i in zip(texts, nearest, strict=True):
            total += 1
            if kinds[i] != kind:
                wrong.append(f"{text!r} -> {kinds[i]}")
    print(f"unseen wordings whose nearest kind is right: {total - len(wrong)} of {total}")
    for line in wrong:
        print(f"  wrong: {line}")
    return 1 - len(wrong) / total


# ---- the rest of the pipeline


def init_unet(args):
    """Write a random UNet, Stable Diffusion 1.5's scheduler and model_index.json."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    out = pathlib.Path(args.out)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 112, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(out / "vae"),
        CLIPTextModel.from_pretrained(out / "text_encoder"),
        CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    parts = ("unet", "vae", "text_encoder")
    print({name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in parts})


def pack(args):
    """Write the trained pipeline as fp16 safetensors to --out, at most 16,000,000 bytes."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        args.trained, torch_dtype=torch.float16, safety_checker=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(args.out)
    write_vocabulary(pipeline.tokenizer, pathlib.Path(args.out) / "tokenizer")
    # transformers from 5 on loads in the configuration's type, diffusers in float32: not both.
    path = pathlib.Path(args.out) / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    for path in pathlib.Path(args.out).rglob("*.json"):  # diffusers notes the folder it loaded from
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'\n *"_name_or_path": "[^"]*",', "", text)
        path.write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in pathlib.Path(args.out).rglob("*") if path.is_file())
    print(f"{args.out}: {size:,} bytes")
    if size > 16_000_000:
        sys.exit("error: more than 16,000,000 bytes: take a smaller UNet in init_unet()")


def check(args):
    """Load --out as any user would and print what it can do."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(args.out)
    check_vae(pipeline.vae)
    check_text(pipeline.text_encoder, pipeline.tokenizer)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = {
        "vae": make_vae,
        "decoder": make_decoder,
        "text": make_text,
        "init-unet": init_unet,
        "pack": pack,
        "check": check,
    }
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--out", required=True, help="pipeline folder to write (check: to read)")
    parser.add_argument("--data", help="pool of phantoms, for vae and text")
    parser.add_argument("--start", help="for vae: go on from the one of this pipeline folder")
    parser.add_argument("--trained", help="pipeline folder with the trained UNet, for pack")
    parser.add_argument("--minutes", type=float, default=10, help="length of a fit by the clock")
    parser.add_argument("--steps", type=int, help="length of a fit in steps instead")
    parser.add_argument("--bf16", action="store_true", help="for CPUs that have it in hardware")
    args = parser.parse_args()
    stages[args.stage](args)


if __name__ == "__main__":
    main()
