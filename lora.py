"""Low-rank adapters: put them into a model, save and load them, add them to its weights, look inside a file.

    python lora.py info runs/dfu/lora.safetensors

An adapter file is safetensors in the dialect diffusers' `load_lora_weights` reads: `unet.<module>.lora_A.weight`
(rank, in[, k, k]) and `….lora_B.weight` (out, rank[, 1, 1]). alpha/rank is folded into B, because that dialect has no
alpha tensor and every loader then gives the same picture; the true rank and alpha stand in the metadata.
Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". Imports none of our files.
"""
import argparse
import contextlib
import json
import math
import os
import re
import sys


def fail(message):
    """Say what is wrong in one line and stop: exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: [] if line.strip("\ufeff \t")[:1] in ("", "#") else line.strip(
        "\ufeff \t").split(None, 1)
    parser.error = fail
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="base, rank, alpha, pairs, parameters and norms of an adapter file")
    info.add_argument("file", help="an adapter, .safetensors")
    info.error = fail
    try:
        return parser.parse_args()
    except (UnicodeDecodeError, RecursionError):
        fail("an @file of flags is no text file, or names itself")


if __name__ == "__main__":
    args = parse_args()

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save as serialize  # noqa: E402
from torch import nn  # noqa: E402

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@contextlib.contextmanager
def replacing(path):
    """Open a binary file that takes the place of `path` only once it is whole and on the disk."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        wrapped = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)   # torch.save: a full disk
        cause = error.__context__ if wrapped else error
        if isinstance(cause, OSError) and cause.filename is None:
            cause.filename = str(path)
        raise cause


# ---------------------------------------------------------------------------------------------- adapters in layers

class LoRALayer:
    """Mixed in before nn.Linear or nn.Conv2d by `inject`: y = layer(x) + alpha/rank · B(A(dropout(x)))."""

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.lora_scale


class LoRALinear(LoRALayer, nn.Linear):
    pass


class LoRAConv2d(LoRALayer, nn.Conv2d):
    pass


def find_targets(model, targets):
    """Names of the Linear and Conv2d layers of `model` that `targets` means.

    targets: "attention" (to_q, to_k, to_v, to_out.0), "all" (every such layer inside the blocks: attention,
    feed-forward, projections, resnets, samplers), or a comma list of name endings such as "to_q,ff.net.2".
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if targets == "all":
        return [name for name in layers if "block" in name]
    endings = ATTENTION if targets == "attention" else tuple(filter(None, targets.replace(" ", "").split(",")))
    unknown = [end for end in endings if not any(("." + name).endswith("." + end) for name in layers)]
    if unknown or not endings:
        fail(f"--targets {targets}: no layer of the model is called {', '.join(unknown) or 'so'}; "
             "say attention, all, or name endings such as to_q,to_v")
    return [name for name in layers if any(("." + name).endswith("." + end) for end in endings)]


def inject(model, targets="attention", rank=16, alpha=None, dropout=0.0, generator=None, prefix="unet"):
    """Freeze `model` and give each target layer a trainable fp32 pair; the layer's output is unchanged at first.

    A (rank, in[, k, k]) is kaiming-uniform with a=√5, that is U(±1/√fan_in), B (out, rank[, 1, 1]) zero: the step
    that lr makes then does not depend on the rank. alpha defaults to the rank (scale 1).
    Returns {name: parameter} of the new weights, names such as "unet.….to_q.lora_A.weight".
    """
    model.requires_grad_(False)
    for name in find_targets(model, targets):
        layer = model.get_submodule(name)
        device = layer.weight.device
        if isinstance(layer, nn.Linear):
            layer.__class__ = LoRALinear
            layer.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=device)
            layer.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=device)
        else:
            layer.__class__ = LoRAConv2d
            layer.lora_A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding,
                                     layer.dilation, bias=False, device=device)
            layer.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        start = torch.empty(layer.lora_A.weight.shape)   # drawn on the CPU: the same start on every device
        layer.lora_A.weight.data.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_dropout = nn.Dropout(dropout)
        layer.lora_scale = (rank if alpha is None else alpha) / rank
    return {f"{prefix}.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}


# ---------------------------------------------------------------------------------------------- adapters on disk

def to_bytes(tensors, metadata):
    """A safetensors file as bytes, the same ones every time: the library writes its metadata in random order."""
    plain = serialize(tensors)
    length = int.from_bytes(plain[:8], "little")
    texts = {key: str(value) for key, value in sorted({"format": "pt", **metadata}.items())}
    header = json.dumps({"__metadata__": texts, **json.loads(plain[8:8 + length])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[8 + length:]


def on_disk(name):
    """A weight's name in files: a text encoder's layers lie below `text_model.`, whatever this transformers does."""
    return re.sub(r"^(text_encoder(?:_2)?)\.(?!text_model\.)", r"\1.text_model.", name)


def save(path, weights, metadata):
    """Write {name: tensor} as `inject` names them, atomically; metadata: {"rank": …, "alpha": …, "base": …, …}."""
    scale = float(metadata["alpha"]) / float(metadata["rank"])
    tensors = {on_disk(name): (w.detach().float() * (scale if ".lora_B." in name else 1)).cpu().contiguous()
               for name, w in weights.items()}
    with replacing(path) as file:
        file.write(to_bytes(tensors, metadata))


def load(path):
    """Read an adapter: ({"unet.<module>": (A, B)}, metadata, extra), alpha/rank already folded into B.

    extra: what is no pair: the projection of a foreign text encoder, or the vectors of new tokens. Nothing is
    unpickled. Stops with one line on a file that is missing, truncated, no safetensors, holds NaN, or has keys that
    are no pairs: what does not fit is listed, never dropped in silence.
    """
    if not os.path.isfile(path):
        fail(f"{path}: no such adapter file; give the lora.safetensors of a run")
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as why:
        fail(f"{path}: not a readable safetensors adapter ({why}); make it again or copy it again")
    extra = {key: tensors.pop(key).float() for key in list(tensors)
             if key.startswith("text_projection.") or key in metadata.get("tokens", "").split()}
    stems = {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for key in tensors}
    odd = sorted(key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    odd += sorted(s for s in stems if not {s + ".lora_A.weight", s + ".lora_B.weight"} <= set(tensors))
    if odd or not (tensors or extra):
        fail(f"{path}: not an adapter in diffusers' form: {', '.join(odd[:3]) or 'it is empty'} "
             f"({len(odd)} keys are not of lora_A/lora_B pairs)")
    pairs = {s: (tensors[s + ".lora_A.weight"].float(), tensors[s + ".lora_B.weight"].float()) for s in sorted(stems)}
    for name, (a, b) in pairs.items():
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            fail(f"{path}: {name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together")
        if not (a.isfinite().all() and b.isfinite().all()):
            fail(f"{path}: {name} holds NaN or infinity; the training that made it failed")
    if not all(value.isfinite().all() for value in extra.values()):
        fail(f"{path} holds NaN or infinity; the training that made it failed")
    return pairs, metadata, extra


def delta(a, b):
    """What a pair adds to its layer's weight: B·A, (out, in) or (out, in, k, k)."""
    return (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])


@contextlib.contextmanager
def merged(models, adapters):
    """Add adapters to the weights for a while: models {"unet": module, …}, adapters [(pairs, weight), …].

    The sums are made in fp32; the originals come back by copy, not by subtraction, so they are the same to the bit.
    Stops with one line when a pair names a layer the models do not have, or one of another shape.
    """
    updates, missing = {}, []
    for pairs, weight in adapters:
        for name, (a, b) in pairs.items():
            layer = find_layer(models, name)
            if layer is None or layer.weight.numel() != b.shape[0] * a[0].numel() or len(layer.weight) != b.shape[0]:
                missing.append(name)
            else:
                updates.setdefault(layer, []).append((a, b, weight))
    if missing:
        fail(f"the adapter does not fit this base: {len(missing)} of its layers are absent or of another shape, "
             f"first {', '.join(missing[:3])}; was it trained on another --base?")
    originals = {layer: layer.weight.data for layer in updates}
    try:
        for layer, parts in updates.items():
            total = layer.weight.data.float()
            for a, b, weight in parts:
                change = delta(a.to(total.device), b.to(total.device)).reshape(total.shape)
                total = total + weight * change
            layer.weight.data = total.to(originals[layer].dtype)
        yield
    finally:
        for layer, original in originals.items():
            layer.weight.data = original


def find_layer(models, name):
    """The layer an adapter's key means, or None. transformers 5.6 dropped CLIPTextModel's `text_model.` level."""
    root, _, path = name.partition(".")
    for candidate in (path, path.removeprefix("text_model.")):
        with contextlib.suppress(KeyError, AttributeError):
            layer = models[root].get_submodule(candidate)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                return layer
    return None


# ---------------------------------------------------------------------------------------------- the command

def info(path):
    """Print what an adapter file holds, a figure a line."""
    pairs, metadata, extra = load(path)
    ranks = sorted({len(a) for a, _ in pairs.values()}) or [0]
    print(f"dialect: diffusers\npairs: {len(pairs)}\nrank: {metadata.get('rank', '/'.join(map(str, ranks)))}\n"
          f"alpha: {metadata.get('alpha', metadata.get('rank', ranks[-1]))}\n"
          f"parameters: {sum(a.numel() + b.numel() for a, b in pairs.values()) + sum(e.numel() for e in extra.values())}")
    print(f"norm: {math.sqrt(sum(delta(a, b).square().sum().item() for a, b in pairs.values())):.4g}")
    for key, value in sorted(metadata.items()):
        if key not in ("rank", "alpha", "format"):
            print(f"{key}: {json.dumps(value) if chr(10) in value else value}")


if __name__ == "__main__":
    info(args.file)
