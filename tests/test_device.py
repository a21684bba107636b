"""Which device a process takes, what lies in whose memory, and what reaches a GPU in a step."""

import argparse
import json
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_parts
from diffusers import UNet2DConditionModel
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_a
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import sample
import train
from metrics import Row, generator, less_memory, load_pixels, pick_device, run_script
from sample import Settings

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
NOWHERE = torch.device("meta")  # stands in for a GPU: another device than the CPU


# ---------------------------------------------------------------- the device of a process


@pytest.fixture
def gpus(monkeypatch):
    """gpus(free, …): torch sees GPUs with so many free bytes, of which a full one (None) fails."""

    def pretend(*free):
        def memory(gpu):
            amount = free[int(gpu.split(":")[1])]
            if amount is None:
                raise RuntimeError("CUDA error: out of memory")
            return amount, 10

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)

    return pretend


def test_a_gpu_has_a_number_for_set_device_takes_no_other(gpus):
    gpus(5)
    assert pick_device("cuda") == GPU
    assert pick_device("auto") == GPU


def test_the_gpu_with_most_free_memory_is_taken_and_a_full_one_is_no_error(gpus):
    gpus(None, 5, 7, 6)
    assert pick_device("auto") == torch.device("cuda", 2)
    assert pick_device("cuda") == torch.device("cuda", 2)
    assert pick_device("cuda:3") == torch.device("cuda", 3)


def test_where_there_is_one_gpu_it_is_not_looked_at(gpus, monkeypatch):
    gpus(5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: pytest.fail("was looked at"))
    assert pick_device("auto") == GPU


@pytest.mark.parametrize("visible, number", [((5, 5), 1), ((5,), 0)])
def test_each_process_takes_a_gpu_of_its_own_also_where_it_sees_a_single_one(
    visible, number, gpus, monkeypatch
):
    gpus(*visible)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("auto", "cuda"):
        assert pick_device(name) == torch.device("cuda", number)


def test_a_device_that_is_not_there_is_refused_with_advice(gpus, capsys):
    gpus()
    assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    for name in ("cuda", "cuda:99", "gpu", "mps"):
        with pytest.raises(SystemExit):
            pick_device(name)
        line = capsys.readouterr().err
        assert "this machine has cpu; if nvidia-smi shows more, update the driver" in line
        assert f"(torch.version.cuda: {torch.version.cuda})" in line


@pytest.fixture
def torch_settings(monkeypatch):
    """Put back afterwards what start_processes sets."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(strict, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("has_nccl, backend", [(True, "nccl"), (False, "gloo")])
def test_gpus_talk_by_gloo_where_there_is_no_nccl(
    has_nccl, backend, gpus, torch_settings, monkeypatch
):
    backends = []
    devices = []
    gpus(5)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "fresh_store", lambda: None)
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(train.dist, "init_process_group", lambda name, **how: backends.append(name))

    train.start_processes(SimpleNamespace(device="cuda"))

    assert backends == [backend]
    assert devices == [GPU]


def test_training_on_a_gpu_allows_only_kernels_that_add_in_one_order_and_fills_no_memory(
    gpus, torch_settings, monkeypatch
):
    gpus(5)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    train.start_processes(SimpleNamespace(device="cuda"))

    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


# ---------------------------------------------------------------- bases and runs


@pytest.fixture(scope="module")
def loaded(base):
    return sample.load_base(base, CPU)


def changed_schedule(folder, target, **values):
    """A copy of a base whose scheduler has other settings; returns its folder."""
    shutil.copytree(folder, target)
    path = Path(target, "scheduler", "scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(target)


@pytest.fixture(scope="module")
def zero_snr(base, tmp_path_factory):
    """A v-prediction base that ends in pure noise."""
    target = tmp_path_factory.mktemp("zero-snr") / "base"
    values = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return sample.load_base(changed_schedule(base, target, **values), CPU)


@pytest.fixture
def parsed(base, images, monkeypatch):
    """parsed(flag, …): the flags of a small run, and the rows of its data set."""

    def parse(*more):
        flags = ["--base", base, "--data", images, "--prompt", "a {label} foot", "--rank", 2]
        flags += ["--val-split", 0, "--resolution", 64, *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        args = train.parse_args()
        rows = train.list_data(args)
        return train.with_defaults(args, rows, sample.find_base(args.base)), rows

    return parse


@pytest.fixture
def prepared(parsed):
    """prepared(flag, …): (args, base, streams, state) of such a run before its first step."""

    def prepare(*more):
        args, rows = parsed(*more)
        loaded = train.prepare_base(args, CPU)
        weights = train.trainable_weights(loaded, args)
        streams, _ = train.load_data(loaded, rows, args)
        return args, loaded, streams, train.start(loaded, weights, args, {})

    return prepare


def fake_base(dtype=torch.bfloat16, **unet_flags):
    """A small sample.Base on a GPU that need not be there. Call it within a FakeTensorMode."""
    with GPU:
        vae, text_encoder, tokenizer, unet, scheduler, _ = tiny_parts(**unet_flags)
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel.from_config(unet.config)
        torch.set_default_dtype(torch.float32)
    for model in (vae, text_encoder, unet):
        model.eval().requires_grad_(False)
    return sample.Base(
        name="fake",
        unet=unet,
        vae=vae,
        text_encoders=[text_encoder],
        tokenizers=[tokenizer],
        schedule={**scheduler.config},
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000, device=GPU),
        device=GPU,
        dtype=dtype,
        resolution=64,
        zero_empty=False,
        text_length=77,
    )


@pytest.fixture
def fake_gpu(monkeypatch):
    """A mode in which tensors have sizes and a device, and no content."""

    def attend(query, key, value, **how):  # on a GPU a single kernel, which is not there
        return query.clone()

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    sample.whole_images.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    sample.whole_images.cache_clear()


# ---------------------------------------------------------------- memory


class SmallVAE:
    """A VAE that notes how many images it gets at once."""

    config = SimpleNamespace(scaling_factor=0.5)
    dtype = torch.float32

    def __init__(self):
        self.counts = []

    def encode(self, images):
        self.counts.append(len(images))
        small = F.avg_pool2d(images, 8)
        distribution = SimpleNamespace(mean=small, std=small.abs())
        return SimpleNamespace(latent_dist=distribution)

    def decode(self, latents):
        self.counts.append(len(latents))
        return SimpleNamespace(sample=F.interpolate(latents[:, :3], scale_factor=8))


def test_the_vae_encodes_a_megapixel_at_once(loaded):
    vae = SmallVAE()
    base = replace(loaded, vae=vae)
    pixels = torch.randint(0, 256, (5, 3, 512, 512), dtype=torch.uint8)

    mean, std = sample.encode(base, pixels)

    assert vae.counts == [4, 1]
    expected = F.avg_pool2d(pixels / 127.5 - 1, 8) * 0.5
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(std, expected.abs())


def test_the_vae_decodes_a_megapixel_at_once_and_a_larger_image_alone(loaded):
    vae = SmallVAE()
    base = replace(loaded, vae=vae)
    latents = torch.rand(3, 4, 64, 128) - 0.5
    large = torch.rand(2, 4, 160, 160) - 0.5

    pixels = sample.decode(base, latents)
    sample.decode(base, large)

    assert vae.counts == [2, 1, 1, 1]
    expected = F.interpolate(latents[:, :3] / 0.5, scale_factor=8) * 127.5 + 127.5
    assert torch.equal(pixels, expected.round().clamp(0, 255).to(torch.uint8))


def test_the_unet_comes_to_the_device_after_the_latents(parsed, monkeypatch, tmp_path):
    events = []
    move = UNet2DConditionModel.to
    load_data = train.load_data

    def noting_move(unet, *where, **how):
        if CPU in where:
            events.append("UNet")
        return move(unet, *where, **how)

    def noting_load(*how):
        events.append("latents")
        return load_data(*how)

    monkeypatch.setattr(UNet2DConditionModel, "to", noting_move)
    monkeypatch.setattr(train, "load_data", noting_load)
    monkeypatch.setattr(train, "fit", lambda *_: events.append("steps"))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    args, _ = parsed("--out", tmp_path)

    train.run(args, CPU)

    assert events == ["latents", "UNet", "steps"]


def test_latents_are_in_host_memory(parsed, loaded, monkeypatch):
    def encode(base, pixels):
        return torch.zeros(2, len(pixels), 4, 8, 8).unbind()

    monkeypatch.setattr(train, "encode", encode)
    monkeypatch.setattr(train, "encode_captions", lambda *_: {})
    args, rows = parsed()

    streams, _ = train.load_data(replace(loaded, device=NOWHERE), rows, args)

    for values in (streams[0].mean, streams[0].std, streams[0].caption, streams[0].weight):
        assert values.device == CPU


def test_captions_are_in_host_memory_in_the_precision_of_the_base(parsed, fake_gpu):
    args, rows = parsed()
    base = fake_base()

    text = train.encode_captions(base, ["a calm foot", "a sore foot", ""], args)

    assert text["encoder_hidden_states"].shape == (3, 77, 32)
    assert text["encoder_hidden_states"].dtype == torch.bfloat16
    assert text["encoder_hidden_states"].device == CPU


@pytest.mark.parametrize("ema, is_shared", [(0, True), (0.99, False)])
def test_without_averages_none_are_kept(ema, is_shared, prepared):
    *_, state = prepared("--ema", ema)

    for name, weight in state.weights.items():
        assert (state.ema[name].data_ptr() == weight.data_ptr()) == is_shared


def test_gradients_are_summed_in_buckets(monkeypatch):
    sizes = []

    def all_reduce(tensor):
        sizes.append(tensor.numel())
        tensor *= 2

    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "BUCKET", 100)
    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    weights = {}
    for n, size in enumerate([(30,), (5, 14), (40,), (250,), (7,)]):
        weights[str(n)] = torch.zeros(size)
        weights[str(n)].grad = torch.full(size, float(n))

    numbers = train.sum_over_processes(torch.tensor(3.0), 1, SimpleNamespace(weights=weights))

    assert numbers.tolist() == [6, 2]
    for n, weight in enumerate(weights.values()):
        assert torch.equal(weight.grad, torch.full_like(weight, 2.0 * n))
    assert sum(sizes) == 2 + 30 + 70 + 40 + 250 + 7
    assert max(sizes) <= 100 + 250  # a bucket, and the largest gradient
    assert len(sizes) > 1


def test_the_computed_memory_is_that_of_the_tensors_alive():
    with FakeTensorMode():
        layer = torch.nn.Linear(256, 1024, bias=False)  # 1 MB
        with fits.Memory(layer) as memory:
            x = torch.zeros(1024, 256)  # 1 MB
            y = layer(x).view(-1)  # 4 MB
            assert memory.bytes == 6 * 2**20
            y = y.square().sum()  # another 4 MB for a moment; autograd keeps the first
            assert memory.peak == 10 * 2**20 + 4  # the sum itself
            y.backward()
            del x, y
            assert memory.bytes == 2 * 2**20  # the layer and its gradient


@pytest.mark.slow
def test_what_should_fit_a_card_does_so_by_computation():
    assert fits.peak_of(fits.cache, "sdxl", 1024) < 12 - fits.LEFT
    assert fits.peak_of(fits.draw_grid, "sd21", 768, 8) < 12 - fits.LEFT
    assert fits.peak_of(fits.draw, "sdxl", 1024, 8) < 16 - fits.LEFT


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd15", "sd21-base", "sd21", "sdxl"])
def test_the_memory_that_readme_gives_is_the_computed_one(base):
    text = (fits.ROOT / "README.md").read_text()
    row = re.search(rf"^\| `{base}`.*? (\d+) px \| (\S+?)–(\S+) ", text, re.MULTILINE)
    resolution, least, most = row.groups()
    where = fits.train_adapter, base.removesuffix("-base"), int(resolution)
    peaks = [fits.peak_of(*where, 1, "--gradient-checkpointing"), fits.peak_of(*where, 8)]
    assert peaks == pytest.approx([float(least), float(most)], rel=0.05)


# ---------------------------------------------------------------- when memory is full

FULL = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.76 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",  # as cuDNN 9 calls it
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nFailed to CUDA calloc 6 bytes",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried",
    "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried",
]


@pytest.mark.parametrize("message", FULL)
def test_full_memory_is_one_line_whoever_says_it(message, handlers, capsys):
    def main(args):
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as stop:
        run_script(main, lambda: argparse.Namespace(batch_size=4))

    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the memory is full: try a smaller --batch-size\n"


def test_an_error_of_a_gpu_that_is_no_lack_of_memory_stays_a_traceback(handlers):
    def main(args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError):
        run_script(main, argparse.Namespace)


def advice(script, *flags):
    """What less_memory says to a command, as one text."""
    argv = sys.argv
    sys.argv = [script.__name__, *map(str, flags)]
    try:
        return ", ".join(less_memory(script.parse_args()))
    finally:
        sys.argv = argv


def test_only_flags_that_would_help_this_command_are_named(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    data = ["--data", images]
    smaller = "a smaller --batch-size, a smaller --resolution"
    assert advice(train, *data) == f"{smaller}, --gradient-checkpointing"
    done = ["--batch-size", 1, "--gradient-checkpointing"]
    assert advice(train, *data, *done) == "a smaller --resolution"
    assert advice(train, *data, *done, "--precision", "fp32").endswith("--precision bf16")

    full = [*data, *done, "--method", "full"]
    assert advice(train, *full).endswith("--optimizer adamw8bit, --ema 0")
    full += ["--optimizer", "adamw8bit"]
    assert advice(train, *full) == "a smaller --resolution, --ema 0"
    assert advice(train, *full, "--ema", 0) == "a smaller --resolution"

    smaller = "a smaller --height and --width"
    assert advice(sample) == f"a smaller --batch-size, {smaller}, --low-memory"
    assert advice(sample, "--low-memory", "--batch-size", 1) == smaller


# ---------------------------------------------------------------- the ends of schedules


@pytest.mark.parametrize("scheduler", [name for name in sample.SCHEDULERS if name != "pndm"])
@pytest.mark.parametrize("steps", [1, 20, 50])
def test_where_the_schedule_ends_in_noise_drawing_starts_there(scheduler, steps, zero_snr):
    settings = Settings(steps=steps, scheduler=scheduler)
    assert sample.make_scheduler(zero_snr, settings).timesteps[0] == 999


def test_where_the_schedule_ends_in_noise_its_end_is_learnt(zero_snr):
    latents = torch.zeros(2, 4, 8, 8)
    timesteps = torch.tensor([999, 500])
    weight = sample.noised_and_target(zero_snr, latents, latents, timesteps, 5.0)[2]
    assert 0 < weight[0] < weight[1]


def test_timesteps_that_repeat_are_no_hindrance(zero_snr):
    schedule = {**zero_snr.schedule, "use_karras_sigmas": True}
    base = replace(zero_snr, schedule=schedule)
    settings = Settings(steps=25, scheduler="dpm")
    timesteps = sample.make_scheduler(base, settings).timesteps
    assert (timesteps == timesteps[0]).sum() > 1

    assert len(list(sample.generate(base, [("a foot", 0)], settings))) == 1


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_a_cosine_schedule_draws(scheduler, base, tmp_path):
    values = dict(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    cosine = sample.load_base(changed_schedule(base, tmp_path / "base", **values), CPU)
    settings = Settings(steps=6, scheduler=scheduler)

    images = list(sample.generate(cosine, [("a foot", 0), ("a foot", 1)], settings))

    assert len(images) == 2  # generate ends where latents are not finite
    for image in images:
        assert np.asarray(image).std() > 1


# ---------------------------------------------------------------- what SDXL is told of an image


def row_of(width, height):
    row = Row("", "a.png", "")
    row.size = (width, height)
    return row


def test_sdxl_is_told_the_size_and_the_crop_of_the_image():
    args = SimpleNamespace(resolution=512, crop="center", seed=0)
    # 800 x 600 becomes 683 x 512, of whose width (683 - 512) / 2 = 85 are cut on the left
    assert train.image_sizes(row_of(800, 600), 0, args) == [600, 800, 0, 85, 512, 512]
    # 300 x 900 becomes 512 x 1536, of whose height (1536 - 512) / 2 = 512 are cut at the top
    assert train.image_sizes(row_of(300, 900), 0, args) == [900, 300, 512, 0, 512, 512]
    args.crop = "pad"
    assert train.image_sizes(row_of(800, 600), 0, args) == [600, 800, 0, 0, 512, 512]


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_the_corner_of_a_random_crop_is_the_one_that_was_cut(variant, tmp_path):
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(50, 0)  # a column's grey is its number
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    row = Row(str(tmp_path / "ramp.png"), "ramp.png", "")
    args = SimpleNamespace(resolution=50, crop="random", seed=3)
    seed = (3, variant) if variant else 3

    pixels = load_pixels([row], 50, "random", seed=seed)[1]

    left = train.image_sizes(row, variant, args)[3]
    assert abs(left - pixels[0, 0, 25, 0].item()) <= 1


def test_the_sizes_reach_the_unet_of_sdxl(sdxl, monkeypatch):
    base = sample.load_base(sdxl, CPU)
    cond = sample.encode_text(base, ["x", "y"])
    sizes = torch.tensor([[600, 800, 0, 85, 512, 512], [64, 64, 0, 0, 64, 64]])
    seen = []

    def forward(noisy, timesteps, added_cond_kwargs, encoder_hidden_states, **_):
        seen.append(added_cond_kwargs["time_ids"])
        return (noisy,)

    monkeypatch.setattr(base.unet, "forward", forward)
    sample.denoise(base, torch.zeros(2, 4, 8, 8), torch.tensor([5, 6]), cond | {"time_ids": sizes})
    assert torch.equal(seen[0], sizes)


def test_the_sizes_of_each_image_reach_its_batch(prepared):
    args, loaded, streams, _ = prepared("--batch-size", 4)
    batch = train.make_batch(streams, loaded.num_timesteps, 0, range(4), args)
    assert batch.sizes.tolist() == [[64, 70, 0, 3, 64, 64]] * 4  # the images are 70 x 64


# ---------------------------------------------------------------- fp16


def test_fused_attention_in_fp16_keeps_products_beyond_its_range():
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 50, 64, generator=draw)
    query = 60 + query  # the products exceed 65504, the largest number of fp16
    key = 60 + key
    half = [states.half() for states in (query, key, value)]
    assert (half[0] @ half[1].transpose(-1, -2)).isinf().any()

    attended = F.scaled_dot_product_attention(*half)

    exact = F.scaled_dot_product_attention(*(states.double() for states in half))
    assert attended.isfinite().all()
    torch.testing.assert_close(attended.double(), exact, rtol=0.02, atol=0.02)


def test_attention_is_torchs_fused_one(loaded):
    kinds = {type(processor).__name__ for processor in loaded.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


def test_sd21_may_be_in_fp16(sd21, monkeypatch):
    base = sample.load_base(sd21, CPU, "fp16")
    assert base.unet.dtype == torch.float16
    images = list(sample.generate(base, [("a foot", 0)], Settings(steps=2)))
    assert len(images) == 1

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert sample.pick_dtype("auto", GPU, sd21) == torch.float16


# ---------------------------------------------------------------- what reaches the GPU


def test_the_noise_of_euler_a_is_drawn_ahead_and_the_same_to_the_bit(loaded, monkeypatch):
    settings = Settings(steps=4, scheduler="euler_a", guidance_scale=1.0)
    cond = sample.encode_text(loaded, ["a foot", "a foot"])
    noise = torch.randn(2, 4, 8, 8)

    def fresh_generators():
        return [generator(0, "sample", "a foot", i) for i in range(2)]

    generators = fresh_generators()
    ahead = [noise]
    for _ in range(4):
        ahead.append(torch.stack([torch.randn(4, 8, 8, generator=own) for own in generators]))
    with torch.no_grad():
        drawn = sample.generate_batch(loaded, torch.stack(ahead), (cond, cond), settings)
        assert euler_a.randn_tensor is randn_tensor  # others use diffusers, too

        scheduler = sample.make_scheduler(loaded, settings)
        generators = fresh_generators()
        latents = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents, t)
            prediction = sample.denoise(loaded, noisy, t, cond)
            latents = scheduler.step(prediction, t, latents, generator=generators).prev_sample
    assert torch.equal(drawn, latents)


def test_the_steps_of_euler_a_draw_nothing(loaded, monkeypatch):
    events = []
    drawing = torch.randn
    denoising = sample.denoise

    def noting_randn(*size, **how):
        events.append("draw")
        return drawing(*size, **how)

    def noting_denoise(*inputs):
        events.append("denoise")
        return denoising(*inputs)

    monkeypatch.setattr(torch, "randn", noting_randn)
    monkeypatch.setattr(sample, "denoise", noting_denoise)
    settings = Settings(steps=5, scheduler="euler_a")
    list(sample.generate(loaded, [("a foot", 0)], settings))
    assert events == ["draw"] * 6 + ["denoise"] * 5


class Calls(TorchDispatchMode):
    """Counts what a GPU is asked to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        is_view = operation.is_view or name in ("_unsafe_view", "detach")
        if isinstance(result, torch.Tensor) and not is_view:
            self.counts["kernels"] += 1
        if name == "_to_copy" and args[0].dtype != result.dtype:
            self.counts["casts"] += 1
        if name in ("_to_copy", "copy_"):
            sources = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            from_host = sources[-1].device == CPU and sources[-1].numel() > 1
            if from_host and result.device != CPU:
                self.counts["copies from the host"] += 1
        if name == "mul" and not isinstance(args[1], torch.Tensor) and args[1] == 1:
            self.counts["multiplications by 1"] += 1
        return result


def count_calls(base, cond):
    """The Calls of one denoise of a batch of two."""
    noisy = torch.zeros(2, 4, 8, 8, device=GPU)
    timesteps = torch.zeros(2, dtype=torch.long, device=GPU)
    with Calls() as calls:
        sample.denoise(base, noisy, timesteps, cond)
    return calls.counts


def test_a_step_casts_little_copies_nothing_and_multiplies_by_no_one(fake_gpu):
    base = fake_base()
    cond = {"encoder_hidden_states": torch.zeros(2, 77, 32, device=GPU, dtype=torch.bfloat16)}
    plain = count_calls(base, cond)
    weights = lora.inject(base.unet, rank=2)
    base.unet.train()

    counts = count_calls(base, cond)

    # of the latents, the timesteps, their embedding and the prediction
    assert plain["casts"] <= 4
    assert counts["casts"] == plain["casts"] + len(weights)
    assert counts["copies from the host"] == 0
    assert counts["multiplications by 1"] == plain["multiplications by 1"]
    # a pair: two weights are cast, two products and a sum are made
    assert counts["kernels"] == plain["kernels"] + 5 * len(weights) // 2


def test_the_sizes_that_sdxl_is_told_are_copied_once(fake_gpu):
    base = fake_base(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    half = dict(device=GPU, dtype=torch.bfloat16)
    cond = {"encoder_hidden_states": torch.zeros(2, 77, 32, **half)}
    cond["text_embeds"] = torch.zeros(2, 24, **half)

    count_calls(base, cond)

    assert count_calls(base, cond)["copies from the host"] == 0


def test_class_images_are_learnt_in_the_same_forward_pass(prepared, monkeypatch):
    args, loaded, streams, state = prepared("--batch-size", 3)
    streams = [streams[0], replace(streams[0], name="class")]
    sizes = []
    denoise = sample.denoise

    def noting_denoise(base, noisy, *how):
        sizes.append(len(noisy))
        return denoise(base, noisy, *how)

    monkeypatch.setattr(train, "denoise", noting_denoise)
    batches = train.upcoming_batches(streams, loaded.num_timesteps, 0, args)

    loss = train.accumulate_gradients(loaded, batches, None, state, args)

    assert sizes == [6]
    assert math.isfinite(loss.item())
