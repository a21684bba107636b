"""What fits into the memory of a GPU: the peak of each stage, computed and not measured.

    python tests/fits.py                                         the whole table, in minutes
    python tests/fits.py --shape sdxl --what training --batch-size 4
    python tests/fits.py --shape sd15 --resolution 768

Prints a table in Markdown. The real code of train.py and sample.py runs on tensors that have sizes
and no content (torch's FakeTensorMode), and the bytes alive at once are counted; any machine can.
The tensors stand on the CPU, whose fused attention saves what a GPU's saves. Not counted are the
CUDA context and the workspaces of kernels, for which 1 GB of a card is left, and the allocator's
fragments. 1 GB is 2^30 bytes, as cards are sold.
"""

import argparse
import contextlib
import gc
import weakref
from pathlib import Path

import bench
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import lora
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GB = 2**30
CARDS = (12, 16, 24)  # GB
LEFT = 1  # GB, for the CUDA context and the workspaces of kernels
RESOLUTIONS = {"sd15": 512, "sd21": 768, "sdxl": 1024}
BATCH_SIZES = (1, 8)
PART = 64  # images or captions that train.py hands over at once while it caches


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors alive that were added or made while it is active."""

    def __init__(self, *modules):
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.bytes = 0
        self.peak = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self.storages:
            return
        size = storage.nbytes()
        self.storages[storage] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, size)

    def remove(self, size):
        self.bytes -= size

    def leave_out(self, tensor):
        """Do not count a tensor, which is in host memory."""
        self.storages[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_base(shape, dtype, method=None):
    """A sample.Base of a published configuration, as load_base has it, of tensors without content.

    method: that of training, None for drawing.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with default_dtype(torch.float32 if method == "full" else dtype):
        unet = diffusers.UNet2DConditionModel(**bench.UNETS[shape])
    with default_dtype(torch.float32 if method else dtype):
        vae = bench.make_vae(shape)
        encoders = [bench.make_text_encoder(CLIPTextModel, bench.TEXTS[shape])]
        if shape == "sdxl":
            encoders.append(bench.make_text_encoder(CLIPTextModelWithProjection, bench.CLIP_G))
    for model in (unet, vae, *encoders):
        model.eval().requires_grad_(False)
    prediction_type = "v_prediction" if shape == "sd21" else "epsilon"
    return sample.Base(
        name=shape,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=[],
        schedule={**bench.BETAS, "prediction_type": prediction_type},
        alphas_cumprod=torch.linspace(0.999, 0.005, 1000),
        device=CPU,
        dtype=dtype,
        resolution=RESOLUTIONS[shape],
        zero_empty=shape == "sdxl",
        text_length=77,
    )


def make_states(base, count):
    """What the text encoders return for `count` captions."""
    tokens = {"ids": torch.zeros(count, base.text_length, dtype=torch.long)}
    if base.zero_empty:
        tokens["ids_2"] = tokens["ids"]
        tokens["empty"] = torch.zeros(count, dtype=torch.bool)
    with torch.no_grad():
        return sample.text_states(base, tokens)


def parse_flags(*words):
    """train.py's flags for these words, all else by default; the data are not read."""
    with bench.parsed(train, "--data", ROOT / "tests", *words) as args:
        return args


# ---- the stages, each in bytes at its peak


def cache(shape, resolution):
    """The latents and captions of a training set, before the UNet comes to the GPU."""
    base = make_base(shape, torch.bfloat16, "lora")
    pixels = torch.zeros(PART, 3, resolution, resolution, dtype=torch.uint8)
    with Memory(base.vae, *base.text_encoders) as memory:
        memory.leave_out(pixels)
        sample.encode(base, pixels)
        make_states(base, PART)
    return memory.peak


def make_batch(base, resolution, args):
    """A Batch on the GPU."""
    count = args.batch_size
    side = resolution // 8
    text = {}
    for name, values in make_states(base, 1).items():
        text[name] = torch.zeros(count, *values.shape[1:], dtype=base.dtype)
    return train.Batch(
        latents=torch.zeros(count, 4, side, side),
        noise=torch.zeros(count, 4, side, side),
        timesteps=torch.zeros(count, dtype=torch.long),
        text=text,
        sizes=torch.zeros(count, 6, dtype=torch.long),
        weight=torch.zeros(count),
    )


def learn(base, resolution, args, make_optimizer=None):
    """Two steps of training; the second begins with the optimizer's state."""
    weights = train.trainable_weights(base, args)
    state = train.start(base, weights, args, {})
    if make_optimizer:
        state.optimizer = make_optimizer(weights.values())
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    base.unet.train()
    batch = make_batch(base, resolution, args)
    with Memory(base.unet) as memory:
        for tensor in tree_leaves((batch, state.ema)):
            memory.add(tensor)
        for _ in range(2):
            train.accumulate_gradients(base, iter([batch]), None, state, args)
            train.optimizer_step(state, args)
    return memory.peak


def train_adapter(shape, resolution, batch_size, *words):
    """train.py with all its defaults, of a base in bf16."""
    args = parse_flags("--batch-size", batch_size, *words)
    base = make_base(shape, torch.bfloat16, "lora")
    return learn(base, resolution, args)


class EightBitAdam(torch.optim.Optimizer):
    """As large as bitsandbytes' AdamW8bit, which has two bytes of state a weight."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["first"] = torch.zeros_like(weight, dtype=torch.uint8)
                    state["second"] = torch.zeros_like(weight, dtype=torch.uint8)


@contextlib.contextmanager
def norms_in_fp32():
    """Normalise in fp32, as autocast has it on a GPU, and on a CPU not."""
    group_norm = F.group_norm
    layer_norm = F.layer_norm
    F.group_norm = lambda x, *how: group_norm(x.float(), *how)
    F.layer_norm = lambda x, *how: layer_norm(x.float(), *how)
    try:
        yield
    finally:
        F.group_norm = group_norm
        F.layer_norm = layer_norm


def train_unet(shape, resolution, batch_size, *words):
    """train.py --method full --optimizer adamw8bit: weights, gradients and averages in fp32."""
    args = parse_flags("--batch-size", batch_size, "--method", "full", *words)
    base = make_base(shape, torch.bfloat16, "full")
    with norms_in_fp32():
        return learn(base, resolution, args, EightBitAdam)


def make_adapter(base):
    """The pairs of an adapter of rank 16 for a base's attention layers."""
    pairs = {}
    for name in lora.find_targets(base.unet, "attention"):
        rows, columns = base.unet.get_submodule(name).weight.shape
        pairs[f"unet.{name}"] = (torch.zeros(16, columns), torch.zeros(rows, 16))
    return pairs


def draw_batch(base, resolution, batch_size, settings):
    """From captions to pictures, by one step of denoising, for all steps are alike."""
    states = sample.project(base, make_states(base, 1))
    cond = {name: torch.cat([values] * batch_size) for name, values in states.items()}
    latents = torch.zeros(batch_size, 4, resolution // 8, resolution // 8)
    timestep = torch.zeros((), dtype=torch.long)
    prediction = sample.guided_prediction(base, latents, timestep, (cond, cond), settings)
    latents = latents - prediction
    del prediction
    sample.decode(base, latents)


@torch.no_grad()
def draw(shape, resolution, batch_size, *words):
    """sample.py with an adapter."""
    settings = sample.Settings(low_memory="--low-memory" in words)
    base = make_base(shape, torch.bfloat16)
    if settings.low_memory:
        sample.decode_in_tiles(base)
    adapter = make_adapter(base)
    with Memory(base.unet, base.vae, *base.text_encoders) as memory:
        for tensor in tree_leaves(adapter):
            memory.leave_out(tensor)
        with lora.merged(base.parts(), [(adapter, 1.0)]):
            draw_batch(base, resolution, batch_size, settings)
    return memory.peak


@torch.no_grad()
def draw_grid(shape, resolution, batch_size):
    """The grid of train.py: the state of the training stays, the text encoders are on the CPU."""
    args = parse_flags("--batch-size", batch_size)
    base = make_base(shape, torch.bfloat16, "lora")
    weights = train.trainable_weights(base, args)
    base.unet.eval()
    with Memory(base.unet, base.vae) as memory:
        # the averages, and what Adam keeps
        state = [torch.zeros(3, *weight.shape) for weight in weights.values()]
        draw_batch(base, resolution, batch_size, sample.Settings())
        del state
    return memory.peak


# ---- the table


def list_cells(args):
    """(stage, function, shape, resolution, batch size, flags) of each row."""
    cells = []
    for shape in [args.shape] if args.shape else RESOLUTIONS:
        resolution = args.resolution or RESOLUTIONS[shape]
        cells.append(("caching", cache, shape, resolution, None))
        for batch_size in [args.batch_size] if args.batch_size else BATCH_SIZES:
            how = (shape, resolution, batch_size)
            cells.append(("training", train_adapter, *how))
            cells.append(("training", train_adapter, *how, "--gradient-checkpointing"))
            cells.append(("grid", draw_grid, *how))
            cells.append(("drawing", draw, *how))
            cells.append(("drawing", draw, *how, "--low-memory"))
    if args.shape in (None, "sd15"):
        size = args.batch_size or 8
        cells.append(("full", train_unet, "sd15", args.resolution or 256, size))
    chosen = [cell for cell in cells if args.what in (None, cell[0])]
    return sorted(chosen, key=lambda cell: STAGES.index(cell[0]))


STAGES = ["caching", "training", "full", "grid", "drawing"]


def peak_of(function, *how):
    """The peak of a stage, in GB."""
    sample.whole_images.cache_clear()  # tensors of one FakeTensorMode are none of another's
    with FakeTensorMode():
        peak = function(*how)
    gc.collect()
    return peak / GB


def smallest_card(peak):
    """The smallest card that a peak fits, in words."""
    for card in CARDS:
        if peak <= card - LEFT:
            return f"{card} GB"
    return "none"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--what", choices=STAGES, help="one stage alone (full: --method full, 8-bit Adam)")
    add("--shape", choices=RESOLUTIONS, help="one base alone")
    add("--resolution", type=int, help="pixels (default: the base's own; full: 256)")
    add("--batch-size", type=int, help="images at once (default: 1 and 8)")
    return parser.parse_args()


def main(args):
    print("| stage | base | pixels | batch | flags | peak, computed | fits |")
    print("|---|---|---|---|---|---|---|")
    for stage, function, shape, resolution, batch_size, *words in list_cells(args):
        how = [shape, resolution]
        if batch_size:
            how.append(batch_size)
        peak = peak_of(function, *how, *words)
        flags = " ".join(words)
        if stage == "full":
            flags = "--method full --optimizer adamw8bit"
        cells = [stage, shape, resolution, batch_size or "", flags]
        cells += [f"{peak:.1f} GB", smallest_card(peak)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\n1 GB = 2^30 bytes; {LEFT} GB of a card is left for CUDA and its kernels' workspaces.")


if __name__ == "__main__":
    main(parse_args())
