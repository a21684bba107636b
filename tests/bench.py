"""How fast it is, as ratios against what people use, on one machine with the same weights.

    python tests/bench.py                           all but training, on the CPU, with the tiny base
    python tests/bench.py --peer-script PEER        training too
    python tests/bench.py --what training --peer-script PEER --shape sd21-base --batch-size 8
    python tests/bench.py --what training --peer-script PEER --shape sd15 --resolution 512 \
--device cuda --compile
    python tests/bench.py --what sampling --shape sdxl --resolution 1024 --precision bf16 \
--device cuda
    python tests/bench.py --what growth             cost by images, pixels, rank and processes

Prints a table in Markdown; the pairs go to stderr. A ratio is the median of alternating pairs,
theirs / ours, with their range; where the peer is a loop over pairs of images, it is timed on some
of them and scaled up. Weights are random, in the published configurations. PEER is
examples/text_to_image/train_text_to_image_lora.py of a checkout of diffusers; it needs accelerate
and peft, and if its `datasets` package is not installed, a few lines here that read a folder
replace it. The other peers are in tests/requirements.txt.
"""

import argparse
import atexit
import contextlib
import csv
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny-base"
WARM_UP = 2  # steps left out
N = 376  # images a set, for the numbers
D = 2048  # features an image
NEVER = 10**6  # steps
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


# ---- bases, images, flags


# From the published configurations of UNets and text encoders.
UNETS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21-base": dict(
        sample_size=64,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "sd21": dict(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "sdxl": dict(
        sample_size=128,
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
    projection_dim=768,
)
CLIP_H = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
TEXTS = {"sd15": CLIP_L, "sd21-base": CLIP_H, "sd21": CLIP_H, "sdxl": CLIP_L}
SCHEDULERS = {"sd21": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
BETAS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
)


def make_base(shape, folder):
    """A base in the published configuration of `shape`, random fp16 weights; returns its folder.

    Its tokenizer is tiny's, a part of the real one's vocabulary. "tiny" is the embedded base.
    """
    if shape == "tiny":
        return TINY
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)  # half the memory
    try:
        parts = {
            "unet": diffusers.UNet2DConditionModel(**UNETS[shape]),
            "vae": make_vae(shape),
            "text_encoder": make_text_encoder(CLIPTextModel, TEXTS[shape]),
            "tokenizer": make_tokenizer(TEXTS[shape]),
        }
        if shape == "sdxl":
            parts["text_encoder_2"] = make_text_encoder(CLIPTextModelWithProjection, CLIP_G)
            parts["tokenizer_2"] = make_tokenizer(CLIP_G)
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = getattr(diffusers, SCHEDULERS.get(shape, "PNDMScheduler"))
    prediction_type = "v_prediction" if shape == "sd21" else "epsilon"
    parts["scheduler"] = scheduler.from_config({**BETAS, "prediction_type": prediction_type})
    if shape == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipe = diffusers.StableDiffusionPipeline(**parts, **none)
    pipe.save_pretrained(folder)
    return folder


def make_vae(shape):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        layers_per_block=2,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=8 * UNETS[shape]["sample_size"],
        force_upcast=shape == "sdxl",
        scaling_factor=0.13025 if shape == "sdxl" else 0.18215,
    )


def make_text_encoder(kind, numbers):
    from transformers import CLIPTextConfig

    return kind(CLIPTextConfig(**numbers, eos_token_id=2))  # as published: the highest token ends


def make_tokenizer(numbers):
    from transformers import CLIPTokenizer

    pad = "<|endoftext|>" if numbers is CLIP_L else "!"
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token=pad)


def make_images(folder, count, resolution, seed=0):
    """`count` random images with captions, in the form both sides read."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draw = np.random.RandomState(seed)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for i in range(count):
            pixels = draw.randint(0, 255, (resolution, resolution, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", f"a drawn image, number {i % 10}"])


def make_films(folder, count):
    """Grey PNG films of 1024 px; returns their paths."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draw = np.random.RandomState(0)
    paths = []
    for n in range(count):
        coarse = Image.fromarray(draw.randint(0, 256, (24, 24)).astype(np.uint8))
        film = np.asarray(coarse.resize((1024, 1024))) // 2 + draw.randint(0, 12, (1024, 1024))
        paths.append(folder / f"{n:04}.png")
        Image.fromarray(film.astype(np.uint8)).save(paths[-1])
    return paths


def as_flags(values, separator="-"):
    """{"batch_size": 8, "compile": True} as --batch-size 8 --compile."""
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", separator)
        if value is True:
            words.append(flag)
        elif value is not False:
            words += [flag, str(value)]
    return words


def device_of(args):
    """The device of both sides: of GPUs the first, which the peers take and torch waits for."""
    return args.device.replace("cuda", "cuda:0")


@contextlib.contextmanager
def parsed(script, *words):
    """The arguments that a script parses from this command line."""
    argv = sys.argv
    sys.argv = [script.__name__, *map(str, words)]
    try:
        yield script.parse_args()
    finally:
        sys.argv = argv


# ---- timing


def in_words(ratios):
    return f"{statistics.median(ratios):.3g} × ({min(ratios):.3g} to {max(ratios):.3g})"


def seconds_of(function):
    torch = sys.modules.get("torch")
    start = time.perf_counter()
    function()
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(name, ours, theirs, pairs, scale=1.0):
    """The ratio, in words, of two functions timed in turn after one pair to warm up.

    scale: what the peer's time is multiplied with, where it does a part of the work.
    """
    ratios = []
    for pair in range(pairs + 1):
        if pair % 2 == 0:
            our_time = seconds_of(ours)
            their_time = scale * seconds_of(theirs)
        else:
            their_time = scale * seconds_of(theirs)
            our_time = seconds_of(ours)
        ratios.append(their_time / our_time)
        print(f"{name}, pair {pair}: ours {our_time:.3f} s, theirs {their_time:.3f} s", flush=True)
    return in_words(ratios[1:])


# ---- training, each run in a process of its own


def watch_steps(report):
    """At the end write the time of every step and the peak memory; both sides move a tqdm bar."""
    import torch
    import tqdm

    times = []
    peaks = []
    update = tqdm.std.tqdm.update
    reset_peak = torch.cuda.reset_peak_memory_stats

    def update_and_note(bar, n=1):
        if bar.desc.startswith(("training", "Steps")):  # ours, the peer's
            if torch.cuda.is_initialized():  # ours only queues its work on the GPU
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        return update(bar, n)

    def note_and_reset_peak(*device):  # ours begins anew after it has cached the latents
        peaks.append(torch.cuda.max_memory_allocated(*device))
        reset_peak(*device)

    def write():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            peak = max([*peaks, torch.cuda.max_memory_allocated()])
        Path(report).write_text(json.dumps({"times": times, "peak": peak}))

    tqdm.std.tqdm.update = update_and_note
    torch.cuda.reset_peak_memory_stats = note_and_reset_peak
    atexit.register(write)


class FolderSplit(list):
    """What the peer's script uses of a `datasets` split."""

    column_names = ["image", "text"]
    transform = None

    def with_transform(self, transform):
        self.transform = transform
        return self

    def __getitem__(self, i):
        row = list.__getitem__(self, i)
        if self.transform is None:
            return row
        columns = self.transform({key: [value] for key, value in row.items()})
        return {key: values[0] for key, values in columns.items()}


def load_folder(*_, data_files=None, data_dir=None, **__):
    """Read a folder of images with captions, as `datasets.load_dataset` would."""
    from PIL import Image

    folder = Path(data_dir or str(data_files["train"]).removesuffix("**"))
    split = FolderSplit()
    with open(folder / "metadata.csv", newline="") as file:
        for row in csv.DictReader(file):
            split.append({"image": Image.open(folder / row["file_name"]), "text": row["text"]})
    return {"train": split}


def replace_datasets():
    """Put a stand-in for the `datasets` package, which the peer's script imports."""
    quiet = types.SimpleNamespace(
        set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None
    )
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    module.load_dataset = load_folder
    module.utils = types.SimpleNamespace(logging=quiet)
    sys.modules["datasets"] = module


def run_watched(report, script, *words):
    """Run a training script in this process and watch its steps."""
    if importlib.util.find_spec("datasets") is None:
        replace_datasets()
    watch_steps(report)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def measure_training(script, words, report, environment):
    """(seconds a step, peak bytes) of one run."""
    command = [sys.executable, __file__, "--child", report, script, *words]
    environment = {**os.environ, **environment}
    folder = Path(script).parent
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{script} failed:\n{run.stderr[-3000:]}")
    measured = json.loads(Path(report).read_text())
    times = measured["times"]
    gaps = [times[i + 1] - times[i] for i in range(WARM_UP, len(times) - 1)]
    return statistics.median(gaps), measured["peak"]


def bench_training(args, place):
    """Seconds a step and peak memory of train.py and of the peer's script, rank 16."""
    base = TINY
    if args.shape != "tiny":  # in a process of its own: a child's peak begins at its parent's
        base = place / "base"
        code = "import sys, bench; bench.make_base(*sys.argv[1:])"
        command = [sys.executable, "-c", code, args.shape, base]
        subprocess.run(command, cwd=ROOT / "tests", check=True, stdout=sys.stderr)
    images = place / "images"
    make_images(images, 2 * args.batch_size, args.resolution)  # no short last batch
    ours = dict(
        base=base,
        data=images,
        resolution=args.resolution,
        batch_size=args.batch_size,
        steps=args.steps,
        precision=args.precision,
        device=device_of(args),
        val_split=0,
        val_samples=0,
        save_every=NEVER,
        log_every=NEVER,
        compile=args.compile,
    )
    theirs = dict(
        pretrained_model_name_or_path=base,
        train_data_dir=images,
        caption_column="text",
        resolution=args.resolution,
        train_batch_size=args.batch_size,
        max_train_steps=args.steps,
        rank=16,
        mixed_precision=args.peer_precision,
        checkpointing_steps=NEVER,
        seed=0,
        allow_tf32=args.device == "cuda",  # as ours
    )
    environment = {"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    peer_script = os.path.abspath(args.peer_script)
    ratios = []
    memory = []
    for pair in range(args.pairs):
        words = as_flags({**ours, "out": place / f"ours-{pair}"})
        our_time, our_peak = measure_training(
            str(ROOT / "train.py"), words, place / "ours.json", {}
        )
        words = as_flags({**theirs, "output_dir": place / f"peer-{pair}"}, separator="_")
        their_time, their_peak = measure_training(
            peer_script, words, place / "theirs.json", environment
        )
        ratios.append(their_time / our_time)
        memory.append(our_peak / their_peak)
        print(f"training, pair {pair}: ours {our_time:.3f} s a step, {our_peak / 1e6:.0f} MB")
        print(f"  theirs {their_time:.3f} s a step, {their_peak / 1e6:.0f} MB", flush=True)
    what = f"training, {args.shape}, {args.resolution} px, batch {args.batch_size}"
    what += f", ours {args.precision}"
    if args.compile:
        what += " --compile"
    what += f", theirs {args.peer_precision.replace('no', 'fp32')}"
    result = f"{in_words(ratios)}, {statistics.median(memory):.2f} × its memory"
    yield what, "diffusers' train_text_to_image_lora.py", result


# ---- drawing


def make_adapter(base_name, path):
    """A rank-16 adapter of the attention layers with random weights."""
    import torch

    import lora
    import metrics
    import sample

    base = sample.load_base(base_name, torch.device("cpu"), "bf16")
    first = metrics.generator(0, "bench")
    weights = lora.inject(base.unet, "attention", 16, 16, generator=first)
    for weight in weights.values():
        shape = tuple(weight.shape)
        weight.data = 0.01 * torch.randn(shape, generator=metrics.generator(0, "bench", shape))
    lora.save(path, weights, {"rank": 16, "alpha": 16, "base": base_name})


def bench_sampling(args, place):
    """Images from text to picture: at one precision and batch size, and each as by default."""
    folder = str(make_base(args.shape, place / "base"))
    adapter = place / "lora.safetensors"
    make_adapter(folder, adapter)
    precision = "fp32" if args.precision == "auto" else args.precision
    size = args.batch_size
    both = f"both {precision}"
    yield compare_sampling(both, folder, adapter, (precision, size), (precision, size), args)
    default = "each as by default"
    yield compare_sampling(default, folder, adapter, ("auto", 8), ("fp32", 1), args)


def compare_sampling(name, folder, adapter, our_way, their_way, args):
    """A row of the table; a way is (precision, images at once)."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    import lora
    import sample

    device = torch.device(device_of(args))
    our_precision, our_size = our_way
    their_precision, their_size = their_way
    prompts = [f"a drawn image, number {i % 4}" for i in range(args.images)]
    jobs = [(prompt, i) for i, prompt in enumerate(prompts)]
    base = sample.load_base(folder, device, our_precision)
    settings = sample.Settings(steps=args.steps, height=args.resolution, width=args.resolution)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[their_precision]
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(adapter.parent), weight_name=adapter.name)

    def ours():
        list(sample.generate(base, jobs, settings, our_size))

    def theirs():
        how = dict(num_inference_steps=args.steps, guidance_scale=7.5)
        how |= dict(height=args.resolution, width=args.resolution)
        for i in range(0, len(prompts), their_size):
            pipe(prompts[i : i + their_size], **how)

    what = f"drawing, {args.shape}, {args.resolution} px, {args.steps} steps, {name}"
    with lora.merged(base.parts(), [(lora.load(adapter)[0], 1.0)]):
        ratio = alternate(what, ours, theirs, args.pairs)
    return what, f"diffusers' {type(pipe).__name__}", ratio


# ---- reading and encoding


def bench_reading(args, place):
    """Grey films become pixels, against threads of plain Pillow that decode and resize them."""
    import numpy as np
    import torch
    from PIL import Image

    from metrics import list_images, load_pixels

    paths = make_films(place / "films", 100)
    rows = list_images(place / "films")
    pixels = torch.empty(100, 3, 512, 512, dtype=torch.uint8)

    def read_plainly(n):
        with Image.open(paths[n]) as film:
            resized = film.resize((512, 512), Image.Resampling.LANCZOS)
            pixels[n] = torch.from_numpy(np.array(resized))

    def theirs():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read_plainly, range(100)))

    def ours():
        return load_pixels(rows, 512)[1]

    ratio = alternate("reading", ours, theirs, args.pairs)
    assert torch.equal(ours(), pixels)
    yield "reading 100 films of 1024 px to 512", "threads of plain Pillow", ratio


def bench_encoding(args, place):
    """From image files to latents, against torchvision and the VAE as diffusers' script do it."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from torchvision import transforms

    import sample
    from metrics import list_images, load_pixels

    paths = make_films(place / "films", 48)
    rows = list_images(place / "films")
    folder = make_base(args.shape, place / "base")
    device = torch.device(device_of(args))
    base = sample.load_base(str(folder), device, "fp32", "lora")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(device)
    prepare = transforms.Compose(
        [
            transforms.Resize(args.resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(args.resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def ours():
        _, pixels = load_pixels(rows, args.resolution)
        for batch in pixels.split(args.batch_size):
            sample.encode(base, batch)

    @torch.no_grad()
    def theirs():
        for i in range(0, len(paths), args.batch_size):
            images = []
            for path in paths[i : i + args.batch_size]:
                images.append(prepare(Image.open(path).convert("RGB")))
            vae.encode(torch.stack(images).to(device)).latent_dist.sample()

    what = f"48 films of 1024 px to latents of {args.resolution} px, {args.shape}, fp32"
    ratio = alternate("encoding", ours, theirs, args.pairs)
    yield what, "torchvision's transforms and the VAE in batches", ratio


# ---- the numbers


def bench_distances(args, place):
    """Fréchet alone, and 999 permutations of six numbers, against pytorch-fid's distance."""
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance

    import evaluate
    import metrics

    real = np.random.RandomState(0).randn(N, D).clip(0)  # as pool3 features look
    fake = np.random.RandomState(1).randn(N, D).clip(0)
    moments = []
    for features in (real, fake):
        moments += [features.mean(0), np.cov(features, rowvar=False)]

    def one():
        metrics.frechet(real, fake)

    def permuted():
        joint = evaluate.joint_matrices(real, fake, False)
        draws = evaluate.permutation_draws(N, N, 999, 0)
        for name in ("frechet", "kid", "precision", "recall", "density", "coverage"):
            function = evaluate.METRICS[name][0]
            function(joint, draws)

    def theirs():
        calculate_frechet_distance(*moments)

    what = f"Fréchet distance from features, {N} + {N} of {D}"
    yield what, "pytorch-fid", alternate(what, one, theirs, args.pairs)
    what = "999 permutations of six distances"
    yield what, "one of pytorch-fid's distances", alternate(what, permuted, theirs, args.pairs)


@functools.lru_cache
def random_lpips(net):
    """LPIPS with random weights: the package's module, and our Network with the same weights."""
    import lpips

    import metrics

    module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {name.split(".", 1)[1]: value for name, value in module.net.state_dict().items()}
    kind, layers = metrics.LPIPS[net][:2]
    trunk = metrics.trunk_of(kind, {f"features.{key}": value for key, value in state.items()})
    weights = [module.state_dict()[f"lin{n}.model.1.weight"][0] for n in range(len(layers))]

    def function(pixels):
        return metrics.lpips_vectors(pixels / 127.5 - 1, trunk, layers, weights)

    return module, metrics.Network(net, function)


def random_pictures(count):
    """Smooth random pictures: uint8 (N, 3, 128, 128)."""
    import torch

    gen = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 255, (count, 3, 8, 8), generator=gen).float()
    large = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic")
    return large.clamp(0, 255).byte()


def bench_images(args, place):
    """All pairs of images: LPIPS (alex, 64 px) and SSIM (of 128 px, ours at 64)."""
    import torch
    from skimage.metrics import structural_similarity

    import metrics

    pixels = random_pictures(2 * N)
    small = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="area").byte()
    module, network = random_lpips("alex")

    def our_lpips():
        metrics.lpips_matrix(small, network, "cpu")

    @torch.inference_mode()
    def their_lpips():
        for n in range(40):
            module(small[n : n + 1] / 127.5 - 1, small[N + n : N + n + 1] / 127.5 - 1)

    def our_ssim():
        metrics.ssim_matrix(pixels[N:], pixels[:N])

    def their_ssim():
        how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        how |= dict(data_range=1.0, channel_axis=0)
        for n in range(10):
            a = pixels[n].numpy() / 255
            b = pixels[N + n].numpy() / 255
            structural_similarity(a, b, **how)

    what = f"LPIPS of {N} × {N} pairs (ours: of all {2 * N} × {2 * N})"
    ratio = alternate(what, our_lpips, their_lpips, args.pairs, N * N / 40)
    yield what, "a loop over lpips", ratio
    what = f"nearest image by SSIM, {N} × {N}"
    ratio = alternate(what, our_ssim, their_ssim, args.pairs, N * N / 10)
    yield what, "a loop over scikit-image", ratio


# ---- whole scripts


def bench_evaluation(args, place, count=64):
    """evaluate.py with an empty cache, against three packages with the same random Inception."""
    import numpy as np
    import torch
    from cleanfid import fid
    from PIL import Image
    from torch_fidelity import calculate_metrics
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchvision.models import Inception3

    import evaluate
    import metrics

    real = str(place / "real")
    fake = str(place / "fake")
    weights = str(place / "inception.pth")
    make_images(Path(real), count, 128, seed=0)
    make_images(Path(fake), count, 128, seed=1)
    torch.manual_seed(0)
    inception = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(inception.state_dict(), weights)
    net = torch.nn.Module()
    net.forward = metrics.load_features(weights, "cpu").function
    net.num_features = D
    evaluate.load_lpips = lambda net, device: random_lpips(net)[1]

    def ours(*words):
        metrics.CACHE = Path(tempfile.mkdtemp(dir=place))
        how = dict(features=weights, lpips="alex", device="cpu", out=place / "report.html")
        with parsed(evaluate, real, fake, *as_flags(how), *words) as flags:
            evaluate.main(flags)

    def with_torch_fidelity():
        calculate_metrics(
            input1=fake,
            input2=real,
            fid=True,
            kid=True,
            isc=True,
            kid_subset_size=50,
            cuda=False,
            feature_extractor_weights_path=weights,
            cache=False,
            verbose=False,
        )

    def with_clean_fid():
        def features(x):
            return net(x.round().byte())

        how = dict(num_workers=0, device="cpu", verbose=False)
        fid.compute_fid(fake, real, custom_feat_extractor=features, **how)

    @torch.no_grad()
    def with_torchmetrics():
        for measure in (
            FrechetInceptionDistance(net),
            KernelInceptionDistance(net, subset_size=50),
        ):
            for folder in (real, fake):
                paths = sorted(Path(folder).glob("*.png"))
                images = np.stack([np.asarray(Image.open(path)) for path in paths])
                for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(32):
                    measure.update(batch, real=folder == real)
            measure.compute()

    three = "fid,kid,inception_score"
    for words, peer, theirs in (
        ([], f"torch-fidelity, {three}", with_torch_fidelity),
        (["--metrics", three], "torch-fidelity", with_torch_fidelity),
        (["--metrics", "fid,kid"], "torchmetrics", with_torchmetrics),
        (["--metrics", "fid"], "clean-fid", with_clean_fid),
    ):
        what = f"evaluate.py {' '.join(words) or 'as by default'}, {count} + {count} images"
        yield what, peer, alternate(what, functools.partial(ours, *words), theirs, args.pairs)


def bench_filtering(args, place, count=100):
    """filter.py by all its scores, against the usual loop over pairs, timed on 20 of them."""
    import torch
    from skimage.metrics import structural_similarity

    import filter as filter_script
    import metrics

    real = place / "real"
    fake = place / "fake"
    make_images(real, count, 64, seed=0)
    make_images(fake, count, 64, seed=1)
    real_pixels = metrics.load_pixels(metrics.list_images(real), 64)[1]
    fake_pixels = metrics.load_pixels(metrics.list_images(fake), 64)[1]
    module, network = random_lpips("vgg")
    filter_script.load_lpips = lambda net, device: network
    limits = dict(lpips="vgg", max_lpips=9, min_ssim=-1, calibrate=0.05)  # most images pass

    def ours():
        metrics.CACHE = Path(tempfile.mkdtemp(dir=place))
        how = dict(reference=real, drop_copies=True, device="cpu", out=tempfile.mkdtemp(dir=place))
        with parsed(filter_script, fake, *as_flags({**limits, **how})) as flags:
            filter_script.main(flags)

    @torch.inference_mode()
    def theirs():
        for n in range(20):
            a = real_pixels[n]
            b = fake_pixels[n]
            module(a[None] / 127.5 - 1, b[None] / 127.5 - 1)
            structural_similarity(a.numpy(), b.numpy(), channel_axis=0)

    what = f"all of filter.py, {count} images against {count}, LPIPS (VGG, 64 px) and SSIM too"
    ratio = alternate(what, ours, theirs, args.pairs, count**2 / 20)
    yield what, "a loop over lpips and scikit-image", ratio


# ---- growth


def run_command(script, words, processes=1):
    """(seconds, peak GB of one process) of a command as typed, with an empty cache."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*start, str(ROOT / script), *map(str, words), "--device", "cpu"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MEDLORA_CACHE": cache}
        process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{script} failed")
    return time.perf_counter() - began, used.ru_maxrss / 1e6


def train_shortly(images, out, processes=1, **changes):
    """(seconds an image, GB) of ten steps with the tiny base."""
    how = dict(base="tiny", data=images, steps=10, log_every=2, out=out, **changes)
    how |= dict(val_split=0, val_samples=0, save_every=NEVER)
    _, memory = run_command("train.py", as_flags(how), processes)
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    return 1 / line["images_per_second"], memory


def bench_growth(args, place):
    """Rows (what, size, seconds, GB): cost as images, pixels, rank and processes grow."""
    for count in (100, 1000, 10000):
        real = place / f"real-{count}"
        fake = place / f"fake-{count}"
        make_images(real, count, 64, seed=0)
        make_images(fake, count, 64, seed=1)
        words = as_flags(dict(base="tiny", data=real, resolution=64, steps=1, val_samples=0))
        out = ["--out", place / f"train-{count}"]
        yield "train.py, 64 px", f"{count} images", *run_command("train.py", words + out)
        words = [real, fake, "--out", place / f"evaluate-{count}.html"]
        yield "evaluate.py, 64 px", f"{count} images", *run_command("evaluate.py", words)
        how = dict(reference=real, calibrate=0.05, drop_copies=True, drop_duplicates=True)
        words = [fake, *as_flags(how), "--out", place / f"filter-{count}"]
        yield "filter.py, 64 px", f"{count} images", *run_command("filter.py", words)
    images = place / "real-100"
    for side in (64, 128, 256, 512):
        cost = train_shortly(images, place / f"px-{side}", resolution=side, batch_size=4)
        yield "training, an image", f"{side} px", *cost
    for rank in (4, 16, 64, 128):
        out = place / f"rank-{rank}"
        cost = train_shortly(images, out, rank=rank, batch_size=4)
        size = (out / "lora.safetensors").stat().st_size / 1e6
        yield "training, an image, 128 px", f"rank {rank}, {size:.1f} MB", *cost
    for count in (1, 2):
        cost = train_shortly(images, place / f"processes-{count}", count, batch_size=8 // count)
        yield "training, an image, 128 px, batch 8 in all", f"{count} processes", *cost
        how = dict(base="tiny", prompt="a film", num_images=16, steps=10)
        words = as_flags({**how, "out": place / f"drawn-{count}"})
        cost = run_command("sample.py", words, count)
        yield "sample.py, 16 images of 10 steps", f"{count} processes", *cost


# ---- the whole


BENCHES = {
    "training": [bench_training],
    "sampling": [bench_sampling],
    "reading": [bench_reading],
    "encoding": [bench_encoding],
    "numbers": [bench_distances, bench_images],
    "evaluation": [bench_evaluation],
    "filtering": [bench_filtering],
    "growth": [bench_growth],
}
PACKAGES = (
    "torch diffusers transformers peft pytorch-fid clean-fid torch-fidelity torchmetrics lpips "
    "scikit-image pillow"
).split()


def describe_machine(args):
    """What it ran on, when, and with which packages."""
    import torch

    device = f"{platform.machine()}, {os.cpu_count()} cores"
    if args.device == "cuda":
        device = torch.cuda.get_device_name(device_of(args))
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{time.strftime('%d %B %Y')}, {device}, {', '.join(versions)}"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--what", choices=BENCHES, help="one of them alone (default: all but growth)")
    add("--peer-script", metavar="PEER", help="diffusers' script, for training")
    add("--shape", choices=["tiny", *UNETS], default="tiny")
    add("--resolution", type=int, default=128)
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=12, help="of training, or of denoising")
    add("--images", type=int, default=16, help="to draw")
    add("--pairs", type=int, default=3)
    precisions = ["auto", "fp32", "bf16"]
    help_text = "of our training, and of both that draw"
    add("--precision", choices=precisions, default="fp32", help=help_text)
    add("--peer-precision", choices=["no", "bf16"], default="no", help="its --mixed_precision")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--compile", action="store_true", help="our training with --compile")
    args = parser.parse_args()
    if args.what == "training" and not args.peer_script:
        parser.error("--what training needs --peer-script")
    if args.device == "cuda" and args.what not in ("training", "sampling", "encoding"):
        parser.error("--device cuda needs --what training, sampling or encoding")
    return args


def main(args):
    names = [args.what]
    if args.what is None:
        names = [name for name in BENCHES if name != "growth"]
        if not args.peer_script:
            names.remove("training")
    header = ["what", "against", "ratio"]
    if args.what == "growth":
        header = ["what", "size", "time", "peak memory"]
    rows = []
    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            for bench in BENCHES[name]:
                with tempfile.TemporaryDirectory() as place:
                    rows += bench(args, Path(place))
    print(f"| {' | '.join(header)} |")
    print(f"| {' | '.join('---' for _ in header)} |")
    for row in rows:
        if args.what == "growth":
            what, size, seconds, memory = row
            row = (what, size, f"{seconds:.3g} s", f"{memory:.1f} GB")
        print(f"| {' | '.join(row)} |")
    print(f"\n{describe_machine(args)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_watched(*sys.argv[2:])
    else:
        main(parse_args())
