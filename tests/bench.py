"""How fast it is, as ratios against what people use, both run in turn on the same machine with the same weights.

    python tests/bench.py --peer-script diffusers/examples/text_to_image/train_text_to_image_lora.py
    python tests/bench.py --peer-script … --shape sd21 --resolution 128 --batch-size 8 --precision fp32
    python tests/bench.py --peer-script … --shape sd15 --resolution 512 --batch-size 4 --device cuda

The peer's script comes from a checkout of diffusers, which is no part of this repository; it needs accelerate and peft.
Its `datasets` package is replaced by a few lines that read a folder, where it is not installed. Both train a rank-16
adapter on random images; seconds a step are the median after a warm-up, and the ratio is the median of the pairs.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-script", required=True, help="train_text_to_image_lora.py of a checkout of diffusers")
    parser.add_argument("--shape", choices=["tiny", "sd15", "sd21"], default="tiny")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32", help="of ours")
    parser.add_argument("--peer-precision", choices=["no", "bf16"], default="no", help="the peer's --mixed_precision")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    args = parser.parse_args()
    import torch
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
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
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"\ntraining, {args.shape} shape, {args.resolution} px, batch {args.batch_size}, ours {args.precision}"
          f"{' --compile' * args.compile}, peer {args.peer_precision}: {statistics.median(ratios):.2f} × the peer's images a "
          f"second ({min(ratios):.2f} to {max(ratios):.2f}), {statistics.median(memory):.2f} × its memory; "
          f"torch {torch.__version__}, {device}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
