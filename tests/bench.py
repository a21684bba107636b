"""How fast it is, as ratios against what people use, both run in turn on the same machine with the same weights.

    python tests/bench.py                                      drawing, reading and the numbers, on the CPU
    python tests/bench.py --peer-script diffusers/examples/text_to_image/train_text_to_image_lora.py
    python tests/bench.py --peer-script … --shape sd21 --resolution 128 --batch-size 8 --precision fp32
    python tests/bench.py --peer-script … --shape sd15 --resolution 512 --batch-size 4 --device cuda --compile
    python tests/bench.py --what sampling --shape sd15 --resolution 512 --device cuda

Training: the peer's script comes from a checkout of diffusers, which is no part of this repository; it needs accelerate
and peft. Its `datasets` package is replaced by a few lines that read a folder, where it is not installed. Both train a
rank-16 adapter on random images; seconds a step are the median after a warm-up. The others need diffusers, peft,
pytorch-fid (pip install --no-deps), lpips and scikit-image. A ratio is the median of alternating pairs; where the peer
is a loop over pairs of images, it is timed on some and scaled up.
"""
import argparse
import csv
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
WARM_UP = 2   # steps left out
N, D = 376, 2048   # of the numbers: images a set, features an image
sys.path[:0] = [str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"


# ---- the same work for both

def make_base(shape, resolution, folder):
    """A base with random weights: "tiny" the embedded one; "sd15" and "sd21" in the published configurations."""
    if shape == "tiny":
        return ROOT / "tests" / "tiny-base"
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tests" / "tiny-base" / "tokenizer")
    two = shape == "sd21"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=resolution // 8, cross_attention_dim=1024 if two else 768,
                                attention_head_dim=(5, 10, 20, 20) if two else 8, use_linear_projection=two)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=1024 if two else 768, intermediate_size=4096 if two else 3072, num_attention_heads=16 if two else 12,
        num_hidden_layers=23 if two else 12, hidden_act="gelu" if two else "quick_gelu"))
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
                        scaling_factor=0.18215, sample_size=resolution)
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                             set_alpha_to_one=False, steps_offset=1)
    for model in (unet, text_encoder, vae):
        model.half()
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, schedule, None, None,
                            requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_images(folder, count, resolution):
    """`count` random images with captions, in the form both read."""
    import numpy as np
    from PIL import Image
    folder.mkdir()
    draw, rows = np.random.RandomState(0), [["file_name", "text"]]
    for i in range(count):
        Image.fromarray(draw.randint(0, 255, (resolution, resolution, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append([f"{i}.png", f"a drawn image, number {i % 10}"])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ---- one run of each, in a process of its own

def watch_steps(report):
    """Note the time of every step (both advance a tqdm bar) and write times and peak memory to `report` at the end."""
    import atexit
    import tqdm
    import torch
    times, update = [], tqdm.std.tqdm.update

    def noted(bar, n=1):
        if bar.unit == "step" or bar.desc.startswith("Steps"):
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
            row = list.__getitem__(self, i)
            return {k: v[0] for k, v in self.transform({k: [v] for k, v in row.items()}).items()} if self.transform else row

    def load_dataset(*_, data_files=None, data_dir=None, **__):
        from PIL import Image
        folder = Path(data_dir or str(data_files["train"]).removesuffix("**"))
        with open(folder / "metadata.csv", newline="") as file:
            return {"train": Split({"image": Image.open(folder / r["file_name"]), "text": r["text"]} for r in csv.DictReader(file))}
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    module.load_dataset, module.utils = load_dataset, types.SimpleNamespace(logging=types.SimpleNamespace(
        set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None))
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
    ran = subprocess.run([sys.executable, __file__, "--child", report, script, *map(str, flags)], cwd=Path(script).parent,
                         capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
    if ran.returncode:
        sys.exit(f"{script} failed:\n{ran.stderr[-3000:]}")
    found = json.loads(Path(report).read_text())
    gaps = [b - a for a, b in zip(found["times"], found["times"][1:])]
    return statistics.median(gaps[WARM_UP:]), found["peak"]


def bench_training(args, place):
    """Seconds a step and peak memory of train.py and of the peer's script."""
    base = make_base(args.shape, args.resolution, place / "base")
    make_images(place / "images", 16, args.resolution)
    ours = ["--base", base, "--data", place / "images", "--resolution", args.resolution, "--batch-size", args.batch_size,
            "--steps", args.steps, "--precision", args.precision, "--device", args.device, "--val-split", 0,
            "--val-samples", 0, "--save-every", 10 ** 6, "--log-every", 10 ** 6] + ["--compile"] * args.compile
    peer = ["--pretrained_model_name_or_path", base, "--train_data_dir", place / "images", "--caption_column", "text",
            "--resolution", args.resolution, "--train_batch_size", args.batch_size, "--max_train_steps", args.steps,
            "--rank", 16, "--mixed_precision", args.peer_precision, "--checkpointing_steps", 10 ** 6, "--seed", 0]
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    ratios, memory = [], []
    for pair in range(args.pairs):
        a, a_peak = measure(str(ROOT / "train.py"), [*ours, "--out", place / f"ours-{pair}"], place / "a.json", {})
        b, b_peak = measure(os.path.abspath(args.peer_script), [*peer, "--output_dir", place / f"peer-{pair}"],
                            place / "b.json", on_cpu)
        ratios.append(b / a)
        memory.append(a_peak / b_peak)
        print(f"pair {pair}: ours {a:.3f} s a step, {a_peak / 1e6:.0f} MB; peer {b:.3f} s, {b_peak / 1e6:.0f} MB; "
              f"ratio {b / a:.2f}", flush=True)
    print(f"\ntraining, {args.shape} shape, {args.resolution} px, batch {args.batch_size}, ours {args.precision}"
          f"{' --compile' * args.compile}, peer {args.peer_precision}: {statistics.median(ratios):.2f} × the peer's images a "
          f"second ({min(ratios):.2f} to {max(ratios):.2f}), {statistics.median(memory):.2f} × its memory; {machine(args)}")


def machine(args):
    """What it ran on."""
    import torch
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"torch {torch.__version__}, {device}"


# ---- drawing

def make_adapter(base, path):
    """A rank-16 adapter of the attention layers with random weights."""
    import torch
    import lora
    import sample
    loaded = sample.load_base(base, torch.device("cpu"), "fp32")
    weights = lora.inject(loaded.unet, "attention", 16, 16, generator=sample.generator(0, "bench"))
    for weight in weights.values():
        weight.data = 0.01 * torch.randn(weight.shape, generator=sample.generator(0, "bench", tuple(weight.shape)))
    lora.save(path, weights, {"rank": 16, "alpha": 16, "base": base})


def draw_ours(base, prompts, args, batch_size):
    import sample
    return list(sample.generate(base, [(p, i) for i, p in enumerate(prompts)], args.steps, 7.5, "ddim", args.resolution,
                                args.resolution, batch_size=batch_size))


def draw_theirs(pipe, prompts, args, batch_size):
    images = []
    for i in range(0, len(prompts), batch_size):
        images += pipe(prompts[i:i + batch_size], num_inference_steps=args.steps, guidance_scale=7.5, height=args.resolution,
                       width=args.resolution).images
    return images


def compare(name, ours, theirs, args):
    """Alternate the two, print each pair and return the median ratio in words."""
    def seconds(draw):
        start = time.perf_counter()
        assert len(draw()) == args.images
        return time.perf_counter() - start
    seconds(ours), seconds(theirs)   # warm
    ratios = []
    for pair in range(args.pairs):
        took = {draw: seconds(draw) for draw in ((ours, theirs) if pair % 2 == 0 else (theirs, ours))}
        ratios.append(took[theirs] / took[ours])
        print(f"{name}, pair {pair}: ours {args.images / took[ours]:.3f} images/s, theirs {args.images / took[theirs]:.3f}; "
              f"ratio {ratios[-1]:.2f}", flush=True)
    return f"{name}: {statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"


def bench_sampling(args, place):
    """Images a second from text to picture: in one --precision and batch size, and as either is run by default (ours in
    --precision auto by 8, theirs in fp32 one prompt a call)."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    import lora
    import sample
    device, found = torch.device(args.device), []
    folder = str(make_base(args.shape, args.resolution, Path(place, "base")))
    adapter = Path(place, "lora.safetensors")
    make_adapter(folder, adapter)
    prompts = [f"a drawn image, number {i % 4}" for i in range(args.images)]
    one = args.precision if args.precision != "auto" else "fp32"
    for name, precision, peer_precision, sizes in (
            (f"both in {one}", one, {"fp32": "float32", "bf16": "bfloat16"}[one], (args.batch_size, args.batch_size)),
            ("as by default", "auto", "float32", (8, 1))):
        base = sample.load_base(folder, device, precision)
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None,
                                                       torch_dtype=getattr(torch, peer_precision)).to(device)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(place, weight_name=adapter.name)
        with lora.merged(base.parts(), [(lora.load(adapter)[0], 1.0)]):   # once a command, as loading it into theirs
            found.append(compare(name, lambda: draw_ours(base, prompts, args, sizes[0]),
                                 lambda: draw_theirs(pipe, prompts, args, sizes[1]), args))
    print(f"\nsampling, {args.shape} shape, {args.resolution} px, {args.images} images of {args.steps} steps, against "
          f"StableDiffusionPipeline: {'; '.join(found)}; {machine(args)}")


# ---- reading

def bench_reading(count, place):
    """Print how fast grey films become pixels, against threads of plain Pillow that decode and resize them."""
    from concurrent.futures import ThreadPoolExecutor
    import numpy as np
    import torch
    from PIL import Image
    from metrics import list_images, load_pixels
    place.mkdir()
    draw = np.random.RandomState(0)
    for n in range(count):
        film = Image.fromarray(draw.randint(0, 256, (24, 24)).astype(np.uint8)).resize((1024, 1024))
        noisy = np.asarray(film) // 2 + draw.randint(0, 12, (1024, 1024))
        Image.fromarray(noisy.astype(np.uint8)).save(Path(place, f"{n:04}.png"))
    rows, pixels = list_images(place), torch.empty(count, 3, 512, 512, dtype=torch.uint8)

    def plain(n):
        with Image.open(rows[n]["path"]) as film:
            pixels[n] = torch.from_numpy(np.array(film.resize((512, 512), Image.Resampling.LANCZOS)))
    wall, work = [], []
    for start in range(0, count, 25):   # in turn, so that whatever else the machine does slows both
        times = [(time.perf_counter(), time.process_time())]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(plain, range(start, min(start + 25, count))))
        times.append((time.perf_counter(), time.process_time()))
        assert torch.equal(load_pixels(rows[start:start + 25], 512)[1], pixels[start:start + 25])
        times.append((time.perf_counter(), time.process_time()))
        first, second, third = times
        wall.append((second[0] - first[0]) / (third[0] - second[0]))
        work.append((second[1] - first[1]) / (third[1] - second[1]))
    print(f"reading, {count} grey PNG films of 1024 px to 512: {statistics.median(wall):.2f} × plain Pillow's speed, "
          f"{statistics.median(work):.2f} × by processor time; {os.cpu_count()} cores")


# ---- the numbers

def best_seconds(function, repeats=3):
    """Of the best of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def pool3_like(count, seed):
    """Rectified Gaussians, as pool3 features look."""
    import numpy as np
    return np.random.RandomState(seed).randn(count, D).clip(0)


def row(name, ours, theirs, note=""):
    print(f"{name}: {theirs / ours:.2f} × (ours {ours:.3f} s, theirs {theirs:.2f} s{note})", flush=True)


def bench_distances():
    """Frechet alone, and 999 permutations of seven numbers, against pytorch-fid's distance."""
    import numpy as np
    import metrics
    from pytorch_fid.fid_score import calculate_frechet_distance
    real, fake = pool3_like(N, 0), pool3_like(N, 1)
    parts = [part for x in (real, fake) for part in (x.mean(0), np.cov(x, rowvar=False))]
    theirs = best_seconds(lambda: calculate_frechet_distance(*parts), 1)
    row("Frechet from features, 376 + 376, d = 2048", best_seconds(lambda: metrics.frechet(real, fake)), theirs)

    def permuted():
        joint = metrics.joint_matrices(real, fake, False)
        draws = metrics.permutation_draws(N, N, 999, 0)
        for name in ("frechet", "kid", "cmmd", "precision", "recall", "density", "coverage"):
            metrics.METRICS[name][0](joint, draws)
    row("999 permutations of seven numbers", best_seconds(permuted, 1), theirs)


def bench_images():
    """All pairs of 376 x 376 images, LPIPS (alex, 64 px) and SSIM (128 px, the 20 best of each exactly)."""
    import numpy as np
    import torch
    import metrics
    import lpips
    from skimage.metrics import structural_similarity
    pixels = torch.randint(0, 255, (2 * N, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    pixels = torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic").clamp(0, 255).byte()
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = {name.split(".", 1)[1]: value for name, value in theirs.net.state_dict().items()}
    network = dict(name="alex", trunk=metrics.trunk_of("alexnet", state), indices=metrics.LPIPS["alex"][1],
                   weights=[theirs.state_dict()[f"lin{n}.model.1.weight"][0] for n in range(5)])
    small = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="area").byte()

    def loop():
        with torch.inference_mode():
            for n in range(40):
                theirs(small[n:n + 1] / 127.5 - 1, small[N + n:N + n + 1] / 127.5 - 1)
    row("LPIPS, 376 x 376 pairs (ours: 752 x 752)", best_seconds(lambda: metrics.lpips_matrix(small, network, "cpu"), 1),
        best_seconds(loop) * N * N / 40, ", their loop timed on 40 pairs")

    def nearest():
        order = np.argsort(-metrics.ssim_matrix(pixels[N:], pixels[:N]), axis=1)[:, :20]
        for n in range(N):
            metrics.ssim(pixels[N + n].expand(20, -1, -1, -1) / 255, pixels[order[n]] / 255)
    one, other = (pixels[n].permute(1, 2, 0).numpy() / 255 for n in (0, N))
    slow = best_seconds(lambda: structural_similarity(one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                                 data_range=1.0, channel_axis=2))
    row("SSIM, nearest of 376 for each of 376", best_seconds(nearest, 1), slow * N * N, ", their loop timed on one pair")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["training", "sampling", "reading", "numbers"], help="one of them alone")
    parser.add_argument("--peer-script", help="train_text_to_image_lora.py of a checkout of diffusers: training alone")
    parser.add_argument("--shape", choices=["tiny", "sd15", "sd21"], default="tiny")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="of training, or of denoising")
    parser.add_argument("--images", type=int, default=16, help="to draw")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32", help="of our training, and of both "
                        "that draw")
    parser.add_argument("--peer-precision", choices=["no", "bf16"], default="no", help="the peer's --mixed_precision")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="our training with --compile")
    args = parser.parse_args()
    args.what = args.what or ("training" if args.peer_script else None)
    if args.what == "training" and not args.peer_script:
        parser.error("--what training needs --peer-script")
    with tempfile.TemporaryDirectory() as place:
        if args.what == "training":
            bench_training(args, Path(place))
        if args.what in (None, "sampling"):
            bench_sampling(args, Path(place))
        if args.what in (None, "reading"):
            bench_reading(500, Path(place, "films"))
        if args.what in (None, "numbers"):
            bench_distances()
            bench_images()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
