"""How fast it is, as ratios against what people use, both run in turn on the same machine with the same weights.

    python tests/bench.py                                      all but training, on the CPU, with the tiny base
    python tests/bench.py --peer-script diffusers/examples/text_to_image/train_text_to_image_lora.py      training too
    python tests/bench.py --what training --peer-script … --shape sd21-base --batch-size 8
    python tests/bench.py --what training --peer-script … --shape sd15 --resolution 512 --device cuda --compile
    python tests/bench.py --what sampling --shape sdxl --resolution 1024 --precision bf16 --device cuda
    python tests/bench.py --what growth                        how cost grows with images, pixels, rank and processes

Prints a table in Markdown; the pairs go to stderr. A ratio is the median of alternating pairs, theirs / ours, and their
range; where the peer is a loop over pairs of images, it is timed on some and scaled up. Weights are random, in the
published configurations. The peer's training script comes from a checkout of diffusers, which is no part of this
repository, and needs accelerate and peft; where its `datasets` package is not installed, a few lines that read a folder
replace it. The others need what tests/requirements.txt names.
"""

import argparse
import contextlib
import csv
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2  # steps left out
N, D = 376, 2048  # of the numbers: images a set, features an image
GROWTH = {
    "images": (100, 1000, 10000),
    "px": (64, 128, 256, 512),
    "rank": (4, 16, 64, 128),
    "processes": (1, 2),
}
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"


# ---- the same work for both

# What the published configurations say of a UNet, of a text encoder (hidden and intermediate size, layers, heads,
# activation, projection), and of the rest; text_encoder_2 is SDXL's.
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
CLIP_L, CLIP_H, CLIP_G = (
    (768, 3072, 12, 12, "quick_gelu", 768),
    (1024, 4096, 23, 16, "gelu", 512),
    (1280, 5120, 32, 20, "gelu", 1280),
)
TEXTS = {"sd15": [CLIP_L], "sd21-base": [CLIP_H], "sd21": [CLIP_H], "sdxl": [CLIP_L, CLIP_G]}


def make_base(shape, folder):
    """A base in the published configuration of `shape` with random fp16 weights, saved in diffusers' form; "tiny" is
    the embedded one. Its tokenizer is tiny's, a part of the real one's vocabulary. Returns the folder."""
    if shape == "tiny":
        return ROOT / "tests" / "tiny-base"
    import diffusers
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)  # half the memory
    try:
        unet = diffusers.UNet2DConditionModel(**UNETS[shape])
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            layers_per_block=2,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=8 * UNETS[shape]["sample_size"],
            force_upcast=shape == "sdxl",
            scaling_factor=0.13025 if shape == "sdxl" else 0.18215,
        )
        parts = dict(unet=unet, vae=vae)
        for suffix, kind, numbers in zip(
            ("", "_2"), (CLIPTextModel, CLIPTextModelWithProjection), TEXTS[shape]
        ):
            names = (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "hidden_act",
            )
            parts["text_encoder" + suffix] = kind(
                CLIPTextConfig(**dict(zip((*names, "projection_dim"), numbers)), eos_token_id=2)
            )  # as published: the highest
            parts["tokenizer" + suffix] = CLIPTokenizer.from_pretrained(
                ROOT / "tests" / "tiny-base" / "tokenizer",
                pad_token="<|endoftext|>" if numbers is CLIP_L else "!",
            )
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = {"sd21": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}.get(
        shape, "PNDMScheduler"
    )
    parts["scheduler"] = getattr(diffusers, scheduler).from_config(
        dict(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type="v_prediction" if shape == "sd21" else "epsilon",
        )
    )
    if shape == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    return folder


def make_images(folder, count, resolution, seed=0):
    """`count` random images with captions, in the form both read."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    draw, rows = np.random.RandomState(seed), [["file_name", "text"]]
    for i in range(count):
        Image.fromarray(draw.randint(0, 255, (resolution, resolution, 3)).astype(np.uint8)).save(
            folder / f"{i}.png"
        )
        rows.append([f"{i}.png", f"a drawn image, number {i % 10}"])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ---- one run of each, in a process of its own


def watch_steps(report):
    """Note the time of every step (both advance a tqdm bar) and write times and peak memory to `report` at the end."""
    import atexit

    import torch
    import tqdm

    times, update = [], tqdm.std.tqdm.update

    def noted(bar, n=1):
        if bar.unit == "step" or bar.desc.startswith("Steps"):
            if torch.cuda.is_initialized():  # ours only puts its work into the GPU's queue
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        return update(bar, n)

    tqdm.std.tqdm.update = noted

    def write():
        on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
        peak = on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(report).write_text(json.dumps({"times": times, "peak": peak}))

    atexit.register(write)


def stand_in_for_datasets():
    """What the peer's script needs of the `datasets` package to read a folder of images with captions."""

    class Split(list):
        column_names, transform = ["image", "text"], None

        def with_transform(self, transform):
            self.transform = transform
            return self

        def __getitem__(self, i):
            row = {key: [value] for key, value in list.__getitem__(self, i).items()}
            return {
                key: values[0]
                for key, values in (self.transform(row) if self.transform else row).items()
            }

    def load_dataset(*_, data_files=None, data_dir=None, **__):
        from PIL import Image

        folder = Path(data_dir or str(data_files["train"]).removesuffix("**"))
        with open(folder / "metadata.csv", newline="") as file:
            return {
                "train": Split(
                    {"image": Image.open(folder / row["file_name"]), "text": row["text"]}
                    for row in csv.DictReader(file)
                )
            }

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    module.load_dataset, module.utils = (
        load_dataset,
        types.SimpleNamespace(
            logging=types.SimpleNamespace(
                set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None
            )
        ),
    )
    sys.modules["datasets"] = module


def child(report, script, *flags):
    """Run a script in this process, its steps watched."""
    if importlib.util.find_spec("datasets") is None:
        stand_in_for_datasets()
    watch_steps(report)
    sys.argv, sys.path[0] = [script, *flags], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def measure(script, flags, report, environment):
    """(seconds a step, peak bytes) of one run."""
    ran = subprocess.run(
        [sys.executable, __file__, "--child", report, script, *map(str, flags)],
        cwd=Path(script).parent,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if ran.returncode:
        sys.exit(f"{script} failed:\n{ran.stderr[-3000:]}")
    found = json.loads(Path(report).read_text())
    gaps = [b - a for a, b in zip(found["times"], found["times"][1:])]
    return statistics.median(gaps[WARM_UP:]), found["peak"]


def bench_training(args, place):
    """Seconds a step and peak memory of train.py and of the peer's script, rank 16 on random images."""
    base = ROOT / "tests" / "tiny-base"
    if args.shape != "tiny":  # in a process of its own: a child's peak begins at its parent's
        base, words = place / "base", "import sys, bench; bench.make_base(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", words, args.shape, base],
            cwd=ROOT / "tests",
            check=True,
            stdout=sys.stderr,
        )
    make_images(
        place / "images", 2 * args.batch_size, args.resolution
    )  # the peer's last batch of an epoch may not be short
    ours = [
        "--base",
        base,
        "--data",
        place / "images",
        "--resolution",
        args.resolution,
        "--batch-size",
        args.batch_size,
        "--steps",
        args.steps,
        "--precision",
        args.precision,
        "--device",
        args.device,
        "--val-split",
        0,
        "--val-samples",
        0,
        "--save-every",
        10**6,
        "--log-every",
        10**6,
    ] + ["--compile"] * args.compile
    peer = [
        "--pretrained_model_name_or_path",
        base,
        "--train_data_dir",
        place / "images",
        "--caption_column",
        "text",
        "--resolution",
        args.resolution,
        "--train_batch_size",
        args.batch_size,
        "--max_train_steps",
        args.steps,
        "--rank",
        16,
        "--mixed_precision",
        args.peer_precision,
        "--checkpointing_steps",
        10**6,
        "--seed",
        0,
    ]
    peer += ["--allow_tf32"] * (args.device == "cuda")  # as ours
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    ratios, memory = [], []
    for pair in range(args.pairs):
        a, a_peak = measure(
            str(ROOT / "train.py"), [*ours, "--out", place / f"ours-{pair}"], place / "a.json", {}
        )
        b, b_peak = measure(
            os.path.abspath(args.peer_script),
            [*peer, "--output_dir", place / f"peer-{pair}"],
            place / "b.json",
            on_cpu,
        )
        ratios.append(b / a)
        memory.append(a_peak / b_peak)
        print(
            f"training, pair {pair}: ours {a:.3f} s a step, {a_peak / 1e6:.0f} MB; theirs {b:.3f} s, "
            f"{b_peak / 1e6:.0f} MB",
            flush=True,
        )
    yield (
        f"training, {args.shape}, {args.resolution} px, batch {args.batch_size}, ours {args.precision}"
        f"{' --compile' * args.compile}, theirs {args.peer_precision.replace('no', 'fp32')}",
        "diffusers' train_text_to_image_lora.py",
        f"{in_words(ratios)}, {statistics.median(memory):.2f} × its memory",
    )


def in_words(ratios):
    return f"{statistics.median(ratios):.3g} × ({min(ratios):.3g} to {max(ratios):.3g})"


def alternate(name, ours, theirs, pairs, scale=1.0):
    """Time two functions in turn, a pair more than asked for to warm up; the ratio in words. scale: of their time."""
    ratios = []
    for pair in range(pairs + 1):
        took = {}
        for function in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            start = time.perf_counter()
            function()
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
                sys.modules["torch"].cuda.synchronize()
            took[function] = time.perf_counter() - start
        ratios.append(scale * took[theirs] / took[ours])
        print(
            f"{name}, pair {pair}: ours {took[ours]:.3f} s, theirs {scale * took[theirs]:.3f} s",
            flush=True,
        )
    return in_words(ratios[1:])


@contextlib.contextmanager
def typed(module, *flags):
    """The flags that a script would parse from this command line."""
    argv, sys.argv = sys.argv, [module.__name__, *map(str, flags)]
    try:
        yield module.parse_args()
    finally:
        sys.argv = argv


# ---- drawing


def make_adapter(base, path):
    """A rank-16 adapter of the attention layers with random weights."""
    import torch

    import lora
    import sample

    loaded = sample.load_base(base, torch.device("cpu"), "bf16")
    weights = lora.inject(loaded.unet, "attention", 16, 16, generator=sample.generator(0, "bench"))
    for weight in weights.values():
        weight.data = 0.01 * torch.randn(
            weight.shape, generator=sample.generator(0, "bench", tuple(weight.shape))
        )
    lora.save(path, weights, {"rank": 16, "alpha": 16, "base": base})


def bench_sampling(args, place):
    """Images from text to picture: in one --precision and batch size, and as either is run by default (ours in
    --precision auto by 8, theirs in fp32 one prompt a call)."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    import lora
    import sample

    device, folder = torch.device(args.device), str(make_base(args.shape, place / "base"))
    adapter = place / "lora.safetensors"
    make_adapter(folder, adapter)
    prompts = [f"a drawn image, number {i % 4}" for i in range(args.images)]
    one = args.precision if args.precision != "auto" else "fp32"
    for name, precision, theirs, sizes in (
        (
            f"both {one}",
            one,
            {"fp32": "float32", "bf16": "bfloat16"}[one],
            (args.batch_size, args.batch_size),
        ),
        ("each as by default", "auto", "float32", (8, 1)),
    ):
        base = sample.load_base(folder, device, precision)
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, theirs)).to(
            device
        )
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(place), weight_name=adapter.name)

        def draw_ours():
            list(
                sample.generate(
                    base,
                    [(prompt, i) for i, prompt in enumerate(prompts)],
                    args.steps,
                    height=args.resolution,
                    width=args.resolution,
                    batch_size=sizes[0],
                )
            )

        def draw_theirs():
            for i in range(0, len(prompts), sizes[1]):
                pipe(
                    prompts[i : i + sizes[1]],
                    num_inference_steps=args.steps,
                    guidance_scale=7.5,
                    height=args.resolution,
                    width=args.resolution,
                )

        what = f"drawing, {args.shape}, {args.resolution} px, {args.steps} steps, {name}"
        with lora.merged(
            base.parts(), [(lora.load(adapter)[0], 1.0)]
        ):  # once a command, as loading it into theirs
            yield (
                what,
                f"diffusers' {type(pipe).__name__}",
                alternate(what, draw_ours, draw_theirs, args.pairs),
            )


# ---- reading and caching


def make_films(place, count):
    """Grey PNG films of 1024 px; returns their paths."""
    import numpy as np
    from PIL import Image

    place.mkdir()
    draw, paths = np.random.RandomState(0), [place / f"{n:04}.png" for n in range(count)]
    for path in paths:
        film = Image.fromarray(draw.randint(0, 256, (24, 24)).astype(np.uint8)).resize((1024, 1024))
        Image.fromarray(
            (np.asarray(film) // 2 + draw.randint(0, 12, (1024, 1024))).astype(np.uint8)
        ).save(path)
    return paths


def bench_reading(args, place):
    """Grey films become pixels, against threads of plain Pillow that decode and resize them."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch
    from PIL import Image

    from metrics import list_images, load_pixels

    paths = make_films(place / "films", 100)
    rows, pixels = list_images(place / "films"), torch.empty(100, 3, 512, 512, dtype=torch.uint8)

    def plain(n):
        with Image.open(paths[n]) as film:
            pixels[n] = torch.from_numpy(
                np.array(film.resize((512, 512), Image.Resampling.LANCZOS))
            )

    def theirs():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(plain, range(100)))

    yield (
        "reading 100 films of 1024 px to 512",
        "threads of plain Pillow",
        alternate("reading", lambda: load_pixels(rows, 512), theirs, args.pairs),
    )
    assert torch.equal(load_pixels(rows, 512)[1], pixels)


def bench_caching(args, place):
    """From image files to latents, against torchvision's transforms and the VAE as diffusers' script calls them."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from torchvision import transforms

    import sample
    import train

    paths, base = make_films(place / "many", 48), make_base(args.shape, place / "vae")
    loaded = sample.load_base(str(base), torch.device(args.device), "fp32", "lora")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(args.device)
    look = transforms.Compose(
        [
            transforms.Resize(args.resolution, transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(args.resolution),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    @torch.no_grad()
    def theirs():
        for i in range(0, len(paths), args.batch_size):
            images = torch.stack(
                [look(Image.open(path).convert("RGB")) for path in paths[i : i + args.batch_size]]
            )
            vae.encode(images.to(args.device)).latent_dist.sample()

    with typed(
        train,
        "--data",
        place / "many",
        "--resolution",
        args.resolution,
        "--batch-size",
        args.batch_size,
    ) as flags:

        def ours():
            train.cache(
                loaded, *train.load_uncached(train.list_data(flags), flags), flags, "images"
            )

        yield (
            f"caching, {args.shape}'s VAE, films of 1024 px to latents of {args.resolution}, fp32",
            "torchvision's transforms and the VAE's encode, a batch at a time",
            alternate("caching", ours, theirs, args.pairs),
        )


# ---- the numbers


def pool3_like(count, seed):
    """Rectified Gaussians, as pool3 features look."""
    import numpy as np

    return np.random.RandomState(seed).randn(count, D).clip(0)


def bench_distances(args, place):
    """Frechet alone, and 999 permutations of seven numbers, against pytorch-fid's distance."""
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance

    import evaluate
    import metrics

    real, fake = pool3_like(N, 0), pool3_like(N, 1)
    parts = [part for x in (real, fake) for part in (x.mean(0), np.cov(x, rowvar=False))]

    def permuted():
        joint = evaluate.joint_matrices(real, fake, False)
        draws = evaluate.permutation_draws(N, N, 999, 0)
        for name in ("frechet", "kid", "cmmd", "precision", "recall", "density", "coverage"):
            evaluate.METRICS[name][0](joint, draws)

    for what, against, ours in (
        (
            f"Fréchet distance from features, {N} + {N} of {D}",
            "pytorch-fid",
            lambda: metrics.frechet(real, fake),
        ),
        ("999 permutations of seven distances", "one of pytorch-fid's distances", permuted),
    ):
        yield (
            what,
            against,
            alternate(what, ours, lambda: calculate_frechet_distance(*parts), args.pairs),
        )


def bench_images(args, place):
    """All pairs of images, LPIPS (alex, 64 px) and SSIM (128 px, the 20 best of each exactly)."""
    import lpips
    import numpy as np
    import torch
    from skimage.metrics import structural_similarity

    import metrics

    pixels = torch.randint(
        0, 255, (2 * N, 3, 8, 8), generator=torch.Generator().manual_seed(0)
    ).float()
    pixels = (
        torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic").clamp(0, 255).byte()
    )
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {name.split(".", 1)[1]: value for name, value in theirs.net.state_dict().items()}
    network = dict(
        name="alex",
        trunk=metrics.trunk_of("alexnet", state),
        indices=metrics.LPIPS["alex"][1],
        weights=[theirs.state_dict()[f"lin{n}.model.1.weight"][0] for n in range(5)],
    )
    small = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="area").byte()

    @torch.inference_mode()
    def loop():
        for n in range(40):
            theirs(small[n : n + 1] / 127.5 - 1, small[N + n : N + n + 1] / 127.5 - 1)

    what, count = f"LPIPS of {N} × {N} pairs (ours: of all {2 * N} × {2 * N})", N * N
    yield (
        what,
        "a loop over lpips",
        alternate(
            what, lambda: metrics.lpips_matrix(small, network, "cpu"), loop, args.pairs, count / 40
        ),
    )

    def nearest():
        order = np.argsort(-metrics.ssim_matrix(pixels[N:], pixels[:N]), axis=1)[:, :20]
        for n in range(N):
            metrics.ssim(pixels[N + n].expand(20, -1, -1, -1) / 255, pixels[order[n]] / 255)

    def slow():
        for n in range(10):
            structural_similarity(
                *(pixels[k].numpy() / 255 for k in (n, N + n)),
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1.0,
                channel_axis=0,
            )

    what = f"nearest image by SSIM, {N} × {N}"
    yield what, "a loop over scikit-image", alternate(what, nearest, slow, args.pairs, count / 10)


# ---- whole scripts


def bench_evaluation(args, place, count=64):
    """evaluate.py, its cache empty, against three packages on the same folders with the same random Inception."""
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

    real, fake, weights = str(place / "real"), str(place / "fake"), str(place / "inception.pth")
    for seed, folder in enumerate((real, fake)):
        make_images(Path(folder), count, 128, seed)
    torch.manual_seed(0)
    torch.save(
        Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(), weights
    )
    net = torch.nn.Module()
    net.forward, net.num_features = metrics.load_features(weights, "cpu")["function"], D

    def ours(*flags):
        metrics.CACHE = Path(tempfile.mkdtemp(dir=place))
        with typed(
            evaluate,
            real,
            fake,
            "--features",
            weights,
            "--lpips",
            "random",
            "--device",
            "cpu",
            "--out",
            place / "report.html",
            *flags,
        ) as given:
            evaluate.main(given)

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
        fid.compute_fid(
            fake,
            real,
            custom_feat_extractor=lambda x: net(x.round().byte()),
            num_workers=0,
            device="cpu",
            verbose=False,
        )

    @torch.no_grad()
    def with_torchmetrics():
        for measure in (
            FrechetInceptionDistance(net),
            KernelInceptionDistance(net, subset_size=50),
        ):
            for folder in (real, fake):
                images = [
                    np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))
                ]
                for part in torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).split(32):
                    measure.update(part, real=folder == real)
            measure.compute()

    three = "fid,kid,inception-score"
    for flags, peer, theirs in (
        ([], f"torch-fidelity, {three}", with_torch_fidelity),
        (["--metrics", three], "torch-fidelity", with_torch_fidelity),
        (["--metrics", "fid,kid"], "torchmetrics", with_torchmetrics),
        (["--metrics", "fid"], "clean-fid", with_clean_fid),
    ):
        what = f"evaluate.py {' '.join(flags) or 'as by default'}, {count} + {count} images"
        yield what, peer, alternate(what, lambda: ours(*flags), theirs, args.pairs)


def bench_filtering(args, place, count=100):
    """filter.py by all its scores, against the loop over pairs that people write, timed on 20 pairs."""
    import lpips
    import torch
    from skimage.metrics import structural_similarity

    import filter
    import metrics

    folders, network = (
        (place / "real", place / "new"),
        lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False),
    )
    for seed, folder in enumerate(folders):
        make_images(folder, count, 64, seed)
    pixels = [metrics.load_pixels(metrics.list_images(folder), 64)[1] for folder in folders]

    def ours():  # limits that most images pass, so that they are copied too
        metrics.CACHE = Path(tempfile.mkdtemp(dir=place))
        with typed(
            filter,
            folders[1],
            "--reference",
            folders[0],
            "--lpips",
            "random",
            "--max-lpips",
            9,
            "--min-ssim",
            -1,
            "--calibrate",
            0.05,
            "--drop-copies",
            "--device",
            "cpu",
            "--out",
            tempfile.mkdtemp(dir=place),
        ) as flags:
            filter.main(flags)

    @torch.inference_mode()
    def theirs():
        for a, b in list(zip(*pixels))[:20]:
            network(a[None] / 127.5 - 1, b[None] / 127.5 - 1)
            structural_similarity(a.numpy(), b.numpy(), channel_axis=0)

    what = f"all of filter.py, the nearest of {count} for each of {count}, LPIPS (VGG, 64 px), SSIM and more"
    yield (
        what,
        "a loop over lpips and scikit-image",
        alternate(what, ours, theirs, args.pairs, count**2 / 20),
    )


# ---- growth


def command(script, *flags, processes=1):
    """(seconds, peak GB of one process) of a command as typed, its cache empty."""
    start = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [*start, str(ROOT / script), *map(str, flags), "--device", "cpu"],
            stdout=sys.stderr,
            env={**os.environ, "MEDLORA_CACHE": cache},
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{script} failed")
    return time.perf_counter() - began, used.ru_maxrss / 1e6


def bench_growth(args, place):
    """Rows of (what, size, seconds, GB): cost as images, pixels, rank and processes grow, with the tiny base."""

    def trained(name, *flags, processes=1):
        out = place / f"run-{name}"
        command(
            "train.py",
            "--base",
            "tiny",
            "--data",
            place / f"a{GROWTH['images'][0]}",
            "--val-split",
            0,
            "--val-samples",
            0,
            "--save-every",
            10**6,
            "--log-every",
            2,
            "--steps",
            10,
            "--out",
            out,
            *flags,
            processes=processes,
        )
        line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        return 1 / line["images_per_second"], line["memory"] / 1e3

    for count in GROWTH["images"]:
        for name in ("a", "b"):
            make_images(place / f"{name}{count}", count, 64, seed=name == "b")
        sets = [place / f"{name}{count}" for name in "ab"]
        trained_on = [
            "--base",
            "tiny",
            "--data",
            sets[0],
            "--resolution",
            64,
            "--steps",
            1,
            "--val-samples",
            0,
        ]
        filtered = [
            sets[1],
            "--reference",
            sets[0],
            "--calibrate",
            0.05,
            "--drop-copies",
            "--drop-duplicates",
        ]
        for script, flags in (
            ("train.py", trained_on),
            ("evaluate.py", sets),
            ("filter.py", filtered),
        ):
            yield (
                f"{script}, 64 px",
                f"{count} images",
                *command(script, *flags, "--out", place / f"{script}-{count}"),
            )
    for side in GROWTH["px"]:
        yield (
            "training, an image",
            f"{side} px",
            *trained(f"px{side}", "--resolution", side, "--batch-size", 4),
        )
    for rank in GROWTH["rank"]:
        cost = trained(f"rank{rank}", "--rank", rank, "--batch-size", 4)
        size = (place / f"run-rank{rank}" / "lora.safetensors").stat().st_size / 1e6
        yield "training, an image, 128 px", f"rank {rank}, {size:.1f} MB", *cost
    for count in GROWTH["processes"]:
        cost = trained(f"processes{count}", "--batch-size", 8 // count, processes=count)
        yield "training, an image, 128 px, batch 8 in all", f"{count} processes", *cost
        yield (
            "sample.py, 16 images of 10 steps",
            f"{count} processes",
            *command(
                "sample.py",
                "--base",
                "tiny",
                "--prompt",
                "a film",
                "--num-images",
                16,
                "--steps",
                10,
                "--out",
                place / f"drawn{count}",
                processes=count,
            ),
        )


BENCHES = {
    "training": [bench_training],
    "sampling": [bench_sampling],
    "reading": [bench_reading],
    "caching": [bench_caching],
    "numbers": [bench_distances, bench_images],
    "evaluation": [bench_evaluation],
    "filtering": [bench_filtering],
    "growth": [bench_growth],
}
PACKAGES = (
    "torch diffusers transformers peft pytorch-fid clean-fid torch-fidelity torchmetrics lpips scikit-image "
    "pillow"
).split()


def machine(args):
    """What it ran on, when, and with which packages."""
    import torch

    device = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    found = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return f"{time.strftime('%d %B %Y')}, {device}, {', '.join(found)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--what", choices=BENCHES, help="one of them alone (default: all but growth)"
    )
    parser.add_argument(
        "--peer-script", help="train_text_to_image_lora.py of a checkout of diffusers, for training"
    )
    parser.add_argument("--shape", choices=["tiny", *UNETS], default="tiny")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="of training, or of denoising")
    parser.add_argument("--images", type=int, default=16, help="to draw")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="fp32",
        help="of our training, and of both that draw",
    )
    parser.add_argument(
        "--peer-precision",
        choices=["no", "bf16"],
        default="no",
        help="the peer's --mixed_precision",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="our training with --compile")
    args = parser.parse_args()
    if args.what == "training" and not args.peer_script:
        parser.error("--what training needs --peer-script")
    if args.device == "cuda" and args.what not in ("training", "sampling", "caching"):
        parser.error(
            "--device cuda: give --what training, sampling or caching; the other peers run on the CPU"
        )
    names = (
        [args.what]
        if args.what
        else [
            name
            for name in BENCHES
            if name != "growth" and (name != "training" or args.peer_script)
        ]
    )
    with contextlib.redirect_stdout(sys.stderr):
        rows = []
        for bench in (each for name in names for each in BENCHES[name]):
            with tempfile.TemporaryDirectory() as place:
                rows += bench(args, Path(place))
    if args.what == "growth":
        rows = [
            (what, size, f"{seconds:.3g} s", f"{memory:.1f} GB")
            for what, size, seconds, memory in rows
        ]
    header = (
        ["what", "size", "time", "peak memory"]
        if args.what == "growth"
        else ["what", "against", "ratio"]
    )
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |")
    print(f"\n{machine(args)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
