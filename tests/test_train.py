"""Training: the rules that well-known trainers break; what a run writes, keeps and refuses."""

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import needs_chromium, page_faults
from conftest import write_selector
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

import lora
import metrics
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def quick_flags(base, images):
    """A quick run of 12 steps on random weights: a checkpoint every 5, a validation every 6."""
    return [
        "--base",
        base,
        "--data",
        images,
        "--prompt",
        "a {label} foot",
        "--steps",
        12,
        "--save-every",
        5,
        "--rank",
        2,
        "--validate-every",
        6,
        "--val-samples",
        0,
        "--lr",
        1e-3,
        "--log-every",
        3,
        "--val-split",
        0.2,
    ]


@pytest.fixture
def flags(base, images):
    return quick_flags(base, images)


def command(*flags, processes=0):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, "train.py", *map(str, flags)]


def launch(*flags, processes=0, **how):
    return subprocess.run(
        command(*flags, processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **how,
    )


def log_of(out, key="loss"):
    return [
        line
        for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        if key in line
    ]


def results(out):
    return [
        (Path(out) / name).read_bytes() for name in ("lora.safetensors", "lora-last.safetensors")
    ]


@pytest.fixture
def setup(base, images, monkeypatch):
    """(args, base, data, state) just before the first step."""

    def make(*more):
        flags = ["--base", base, "--data", images, "--prompt", "a {label} foot", "--rank", "2"]
        flags += ["--val-split", "0", "--resolution", "64", *map(str, more)]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        args = train.parse_args()
        rows = train.list_data(args)
        args = train.with_defaults(args, rows, base)
        loaded = train.prepare_base(args, CPU)
        weights = train.trainable_weights(loaded, args)
        streams, _ = train.load_data(loaded, rows, args)
        state = train.start(loaded, weights, args, {})
        state.images = len(rows)
        return args, loaded, streams[0], state

    return make


def gradients(loaded, streams, perceptual, state, args):
    """Leave the gradients of the next step; returns its loss."""
    batches = train.upcoming_batches(streams, loaded.num_timesteps, state.step, args)
    return train.accumulate_gradients(loaded, batches, perceptual, state, args)


# ---------------------------------------------------------------- what a run leaves


def test_an_adapter_says_that_it_learnt_from_grey_images(flags, tmp_path, run, images):
    for path in Path(images).rglob("*.png"):
        target = tmp_path / "grey" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(target)
    flags = [*flags, "--data", tmp_path / "grey", "--steps", 1, "--out", tmp_path / "run"]
    run(train, *flags, "--cache", tmp_path / "cache")
    run(train, *flags, "--cache", tmp_path / "cache", "--out", tmp_path / "again")
    for name in ("run", "again"):
        assert lora.load(tmp_path / name / "lora.safetensors")[1]["grey"] is True
        checkpoint = tmp_path / name / "checkpoints" / "latest.pt"
        assert sample.read_checkpoint(str(checkpoint)).metadata["grey"] is True


def test_a_run_leaves_an_adapter_checkpoints_a_log_a_split_and_grids(
    flags, tmp_path, run, base, capsys
):
    more = ["--val-samples", 1, "--val-steps", 2, "--batch-size", 2, "--accumulate", 3]
    run(train, *flags, "--out", tmp_path, *more)
    printed, notes = capsys.readouterr()
    assert "6 = --batch-size 2 × --accumulate 3 × processes 1" in printed
    assert "validation images: 4, too few to trust" in notes
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000006.pt",
        "step-00000010.pt",
        "step-00000012.pt",
        "latest.pt",
        "best.pt",
    }
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 13))
    assert set(log_of(tmp_path)[0]) == {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "memory",
    }
    assert [line["step"] for line in log_of(tmp_path, "val_loss")] == [6, 12]
    assert Image.open(tmp_path / "samples" / "step-00000012.png").width > 64
    split = (tmp_path / "split.csv").read_text().splitlines()
    assert split[0] == "file_name,group,split" and len(split) == 25
    people = metrics.read_table(tmp_path / "people.csv")
    counts = {(record["by"], record["group"]): record for record in people}
    for by, group, count in (("", "all", 24), ("label", "calm", 12), ("sex", "unknown", 24)):
        record = counts[by, group]
        assert int(record["train images"]) + int(record["val images"]) == count
        assert record["train patients"] == record["val patients"] == ""
    pairs, metadata, _ = lora.load(tmp_path / "lora.safetensors")
    assert len(pairs) == 32 and metadata["base"] == base and metadata["rank"] == 2
    assert metadata["grey"] is False and metadata["resolution"] == 64  # the base's own
    for_sample = {"prompt": "a {label} foot", "crop": "center", "slices": "middle"}
    for_sample |= {"window": None, "range": None}
    assert metadata == metadata | for_sample
    assert sorted(metadata["val_prompts"]) == ["a calm foot", "a sore foot"]
    assert json.loads((tmp_path / "args.json").read_text())["finished"] == 12
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_finished_run_says_so_and_a_longer_one_goes_on(flags, tmp_path, run, capsys):
    run(train, *flags, "--out", tmp_path)
    before = results(tmp_path)
    then = capsys.readouterr().out.splitlines()[-1]
    assert then.startswith("then: python ") and then.endswith(f"--run {tmp_path}")
    run(train, *flags, "--out", tmp_path)
    assert "is finished: 12 steps" in capsys.readouterr().out and results(tmp_path) == before
    run(train, *flags, "--out", tmp_path, "--steps", 15, "--lr-schedule", "constant")
    assert log_of(tmp_path)[-1]["step"] == 15 and results(tmp_path) != before


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_finished_run_grows_by_a_constant_rate_alone(flags, tmp_path, run, refused, schedule):
    flags = [*flags, "--out", tmp_path, "--steps", 4, "--lr-schedule", schedule]
    run(train, *flags)
    before = results(tmp_path)
    line = refused(train, *flags, "--steps", 8)
    assert "--steps: 4 before, 8 now" in line and "--lr-schedule constant" in line
    assert results(tmp_path) == before
    constant = [*flags, "--steps", 8, "--lr-schedule", "constant"]
    assert "--rank" in refused(train, *constant, "--rank", 4)
    run(train, *constant)
    assert [line["lr"] for line in log_of(tmp_path)][4:] == [1e-3] * 4


def test_a_run_at_a_constant_rate_grows_to_the_same_bytes_as_a_longer_one(flags, tmp_path, run):
    flags = [*flags, "--lr-schedule", "constant", "--warmup", 1, "--val-split", 0]
    run(train, *flags, "--out", tmp_path / "whole", "--steps", 8)
    run(train, *flags, "--out", tmp_path / "grown", "--steps", 4)
    run(train, *flags, "--out", tmp_path / "grown", "--steps", 8)
    assert results(tmp_path / "grown") == results(tmp_path / "whole")


def test_a_stopped_run_goes_on_to_its_own_last_step_or_ends_where_it_is(
    flags, tmp_path, run, refused, monkeypatch
):
    flags = [*flags, "--out", tmp_path, "--save-every", 1]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", stopped)  # at step 6
        run(train, *flags)
    for steps in (7, 15):
        assert f"--steps: 12 before, {steps} now" in refused(train, *flags, "--steps", steps)
    run(train, *flags, "--steps", 5)
    assert log_of(tmp_path)[-1]["step"] == 5
    assert lora.load(tmp_path / "lora.safetensors")[1]["steps"] == 5


def test_the_adapter_file_holds_the_averaged_weights_of_the_best_validation_or_of_the_end(
    flags, tmp_path, run
):
    run(train, *flags, "--out", tmp_path / "a")
    run(train, *flags, "--out", tmp_path / "b", "--val-split", 0)
    for out, which in (("a", "best.pt"), ("b", "latest.pt")):
        kept = torch.load(tmp_path / out / "checkpoints" / which, weights_only=True)
        found = load_file(tmp_path / out / "lora.safetensors")
        assert all(torch.equal(found[name], value) for name, value in kept["ema"].items()) and len(
            found
        ) == len(kept["ema"])
        assert not all(torch.equal(found[name], value) for name, value in kept["weights"].items())


def test_full_training_leaves_a_folder_that_serves_as_a_base(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path / "full", "--method", "full")
    run(
        sample,
        "--base",
        tmp_path / "full" / "model",
        "--prompt",
        "x",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "drawn",
    )
    tuned = load_file(tmp_path / "full" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    ema = torch.load(tmp_path / "full" / "checkpoints" / "best.pt", weights_only=True)["ema"]
    assert all(torch.equal(tuned[name.removeprefix("unet.")], ema[name]) for name in ema)


def test_the_checkpoint_holds_what_it_promises_without_pickled_objects(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path, "--keep-last", 1)
    assert len(list((tmp_path / "checkpoints").glob("step-*.pt"))) == 1
    checkpoint = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)
    assert {
        "format",
        "step",
        "epoch",
        "weights",
        "ema",
        "optimizer",
        "scaler",
        "best",
        "history",
        "args",
        "random",
    } <= set(checkpoint)
    assert (
        all(w.dtype == torch.float32 for w in checkpoint["weights"].values())
        and len(checkpoint["weights"]) == 64
    )


# ---------------------------------------------------------------- the rules


def test_each_epoch_sees_every_image_once_in_an_order_of_its_own():
    orders = [train.epoch_order(0, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == train.epoch_order(0, 0, 50) != train.epoch_order(1, 0, 50)


def test_draws_depend_on_the_place_in_the_global_batch_alone(setup):
    args, loaded, data, _ = setup("--batch-size", 8)
    whole = train.make_batch([data], 1000, 5, range(8), args)
    parts = [train.make_batch([data], 1000, 5, range(k, k + 2), args) for k in (0, 2, 4, 6)]
    for name in ("latents", "noise", "timesteps"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), joined)
    noise = whole.noise.flatten(1)
    assert len({tuple(row.tolist()[:4]) for row in noise}) == 8  # every slot its own noise
    later = train.make_batch([data], 1000, 6, range(8), args).noise.flatten(1)
    assert not torch.equal(noise, later)


def test_captions_and_latents_are_never_mispaired(setup):
    args, loaded, data, _ = setup("--batch-size", 24, "--prompt-dropout", 0)
    data.std.zero_()
    batch = train.make_batch([data], 1000, 0, range(24), args)
    for latents, text in zip(batch.latents, batch.text["encoder_hidden_states"], strict=True):
        row = data.rows[[torch.equal(latents, mean) for mean in data.mean[:, 0]].index(True)]
        expected = sample.encode_text(loaded, [row.caption])["encoder_hidden_states"][0]
        torch.testing.assert_close(text, expected)


def test_latents_are_drawn_afresh_each_time_from_the_posterior(setup):
    args, loaded, data, _ = setup("--batch-size", 24)

    def values(step):
        latents = train.make_batch([data], 1000, step, range(24), args).latents
        return sorted(latents.flatten(1)[:, 0].tolist())  # each step sees all 24 images

    assert values(0) != values(1)
    data.std.zero_()
    assert values(0) == values(1)


def test_caption_dropout_gives_the_encoded_empty_caption_at_its_rate(setup):
    args, loaded, data, _ = setup("--batch-size", 200, "--prompt-dropout", 0.3)
    empty = sample.encode_text(loaded, [""])["encoder_hidden_states"][0]

    def dropped(step):
        text = train.make_batch([data], 1000, step, range(200), args).text
        return [torch.allclose(c, empty, atol=1e-5) for c in text["encoder_hidden_states"]]

    first = dropped(0)
    assert 40 <= sum(first) <= 80
    assert dropped(1) != first


def test_clipping_clips_and_the_norm_told_is_the_one_before(setup):
    args, _, _, state = setup("--max-grad-norm", 0.5, "--weight-decay", 0, "--ema", 0)
    weights = list(state.weights.values())
    for w in weights:
        w.grad = torch.ones_like(w)
    seen = []
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(math.sqrt(sum(w.grad.square().sum().item() for w in weights)))
    )
    norm = train.optimizer_step(state, args)
    assert math.isclose(norm.item(), math.sqrt(sum(w.numel() for w in weights)), rel_tol=1e-5)
    assert math.isclose(seen[0], 0.5, rel_tol=1e-4)


def test_the_average_warms_up_and_covers_trainable_weights_only(setup):
    args, _, _, state = setup("--lr", 0.1)
    weights = list(state.weights.values())
    name = next(n for n in state.weights if "lora_B" in n)
    expected = state.ema[name].clone()
    for step in range(4):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        train.optimizer_step(state, args)
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * state.weights[name].detach()
        state.step += 1
    torch.testing.assert_close(state.ema[name], expected)
    assert set(state.ema) == set(state.weights) and len(state.ema) == 64


def test_a_step_with_nan_changes_nothing_and_three_in_a_row_end_the_run(
    setup, flags, tmp_path, refused, monkeypatch
):
    args, _, _, state = setup("--lr", 0.1)
    weights = list(state.weights.values())
    for w in weights:
        w.grad = torch.ones_like(w)
    train.optimizer_step(state, args)
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.full_like(w, math.nan)
    train.optimizer_step(state, args)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    monkeypatch.setattr(
        train,
        "denoise",
        lambda base, noisy, *_: (
            base.unet.conv_in.weight.sum() * math.nan * noisy
            + sum(w.sum() for w in base.unet.parameters() if w.requires_grad)
        ),
    )
    assert "NaN" in refused(train, *flags, "--out", tmp_path)


def test_learning_rate_warms_up_and_ends_near_zero_and_a_long_warm_up_is_capped(setup):
    args, *_ = setup("--steps", 100, "--warmup", 10, "--lr", 2.0)
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == pytest.approx(2.0)
        and max(rates) == pytest.approx(2.0)
    )
    assert (
        rates[55] == pytest.approx(2 * (0.5 + 0.5 * math.cos(math.pi * 45 / 90)))
        and rates[99] < 0.01
    )
    args.warmup = 10_000
    assert max(train.learning_rate(step, args) for step in range(100)) == pytest.approx(2.0)
    args.lr_schedule = "constant"
    assert train.learning_rate(99, args) == 2.0
    args.steps, args.warmup = 20, 10
    assert [train.learning_rate(step, args) for step in (0, 8, 9)] == pytest.approx([0.2, 1.8, 2.0])
    args.warmup = None  # not asked for: no more than a tenth
    assert [train.learning_rate(step, args) for step in (0, 1)] == [1.0, 2.0]
    args.steps = 5000  # and at most 100 steps
    assert [train.learning_rate(step, args) for step in (49, 99)] == [1.0, 2.0]


def test_a_validation_every_0_steps_is_at_the_end_alone(setup):
    args, *_ = setup("--steps", 12, "--validate-every", 0)
    due = [step for step in range(1, 13) if train.is_due(step, args.validate_every, args)]
    assert due == [12]


def test_epochs_say_how_many_steps_even_where_a_recipe_says_steps(setup):
    assert setup("--steps", 5)[0].steps == 5
    assert setup("--steps", 5, "--epochs", 2)[0].steps == 6  # two passes over 24 images by 8


def test_validation_loss_is_the_same_each_time_and_uses_the_average(setup):
    args, loaded, data, state = setup()
    first = train.validation_loss(loaded, data, args)
    assert first == train.validation_loss(loaded, data, args) and 0.5 < first < 2
    for weight in state.weights.values():
        weight.data.add_(1.0)
    moved = train.validation_loss(loaded, data, args)
    with train.averaged_model(loaded, state, args):
        assert train.validation_loss(loaded, data, args) == first != moved
    assert train.validation_loss(loaded, data, args) == moved


def test_adapter_and_optimizer_stay_fp32_under_bf16_and_learn(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path, "--precision", "bf16")
    checkpoint = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)
    moments = [v for s in checkpoint["optimizer"]["state"].values() for v in s.values()]
    assert {v.dtype for v in [*checkpoint["weights"].values(), *moments]} == {torch.float32}
    assert any(w.any() for name, w in checkpoint["weights"].items() if "lora_B" in name)


def test_a_step_asks_no_tensor_for_its_value(setup, monkeypatch):
    args, loaded, data, state = setup("--snr-gamma", 5, "--noise-offset", 0.1)
    batch = train.make_batch([data], loaded.num_timesteps, 0, range(8), args)
    batches = iter([batch, batch])
    train.accumulate_gradients(loaded, batches, None, state, args)  # once, for what is cached
    train.optimizer_step(state, args)
    with (
        monkeypatch.context() as patch
    ):  # on a GPU each of these waits for all that was asked of it so far
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(
                torch.Tensor,
                name,
                lambda *_, name=name: pytest.fail(f"the step calls Tensor.{name}"),
            )
        loss = train.accumulate_gradients(loaded, batches, None, state, args)
        norm = train.optimizer_step(state, args)
    assert loss.item() > 0 and norm.item() > 0


@pytest.mark.parametrize(
    "more, stays",
    [([], ()), (["--text-lora"], ("text",)), (["--perceptual-weight", 0.1], ("vae",))],
)
def test_vae_and_text_encoder_leave_the_device_once_cached_unless_they_are_needed(
    more, stays, flags, tmp_path, run, monkeypatch
):
    places, loading = {}, train.load_base

    def watched(*of):
        base = loading(*of)
        for name, module in (("vae", base.vae), ("text", base.text_encoders[0])):
            places[name] = ["device"]
            monkeypatch.setattr(
                module, "to", lambda where, name=name: places[name].append(str(where))
            )
        return base

    monkeypatch.setattr(train, "load_base", watched)

    def begin(*_):
        raise EOFError

    monkeypatch.setattr(train, "fit", begin)
    with pytest.raises(EOFError):
        run(train, *flags, "--out", tmp_path, *more)
    assert {name: where[-1] for name, where in places.items()} == {
        n: "device" if n in stays else "cpu" for n in places
    }


@pytest.mark.parametrize("figure", ["kid", "fid"])
def test_the_best_is_chosen_by_pictures_where_there_are_fifty_to_compare_with(
    figure, flags, tmp_path, run, refused, monkeypatch
):
    for i in range(110):
        place = tmp_path / "data" / ("train", "val")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 30 + i).convert("RGB").save(place / f"{i}.png")
    texture = train.load_features("texture", CPU)
    flags += [
        "--data",
        tmp_path / "data" / "train",
        "--val-data",
        tmp_path / "data" / "val",
        "--prompt",
        "noise",
        "--steps",
        4,
        "--validate-every",
        2,
        "--select-by",
        figure,
        "--val-steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    if figure == "fid":  # Inception's weights are not at hand: said before anything is trained
        assert (
            train.FID_WEIGHTS in refused(train, *flags)
            and not (tmp_path / "run" / "log.jsonl").exists()
        )
    monkeypatch.setattr(train, "need_weights", lambda name, purpose: name)
    monkeypatch.setattr(train, "load_features", lambda name, device: texture)
    run(train, *flags)
    seen = log_of(tmp_path / "run", figure)
    best = min(seen, key=lambda line: line[figure])["step"]
    assert [line["step"] for line in seen] == [2, 4] and all(
        math.isfinite(line[figure]) for line in seen
    )
    assert lora.load(tmp_path / "run" / "lora.safetensors")[1]["steps"] == best


def test_tensorboard_gets_what_the_log_gets(flags, tmp_path, run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(train, *flags, "--out", tmp_path, "--tensorboard", "--val-samples", 1, "--val-steps", 1)
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 13))
    assert [e.value for e in board.Scalars("lr")] == pytest.approx(
        [line["lr"] for line in log_of(tmp_path)]
    )
    assert board.Images("samples")


def test_what_weights_and_biases_refuses_is_one_line(flags, tmp_path, refused, monkeypatch):
    def init(**_):
        raise ConnectionError("No API key")

    monkeypatch.setattr(train, "need", lambda *_: SimpleNamespace(Error=ConnectionError, init=init))
    assert "--wandb: No API key" in refused(train, *flags, "--wandb", "--out", tmp_path)


def test_weights_and_biases_get_what_tensorboard_gets(setup, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    asked = {}
    monkeypatch.setattr(train, "need", lambda *_: SimpleNamespace(Error=OSError, init=asked.update))
    args, _, _, state = setup("--wandb", "--out", tmp_path / "dfu")
    train.open_board(state, args).close()
    assert asked["sync_tensorboard"] is True
    assert asked["name"] == "dfu"
    assert list((tmp_path / "dfu" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "package, words",
    [
        ("wandb", ["--wandb"]),
        ("tensorboard", ["--tensorboard"]),
        ("bitsandbytes", ["--optimizer", "adamw8bit"]),
    ],
)
def test_a_missing_package_is_said_before_anything_is_read(
    package, words, flags, refused, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(train, "list_data", None)
    assert f"pip install {package}" in refused(train, *flags, *words)


@pytest.mark.parametrize("is_there", [True, False])
def test_adam_of_8_bits_is_that_of_bitsandbytes(is_there, setup, monkeypatch, capsys):
    class AdamW8bit(torch.optim.AdamW):
        pass

    package = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package if is_there else None)
    if is_there:
        assert type(setup("--optimizer", "adamw8bit")[3].optimizer) is AdamW8bit
        return
    with pytest.raises(SystemExit):
        setup("--optimizer", "adamw8bit")
    assert "pip install bitsandbytes" in capsys.readouterr().err


def test_accumulation_equals_the_larger_batch(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path / "a", "--batch-size", 8)
    run(train, *flags, "--out", tmp_path / "b", "--batch-size", 2, "--accumulate", 4)
    for one, other in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-5
    a, b = (load_file(tmp_path / x / "lora-last.safetensors") for x in "ab")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4


@pytest.mark.parametrize("processes, batch, accumulate", [(2, 4, 1), (4, 1, 2)])
def test_several_processes_equal_one_with_their_batches_together(
    processes, batch, accumulate, flags, tmp_path, run
):
    run(train, *flags, "--out", tmp_path / "one", "--batch-size", 8)
    several = [
        *flags,
        "--out",
        tmp_path / "several",
        "--batch-size",
        batch,
        "--accumulate",
        accumulate,
    ]
    done = launch(*several, processes=processes)
    assert done.returncode == 0, done.stderr
    more = [*flags, "--batch-size", 8, "--steps", 15, "--lr-schedule", "constant"]
    run(train, *more, "--out", tmp_path / "one")
    run(train, *more, "--out", tmp_path / "several")  # go on in one process
    assert len(log_of(tmp_path / "several")) == 15
    for key in ("loss", "val_loss"):
        for one, other in zip(
            log_of(tmp_path / "one", key), log_of(tmp_path / "several", key), strict=True
        ):
            assert abs(one[key] - other[key]) < 1e-5


def test_a_step_uses_no_operation_that_torch_calls_nondeterministic(setup):
    args, loaded, data, state = setup("--snr-gamma", 5, "--noise-offset", 0.1, "--text-lora")
    torch.use_deterministic_algorithms(True)  # any such operation is an error then
    try:
        loss = gradients(loaded, [data], None, state, args)
        train.optimizer_step(state, args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite()


def test_min_snr_weighs_the_loss_of_a_step(setup):
    args, loaded, data, state = setup("--snr-gamma", 5, "--batch-size", 1, "--prompt-dropout", 0)
    batch = train.make_batch([data], 1000, 0, range(1), args)
    inputs = (loaded, batch.latents, batch.noise, batch.timesteps)
    noisy, target, weight = sample.noised_and_target(*inputs, snr_gamma=5)
    cond = train.text_condition(loaded, batch, args)
    prediction = sample.denoise(loaded, noisy, batch.timesteps, cond)
    plain = (prediction - target).square().mean()
    loss = gradients(loaded, [data], None, state, args)
    assert abs(weight.item() - 1) > 0.05
    assert loss.item() == pytest.approx((weight * plain).item(), rel=1e-4)


def test_noise_offset_shifts_whole_channels(setup):
    args, loaded, data, _ = setup("--batch-size", 4)
    plain = train.make_batch([data], 1000, 0, range(4), args).noise
    args.noise_offset = 0.5
    shift = train.make_batch([data], 1000, 0, range(4), args).noise - plain
    assert shift.flatten(2).std(2).max() < 1e-5 and shift[:, :, 0, 0].std() > 0.2


def test_linear_falls_to_zero(setup):
    args, *_ = setup("--steps", 100, "--warmup", 10, "--lr", 2.0, "--lr-schedule", "linear")
    assert [train.learning_rate(step, args) for step in (10, 55, 99)] == pytest.approx(
        [2, 1, 2 / 90]
    )


def test_weight_decay_reaches_the_optimiser(setup):
    assert setup("--weight-decay", 0.3)[3].optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize("ema", [0, 0.05])
def test_the_average_is_capped_and_can_be_off(ema, setup):
    args, _, _, state = setup("--ema", ema, "--lr", 0.1)
    weights, before = list(state.weights.values()), [e.clone() for e in state.ema.values()]
    for w in weights:
        w.grad = torch.ones_like(w)
    train.optimizer_step(state, args)
    for e, w, b in zip(state.ema.values(), weights, before, strict=True):
        torch.testing.assert_close(e, ema * b + (1 - ema) * w.data)


def test_without_a_limit_nothing_is_clipped(setup):
    args, _, _, state = setup("--max-grad-norm", 0)
    weights, seen = list(state.weights.values()), []
    for w in weights:
        w.grad = torch.ones_like(w)
    state.optimizer.register_step_pre_hook(lambda *_: seen.append(weights[0].grad.min().item()))
    train.optimizer_step(state, args)
    assert seen == [1.0]


def test_validation_looks_evenly_at_all_timesteps(setup, monkeypatch):
    args, loaded, data, _ = setup()
    seen, whole = [], train.noised_and_target
    monkeypatch.setattr(
        train,
        "noised_and_target",
        lambda base, x, noise, t, *more: seen.extend(t.tolist()) or whole(base, x, noise, t, *more),
    )
    train.validation_loss(loaded, data, args)
    assert sorted(t * 64 // 1000 for t in seen) == list(range(64))


def test_the_perceptual_loss_counts_by_its_weight(setup):
    losses = []
    for weight in (0, 1, 2):
        args, loaded, data, state = setup("--perceptual-weight", weight, "--batch-size", 24)
        perceptual = train.load_perceptual(loaded, args)
        losses.append(gradients(loaded, [data], perceptual, state, args).item())
    added = losses[1] - losses[0]
    assert added > losses[0] * 0.0001
    assert losses[2] - losses[0] == pytest.approx(2 * added, rel=1e-2)


def test_adapters_drop_out_while_they_learn(setup):
    args, loaded, _, state = setup("--dropout", 0.5)
    assert {
        m.p
        for m in loaded.unet.modules()
        if isinstance(m, torch.nn.Dropout)
        and m
        in [
            layer.lora_dropout
            for layer in loaded.unet.modules()
            if isinstance(layer, lora.LoRALayer)
        ]
    } == {0.5}
    layer = next(layer for layer in loaded.unet.modules() if isinstance(layer, lora.LoRALinear))
    torch.nn.init.ones_(layer.lora_B.weight)
    x = torch.ones(1, layer.in_features)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_what_is_kept_for_a_test_is_never_learnt_from(flags, tmp_path, run, monkeypatch):
    seen, whole = [], train.make_data
    monkeypatch.setattr(
        train, "make_data", lambda base, rows, *more: seen.append(rows) or whole(base, rows, *more)
    )
    flags += ["--test-split", 0.3, "--epochs", 2, "--batch-size", 2, "--accumulate", 2]
    run(train, *flags, "--out", tmp_path)
    split = {row["file_name"]: row["split"] for row in metrics.read_table(tmp_path / "split.csv")}
    assert set(split.values()) == {"train", "val", "test"}
    assert [{split[row.file_name] for row in rows} for rows in seen] == [{"train"}, {"val"}]
    last = log_of(tmp_path)[-1]
    assert last["step"] == math.ceil(2 * len(seen[0]) / 4)
    assert last["epoch"] == pytest.approx(4 * last["step"] / len(seen[0]), abs=1e-3)


def test_fid_is_a_frechet_distance_and_kid_a_kid(setup, monkeypatch):
    args, loaded, data, _ = setup("--val-steps", 1)
    texture = train.load_features("texture", CPU)
    monkeypatch.setattr(train, "load_features", lambda *_: texture)
    monkeypatch.setattr(train, "kid", lambda *_: (1.0, 0.1))
    monkeypatch.setattr(train, "frechet", lambda *_: 2.0)
    distances = []
    for name in ("kid", "fid"):
        args.select_by = name
        distances.append(train.set_distance(loaded, data, args))
    assert distances == [1, 2]


def test_pictures_are_drawn_while_training_as_the_flags_have_it(setup, monkeypatch):
    flags = ["--val-steps", 4, "--val-guidance-scale", 3, "--seed", 5, "--batch-size", 2]
    args = setup(*flags)[0]
    calls = []
    monkeypatch.setattr(train, "generate", lambda *given, **how: calls.append((given, how)) or [])
    base = SimpleNamespace(device=CPU)
    train.draw_pictures(base, ["job"], args)
    settings = sample.Settings(steps=4, guidance_scale=3.0, height=64, width=64)
    assert calls == [((base, ["job"], settings, 2, 5), {})]


def test_compile_is_asked_of_the_unet(flags, tmp_path, run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: asked.append(type(module).__name__)
    )
    monkeypatch.setattr(train, "fit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, *flags, "--compile", "--out", tmp_path)
    assert asked == ["UNet2DConditionModel"]


def test_images_a_second_count_the_whole_batch_and_a_good_step_forgives_the_bad_ones_before(
    setup, tmp_path, monkeypatch
):
    args, _, _, state = setup("--batch-size", 2, "--accumulate", 3, "--out", tmp_path)
    log = train.Log(state, args)
    nan = float("nan")
    log.clock = 2.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: 12.0)
    state.step = 5
    for loss, norm in ([nan, 1.0], [nan, 1], [1, 1], [nan, 1], [1, nan]):
        log.add_step(torch.tensor(float(loss)), torch.tensor(float(norm)))
    log.write_steps(state, args)
    assert [line["images_per_second"] for line in log_of(tmp_path)] == [5 * 6 / 10] * 5
    assert state.bad_steps == 2
    log.add_step(torch.ones(()), torch.ones(()))
    log.write_steps(state, args)
    assert state.bad_steps == 0


def test_the_log_is_written_as_often_as_asked_and_where_something_is_kept(
    flags, tmp_path, run, monkeypatch
):
    written = []
    write_steps = train.Log.write_steps

    def watched(log, state, args):
        written.append(state.step)
        return write_steps(log, state, args)

    monkeypatch.setattr(train.Log, "write_steps", watched)
    run(train, *flags, "--out", tmp_path)
    assert written == [3, 5, 6, 9, 10, 12]


def test_gradients_are_checkpointed_where_asked(setup):
    args, *_ = setup("--gradient-checkpointing")
    assert train.prepare_base(args, CPU).unet.is_gradient_checkpointing


# ---------------------------------------------------------------- nothing is lost


def test_a_run_killed_at_any_instant_ends_with_the_same_bytes_as_one_never_stopped(flags, tmp_path):
    flags = [*flags, "--dropout", 0.1, "--steps", 60]
    assert launch(*flags, "--out", tmp_path / "whole").returncode == 0
    started = time.monotonic()
    for kill in range(3):
        process = subprocess.Popen(
            command(*flags, "--out", tmp_path / "killed"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wanted = (
            4 + 15 * kill
        )  # kill at a moment after this many steps, wherever in its work the run then is
        while process.poll() is None and time.monotonic() - started < 120:
            steps = [
                int(path.stem[5:])
                for path in (tmp_path / "killed" / "checkpoints").glob("step-*.pt")
            ]
            if max(steps, default=0) >= wanted:
                time.sleep(0.013 * kill)
                break
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for path in (tmp_path / "killed" / "checkpoints").glob("*.pt"):
            torch.load(path, weights_only=True)
    assert launch(*flags, "--out", tmp_path / "killed").returncode == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    whole, killed = log_of(tmp_path / "whole"), log_of(tmp_path / "killed")
    assert [(x["step"], x["loss"]) for x in whole] == [(x["step"], x["loss"]) for x in killed]
    assert not [path for path in (tmp_path / "killed").rglob(".*.tmp")]


def test_going_back_to_an_earlier_checkpoint_cuts_the_log_back_and_ends_with_the_same_bytes(
    flags, tmp_path, run
):
    run(train, *flags, "--out", tmp_path)
    before, lines = results(tmp_path), [(line["step"], line["loss"]) for line in log_of(tmp_path)]
    run(train, *flags, "--out", tmp_path, "--resume", tmp_path / "checkpoints" / "step-00000010.pt")
    assert [(line["step"], line["loss"]) for line in log_of(tmp_path)] == lines and results(
        tmp_path
    ) == before


def test_a_folder_of_checkpoints_stands_for_its_latest(flags, tmp_path, refused):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    line = refused(train, *flags, "--resume", folder, "--out", tmp_path / "run")
    assert f"there is no {folder}/latest.pt: give" in line
    args = SimpleNamespace(resume=str(folder), out="runs/other")
    assert train.checkpoint_path(args) == folder / "latest.pt"


@pytest.mark.parametrize("word", ["latest", "best"])
def test_a_checkpoint_that_is_asked_for_by_name_must_be_there(word, flags, tmp_path, refused):
    line = refused(train, *flags, "--resume", word, "--out", tmp_path)
    assert f"there is no {tmp_path}/checkpoints/{word}.pt: give" in line


def test_a_termination_signal_saves_and_exits_130(flags, tmp_path):
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(
            command(*flags, "--steps", 5000, "--out", tmp_path),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    while not list(tmp_path.glob("checkpoints/step-*.pt")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "saved" in said
    assert (tmp_path / "stderr").read_text().count("\nstopping after this step, saving\n") == 1
    latest = tmp_path / "checkpoints" / "latest.pt"
    assert f"sample.py --checkpoint {latest} --prompt 'a " in said
    stopped = int(said.split("stopped at step ")[1].split(",")[0])
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["step"] == stopped


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_good(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path, "--steps", 5)
    before = results(tmp_path)
    limit = (tmp_path / "checkpoints" / "latest.pt").stat().st_size // 2
    more = ["--out", tmp_path, "--steps", 12, "--lr-schedule", "constant"]
    full = launch(
        *flags,
        *more,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.returncode == 2 and full.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in full.stderr and str(tmp_path) in full.stderr
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["step"] == 5
    assert results(tmp_path) == before


def test_a_full_gpu_is_one_line_that_names_the_flags_to_try(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "fit", full)
    monkeypatch.setattr(
        signal, "signal", lambda *_: None
    )  # guarded's handler is not this process's
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        train.run_script(train.main, train.parse_args)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert "error: " in line  # a progress bar may have cleared the line before it
    assert "--batch-size" in line
    assert "--gradient-checkpointing" in line


def test_a_run_goes_on_only_with_the_data_that_it_began_with(flags, images, tmp_path, run, refused):
    for name in ("a", "b"):
        shutil.copytree(images, tmp_path / name)
    names = sorted(
        path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.png")
    )
    (tmp_path / "a" / "metadata.csv").write_text(
        "\n".join(["file_name,label", *(f"{name},x" for name in names)])
    )
    flags = [
        *flags[:2],
        *flags[4:],
        "--data",
        tmp_path / "a",
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    run(train, *flags, "--val-data", tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    (tmp_path / "c" / "calm" / "0.png").unlink()
    words = "data: not the same images, captions, labels or weights"
    assert f"the validation {words}. Give" in refused(train, *flags, "--val-data", tmp_path / "c")
    (tmp_path / "a" / "metadata.csv").write_text(
        "\n".join(["file_name,label", *(f"{name},x" for name in names[::-1])])
    )
    assert f"the training {words}. Give" in refused(train, *flags, "--val-data", tmp_path / "b")


def test_two_sets_with_the_same_names_are_told_apart_in_the_split(flags, images, tmp_path, run):
    shutil.copytree(images, tmp_path / "b")
    (tmp_path / "b" / "calm" / "0.png").rename(tmp_path / "b" / "calm" / "new.png")
    run(train, *flags, "--val-data", tmp_path / "b", "--steps", 1, "--out", tmp_path / "out")
    for folder, split in ((images, "train"), (tmp_path / "b", "val")):
        rows = train.list_images(str(folder))
        metrics.read_split(rows, tmp_path / "out" / "split.csv")
        assert {row.split for row in rows} == {split}


def test_a_run_begun_anew_keeps_no_grid_of_the_run_before_and_leaves_foreign_files_alone(
    flags, tmp_path, run
):
    flags = [*flags, "--val-steps", 1, "--out", tmp_path]
    run(train, *flags, "--val-samples", 1)
    before = (tmp_path / "samples" / "step-00000012.png").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "other").mkdir()
    for place in (tmp_path / "other", tmp_path / "checkpoints"):
        place.mkdir(exist_ok=True)
        (place / ".step-00000001.pt.123.tmp").write_bytes(b"torn")
    run(train, *flags, "--val-samples", 2, "--steps", 6)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000006.png"]
    assert before and (tmp_path / "other" / ".step-00000001.pt.123.tmp").exists()
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_a_second_run_in_one_folder_is_refused(flags, tmp_path, refused):
    with train.lock(tmp_path):
        assert "another run" in refused(train, *flags, "--out", tmp_path)


def children(pid):
    """The processes that `pid` started, from the kernel's table."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            found += [int(path.parent.name)] * (int(rest.split()[1]) == pid)
    return found


def agent(*torchrun_flags):
    """Start torchrun in the background, as README's job does."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, torchrun_flags)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


@pytest.fixture(scope="module")
def of_two(base, images, tmp_path_factory):
    """Flags of a run in two processes, and what it leaves if nothing kills it."""
    flags = [*quick_flags(base, images), "--batch-size", 4, "--steps", 40]
    whole = tmp_path_factory.mktemp("whole")
    done = launch(*flags, "--out", whole, processes=2)
    assert done.returncode == 0, done.stderr
    return flags, results(whole)


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs Linux's /proc to find a rank's process"
)
@pytest.mark.parametrize("dies", ["a rank", "a machine"])
def test_torchrun_brings_back_what_was_killed_and_nothing_is_lost(dies, of_two, tmp_path):
    flags, whole = of_two
    run = ["--max-restarts=3", "train.py", *flags, "--out", tmp_path / "killed"]
    if dies == "a rank":
        running = [agent("--nproc_per_node=2", *run)]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meet = f"--rdzv_endpoint=localhost:{free.getsockname()[1]}"
        machine = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", meet]
        running = [agent(*machine, f"--rdzv_conf=is_host={host}", *run) for host in (1, 0)]
    while (
        not (tmp_path / "killed" / "checkpoints" / "latest.pt").exists()
        and running[0].poll() is None
    ):
        time.sleep(0.01)
    if dies == "a rank":
        os.kill(children(running[0].pid)[-1], signal.SIGKILL)
    else:  # the one that does not hold the meeting place, and what runs on it; then it comes back
        gone = running.pop()
        for pid in (*children(gone.pid), gone.pid):
            os.kill(pid, signal.SIGKILL)
        gone.wait()
        running.append(agent(*machine, "--rdzv_conf=is_host=0", *run))
    assert [each.wait(timeout=200) for each in running] == [0] * len(running)
    assert results(tmp_path / "killed") == whole


# ---------------------------------------------------------------- what is refused


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def damage(kind, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "pickle bomb":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "pickle bomb in torch's form":
        torch.save({"format": 1, "args": Bomb()}, path)
    elif kind == "of another program":
        torch.save({"model": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    "kind", ["truncated", "pickle bomb", "pickle bomb in torch's form", "of another program"]
)
def test_a_damaged_checkpoint_is_refused_and_never_unpickled(
    kind, flags, tmp_path, run, refused, monkeypatch
):
    run(train, *flags, "--out", tmp_path / "run", "--steps", 5)
    before = results(tmp_path / "run")
    damage(kind, tmp_path / "run" / "checkpoints" / "latest.pt")
    monkeypatch.chdir(tmp_path)
    assert "latest.pt" in refused(train, *flags, "--out", tmp_path / "run", "--steps", 6)
    assert not (tmp_path / "exploded").exists() and results(tmp_path / "run") == before


def test_the_end_of_another_run_is_a_result_and_a_damaged_log_no_hindrance(flags, tmp_path, run):
    run(train, *flags, "--out", tmp_path / "a")
    run(
        train,
        *flags,
        "--out",
        tmp_path / "b",
        "--resume",
        tmp_path / "a" / "checkpoints" / "latest.pt",
    )
    assert results(tmp_path / "a")[1] == results(tmp_path / "b")[1]
    lines = (tmp_path / "a" / "log.jsonl").read_text()
    (tmp_path / "a" / "log.jsonl").write_text(lines + '"step"\n{"step": null}\n{"step": 1, [}')
    run(train, *flags, "--out", tmp_path / "a", "--steps", 13, "--lr-schedule", "constant")
    assert [line["step"] for line in log_of(tmp_path / "a")] == list(range(1, 14))


def test_a_grid_that_a_kill_prevented_is_drawn_when_the_run_goes_on(
    flags, tmp_path, run, monkeypatch
):
    flags = [*flags, "--out", tmp_path, "--val-samples", 1, "--val-steps", 1, "--save-every", 6]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "draw_grid", killed)
    with pytest.raises(KeyboardInterrupt):
        run(train, *flags)
    monkeypatch.undo()
    run(train, *flags)
    assert [path.name for path in sorted(tmp_path.glob("samples/*"))] == [
        "step-00000006.png",
        "step-00000012.png",
    ]


def test_a_checkpoint_of_another_rank_base_batch_or_data_is_refused_by_name(
    flags, tmp_path, run, refused
):
    run(train, *flags, "--out", tmp_path)
    before = [
        *results(tmp_path),
        (tmp_path / "split.csv").read_bytes(),
        (tmp_path / "args.json").read_bytes(),
    ]
    more = [*flags, "--out", tmp_path, "--steps", 20]
    assert "--val-split" in refused(train, *more, "--val-split", 0.5)
    assert "--rank: 2 before, 4 now" in refused(train, *more, "--rank", 4)
    line = refused(train, *more, "--base", "tiny")
    assert "--base: " in line and "the base's files: not the same." in line
    assert "processes: 8 before, 6 now" in refused(train, *more, "--batch-size", 6)
    assert "no-such.pt" in refused(train, *more, "--resume", "no-such.pt")
    shutil.copytree(flags[3], tmp_path / "more")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "more" / "sore" / "new.png")
    assert "the training data: " in refused(train, *more, "--data", tmp_path / "more")
    assert [
        *results(tmp_path),
        (tmp_path / "split.csv").read_bytes(),
        (tmp_path / "args.json").read_bytes(),
    ] == before


@pytest.mark.parametrize(
    "change, said",
    [
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--prompt", "a {nonsense}"], "nonsense"),
        (["--caption-column", "words"], "words"),
        (["--method", "magic"], "magic"),
        (["--rank", "-4"], "--rank: -4"),
        (["--rank", "four"], "four"),
        (["--lr", "nan"], "--lr: nan"),
        (["--resolution", "4"], "--resolution: 4"),
        (["--targets", "to_nowhere"], "to_nowhere"),
        (["--base", "no/such/base"], "no/such/base"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--val-data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_line(change, said, flags, tmp_path, refused):
    assert said in refused(train, *flags, "--out", tmp_path / "out", *change)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_an_empty_folder_and_too_few_images_are_refused(flags, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(
        train, *flags, "--out", tmp_path / "out", "--data", tmp_path / "empty"
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "empty" / "one.png")
    line = refused(
        train, *flags, "--out", tmp_path / "out", "--prompt", "x", "--data", tmp_path / "empty"
    )
    assert "too few to split" in line and "or --val-split 0" in line


def test_a_folder_that_cannot_be_written_is_refused(flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = launch(*flags, "--out", tmp_path / "file" / "run")
    assert said.returncode == 2 and said.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (tmp_path / "file").read_text() == "in the way"


def test_unreadable_images_are_named_and_skipped_or_refused(
    flags, images, tmp_path, run, refused, capsys
):
    data = tmp_path / "data"
    data.mkdir()
    for i, path in enumerate(sorted(Path(images).rglob("*.png"))):
        (data / f"{i}.png").write_bytes(path.read_bytes())
    (data / "broken.png").write_bytes(b"\x89PNG not really")
    flags = [
        *flags,
        "--data",
        data,
        "--prompt",
        "x",
        "--val-split",
        0.3,
    ]  # one of 25, wherever it falls
    run(train, *flags, "--out", tmp_path / "a", "--steps", 2)
    assert "skipped: " in (said := capsys.readouterr().err) and "broken.png" in said
    # and the run goes on, though the file is bad as before
    run(train, *flags, "--out", tmp_path / "a", "--steps", 4, "--lr-schedule", "constant")
    assert log_of(tmp_path / "a")[-1]["step"] == 4
    assert "broken.png" in refused(train, *flags, "--out", tmp_path / "b", "--strict")
    (data / "worse.png").write_bytes(b"")
    assert "cannot be read" in refused(train, *flags, "--out", tmp_path / "c")


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "tests" / "recipes").glob("*.txt")), ids=lambda path: path.stem
)
def test_every_recipe_runs(recipe, base, tmp_path, run):
    labels, data = ["a|b", "b", "", "c"] * 5, tmp_path / "data"
    data.mkdir()
    for i in range(20):
        Image.new("RGB", (64, 64), (i, 2 * i, 90)).save(data / f"{i}.png")
    rows = [f"{i}.png,{labels[i]},p{i},OCT,thick retina number {i}" for i in range(20)]
    (data / "metadata.csv").write_text("\n".join(["path,labels,patient_id,modality,Text", *rows]))
    run(
        train,
        f"@{recipe}",
        "--base",
        base,
        "--data",
        data,
        "--resolution",
        64,
        "--steps",
        2,
        "--val-samples",
        0,
        *(["--class-data", data] if "--method dreambooth" in recipe.read_text() else []),
        "--out",
        tmp_path / "run",
    )
    assert (
        tmp_path / "run" / "model"
        if "--method full" in recipe.read_text()
        else tmp_path / "run" / "lora.safetensors"
    ).exists()


# ---------------------------------------------------------------- methods


@pytest.fixture
def dreambooth(flags, tmp_path):
    """The flags of a DreamBooth run, whose class images are in a folder."""
    for i in range(20):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 20 + i).save(tmp_path / "class" / f"{i}.png")
    return [
        *flags,
        *("--method", "dreambooth", "--class-prompt", "a foot", "--steps", 3),
        *("--class-data", tmp_path / "class"),
    ]


def test_dreambooth_trains_on_the_class_images_too(flags, dreambooth, tmp_path, run):
    run(train, *dreambooth, "--out", tmp_path / "both")
    run(train, *dreambooth, "--out", tmp_path / "without", "--prior-weight", 0)
    run(train, *flags, "--out", tmp_path / "lora", "--steps", 3)
    both, without, plain = (
        load_file(tmp_path / name / "lora-last.safetensors") for name in ("both", "without", "lora")
    )
    for name in plain:
        torch.testing.assert_close(without[name], plain[name])
    assert any(not torch.allclose(both[name], plain[name]) for name in plain)


@pytest.mark.parametrize("folder", ["too few", "missing"])
def test_where_class_images_are_missing_the_command_that_draws_them_is_printed(
    folder, dreambooth, tmp_path, refused
):
    (tmp_path / "class" / "7.png").unlink()
    if folder == "missing":
        shutil.rmtree(tmp_path / "class")
    line = refused(train, *dreambooth, "--out", tmp_path / "run")
    assert "sample.py --base" in line and "--prompt 'a foot' --num-images 20" in line
    assert f"--out {tmp_path / 'class'}" in line


def test_class_images_count_by_their_weight(setup, dreambooth, tmp_path, run, monkeypatch):
    args, loaded, data, state = setup()

    def loss(share):
        streams = [data, replace(data, name="class", weight=share * data.weight)]
        return gradients(loaded, streams, None, state, args).item()

    assert loss(0.5) - loss(0) == pytest.approx((loss(1) - loss(0)) / 2, rel=1e-3)
    seen = []
    monkeypatch.setattr(train, "fit", lambda _, streams, *more: seen.extend(streams) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, *dreambooth, "--prior-weight", 0.5, "--out", tmp_path / "run")
    assert [data.name for data in seen] == ["data", "class"]
    assert set(seen[1].weight.tolist()) == {0.5}
    assert {row.caption for row in seen[1].rows} == {"a foot"}


@pytest.fixture
def weighted(flags, images, tmp_path):
    """weighted(cells): the flags of a run whose table has these weights, and copies of an image."""

    def make(cells):
        folder = tmp_path / "weighted"
        folder.mkdir(exist_ok=True)
        lines = ["file_name,text,quality"]
        for i, cell in enumerate(cells):
            Image.effect_noise((64, 64), 20 + i).save(folder / f"{i}.png")
            lines.append(f"{i}.png,a foot,{cell}")
        (folder / "metadata.csv").write_text("\n".join(lines))
        more = ["--data", folder, "--val-split", 0, "--weight-column", "quality"]
        return [*flags[:2], *flags[6:], *more]

    return make


def test_the_loss_of_a_row_counts_by_its_weight(setup, weighted, run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "fit", lambda _, streams, *more: seen.extend(streams) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(train, *weighted(["3", "", "1", "0.5", " 0 "]), "--out", tmp_path / "run")
    expected = torch.tensor([3, 1.125, 1, 0.5, 0]) / 1.125
    torch.testing.assert_close(seen[0].weight, expected)

    args, loaded, data, state = setup("--batch-size", 24)
    whole = gradients(loaded, [data], None, state, args).item()
    data.weight = torch.full((24,), 2.0)
    double = gradients(loaded, [data], None, state, args).item()
    assert double == pytest.approx(2 * whole)


@pytest.mark.parametrize(
    "cells, said",
    [
        (["1", "-0.5"], "1.png: -0.5"),
        (["good", "1"], "0.png: good"),
        (["nan", "1"], "0.png: nan"),
    ],
)
def test_a_weight_that_is_no_number_from_0_up_is_one_line(cells, said, weighted, tmp_path, refused):
    line = refused(train, *weighted(cells), "--out", tmp_path / "run")
    assert "--weight-column" in line and said in line


def test_a_weight_column_that_is_not_there_is_one_line(flags, weighted, tmp_path, refused):
    for more in (flags, weighted(["1"])):
        line = refused(train, *more, "--weight-column", "reward", "--out", tmp_path / "run")
        assert "--weight-column reward" in line


def test_a_new_word_is_learned_and_diffusers_and_sample_read_it(flags, base, tmp_path, run):
    from diffusers import StableDiffusionPipeline

    run(
        train,
        *flags,
        "--method",
        "textual-inversion",
        "--prompt",
        "a photo of <sore>",
        "--token",
        "<sore>",
        "--init-word",
        "foot",
        "--vectors",
        2,
        "--lr",
        0.1,
        "--out",
        tmp_path,
    )
    learned = load_file(tmp_path / "embeddings.safetensors")
    assert list(learned) == ["<sore>"] and learned["<sore>"].shape == (2, 32)
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    known = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    pipe.load_textual_inversion(str(tmp_path / "embeddings.safetensors"))
    ours = sample.load_base(base, CPU)
    sample.use_extra(ours, {"tokens": "<sore>"}, learned)
    theirs = pipe.text_encoder(
        pipe.tokenizer(
            pipe.maybe_convert_prompt("a photo of <sore>", pipe.tokenizer),
            padding="max_length",
            return_tensors="pt",
        ).input_ids
    )[0]
    torch.testing.assert_close(
        sample.encode_text(ours, ["a photo of <sore>"])["encoder_hidden_states"], theirs
    )
    assert torch.equal(
        ours.text_encoders[0].get_input_embeddings().weight, known
    )  # the old words are as they were
    run(
        sample,
        "--base",
        base,
        "--lora",
        tmp_path / "embeddings.safetensors",
        "--prompt",
        "a <sore>",
        "--num-images",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "drawn",
    )


def test_a_new_word_starts_as_the_word_that_is_named(setup):
    word = ["--method", "textual-inversion", "--prompt", "a <concept>", "--vectors", 2]
    _, loaded, _, state = setup(*word, "--init-word", "sore")
    tokens = loaded.tokenizers[0]("sore", add_special_tokens=False).input_ids
    known = loaded.text_encoders[0].get_input_embeddings().weight[tokens].mean(0)
    assert torch.equal(state.weights["<concept>"], torch.stack([known, known]))


def test_the_text_encoder_is_adapted_too_and_diffusers_reads_it(flags, base, tmp_path, run):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    run(train, *flags, "--text-lora", "--lr", 0.05, "--out", tmp_path)
    names = [
        name
        for name in load_file(tmp_path / "lora.safetensors")
        if name.startswith("text_encoder.")
    ]
    assert len(names) == 2 * 8 and all(
        name.startswith("text_encoder.text_model.encoder.layers.") for name in names
    )
    pairs, _, _ = lora.load(tmp_path / "lora.safetensors")
    ours, pipe = (
        sample.load_base(base, CPU),
        StableDiffusionPipeline.from_pretrained(base, safety_checker=None),
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    ids = sample.tokenize(ours, ["a sore foot"])["ids"]
    plain = sample.encode_text(ours, ["a sore foot"])["encoder_hidden_states"]
    with lora.merged(ours.parts(), [(pairs, 1.0)]):
        adapted = sample.encode_text(ours, ["a sore foot"])["encoder_hidden_states"]
    torch.testing.assert_close(adapted, pipe.text_encoder(ids)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of random weights, as a folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sore", "calm", "foot"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
        )
    ).save_pretrained(folder)
    return str(folder)


def test_another_text_encoder_reads_the_captions_behind_a_trained_projection(
    flags, bert, tmp_path, run
):
    run(train, *flags, "--text-encoder", bert, "--text-length", 12, "--lr", 0.01, "--out", tmp_path)
    _, metadata, extra = lora.load(tmp_path / "lora.safetensors")
    assert metadata["text_encoder"] == bert and extra["text_projection.weight"].shape == (32, 24)
    first = torch.load(tmp_path / "checkpoints" / "step-00000006.pt", weights_only=True)["weights"]
    last = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["weights"]
    assert not torch.equal(first["text_projection.weight"], last["text_projection.weight"])
    run(
        sample,
        "--lora",
        tmp_path / "lora.safetensors",
        "--prompt",
        "a sore foot",
        "--num-images",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "drawn",
    )
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_the_padding_of_another_text_encoder_is_not_read(base, bert):
    ours = sample.load_base(base, CPU)
    sample.use_text_encoder(ours, bert, 12)
    cond = sample.encode_text(ours, ["a sore foot"])
    alone = ours.text_encoders[0](
        **ours.tokenizers[0](["a sore foot"], return_tensors="pt")
    ).last_hidden_state
    torch.testing.assert_close(
        cond["encoder_hidden_states"][:, :5], ours.text_projection(alone), rtol=1e-4, atol=1e-5
    )
    assert cond["encoder_attention_mask"].tolist() == [[1.0] * 5 + [0.0] * 7]


def test_the_length_of_texts_is_the_one_asked_for(setup, bert):
    args = setup()[0]
    args.text_encoder, args.text_length = bert, 12
    assert sample.tokenize(train.prepare_base(args, CPU), ["a sore foot"])["ids"].shape == (1, 12)


def test_an_encoder_that_cannot_serve_is_one_line(flags, base, sdxl, bert, tmp_path, refused):
    from transformers import T5Config, T5Model

    other = [*flags, "--out", tmp_path / "out"]
    assert "needs both" in refused(train, *other, "--base", sdxl, "--text-encoder", bert)
    shutil.copytree(bert, tmp_path / "t5")
    T5Model(
        T5Config(vocab_size=9, d_model=24, d_kv=12, d_ff=24, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for folder in (Path(base) / "text_encoder", tmp_path / "t5"):
        assert "cannot be used" in refused(train, *other, "--text-encoder", folder)


def test_training_goes_on_from_an_adapter_at_another_resolution(flags, tmp_path, run, refused):
    run(train, *flags, "--out", tmp_path / "a", "--alpha", 4)
    more = [
        *flags,
        "--resolution",
        96,
        "--init-lora",
        tmp_path / "a" / "lora-last.safetensors",
        "--out",
    ]
    run(train, *more, tmp_path / "b", "--steps", 1, "--lr", 1e-12, "--alpha", 4)
    a, b = (load_file(tmp_path / x / "lora-last.safetensors") for x in "ab")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a) and any(
        v.any() for k, v in a.items() if "_B" in k
    )
    assert "--init-lora" in refused(train, *more, tmp_path / "c", "--rank", 4)


@pytest.mark.parametrize("kind", ["vae", "vgg"])
def test_the_perceptual_loss_reaches_the_adapter_and_only_where_the_image_shows(
    kind, setup, monkeypatch, tmp_path
):
    if kind == "vgg":
        from torchvision.models import vgg16

        torch.manual_seed(0)
        torch.save(vgg16(weights=None).state_dict(), tmp_path / "vgg.pth")
        monkeypatch.setattr(train, "need_weights", lambda *_: str(tmp_path / "vgg.pth"))
    args, loaded, data, state = setup("--perceptual-weight", 0.1, "--perceptual", kind)
    for w in state.weights.values():
        w.data.add_(0.05)
    perceptual = train.load_perceptual(loaded, args)
    draw = torch.Generator().manual_seed(0)
    batch = train.Batch(
        latents=data.mean[:4, 0],
        noise=torch.randn(4, 4, 8, 8, generator=draw),
        timesteps=torch.tensor([50, 200, 600, 900]),
        text={key: values[data.caption[:4]] for key, values in data.text.items()},
        sizes=data.sizes[:4, 0],
        weight=data.weight[:4],
    )
    t = batch.timesteps
    noisy, _, _ = sample.noised_and_target(loaded, batch.latents, batch.noise, t)
    cond = train.text_condition(loaded, batch, args)
    prediction = sample.denoise(loaded, noisy, t, cond)
    loss = perceptual(sample.predicted_latents(loaded, noisy, prediction, t), batch)
    assert (loss[:2] > 0).all() and not loss[2:].any()
    loss.sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in state.weights.values())
    clean = sample.predicted_latents(loaded, noisy, batch.noise, t)
    torch.testing.assert_close(clean, batch.latents, rtol=1e-3, atol=1e-3)
    assert perceptual(batch.latents, batch).abs().max() < 1e-8


def test_patience_ends_a_run_that_no_longer_gets_better(flags, tmp_path, run, monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.1])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    long = [*flags, "--steps", 100, "--validate-every", 4, "--patience", 2, "--out", tmp_path]
    run(train, *long)
    assert log_of(tmp_path)[-1]["step"] == 16
    assert lora.load(tmp_path / "lora.safetensors")[1]["steps"] == 8
    before = results(tmp_path)
    run(train, *long)
    assert results(tmp_path) == before and log_of(tmp_path)[-1]["step"] == 16


def test_patience_counts_validations_that_gain_next_to_nothing(flags, tmp_path, run, monkeypatch):
    losses = iter([1.0, 0.9999, 0.9995, 0.1])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    long = [*flags, "--steps", 100, "--validate-every", 4, "--patience", 2, "--out", tmp_path]
    run(train, *long)
    assert log_of(tmp_path)[-1]["step"] == 12
    assert lora.load(tmp_path / "lora.safetensors")[1]["steps"] == 12  # still the best


def test_small_gains_add_up():
    history = [{"val_loss": 1 - 0.0015 * step} for step in range(9)]
    args = SimpleNamespace(select_by="val-loss", patience=2)
    assert not train.out_of_patience(SimpleNamespace(history=history), args)


def test_a_run_validates_ten_times_and_warns_below_the_bases_resolution(
    flags, tmp_path, run, capsys
):
    place = flags.index("--validate-every")
    del flags[place : place + 2]
    run(train, *flags, "--steps", 20, "--resolution", 32, "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(2, 21, 2))
    assert "--resolution 32: " in capsys.readouterr().err


def test_the_report_answers_first_and_folds_the_rest(flags, tmp_path, run, monkeypatch):
    losses = iter([0.5, 0.25, 0.3])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(losses))
    long = ["--validate-every", 4, "--val-prompts", '<b>"a" foot', "--val-samples", 1]
    long += ["--val-steps", 2, "--ema", 0.9999]
    run(train, *flags, *long, "--out", tmp_path)
    report = (tmp_path / "report.html").read_text()
    answer = "Best validation loss 0.25 at step 8 of 12; the last is 0.3."
    order = [
        answer,
        "sample.py",
        "drawn at step 12",
        "<svg",
        "--val-prompts",
        "All flags",
        ">ema<",
    ]
    places = [report.index(words) for words in order]
    assert places == sorted(places)
    assert "<b>" not in report and 'alt=""' not in report
    assert report.count("<th>") == 0 and 'scope="col"' in report
    assert "The newest pictures" in report and "Older pictures" in report
    shown = re.findall(r'src="data:image/jpeg;base64,(.*?)"', report)
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]))).width >= 160


@needs_chromium
def test_the_report_of_a_run_has_no_fault_in_a_real_browser(flags, tmp_path, run):
    run(train, *flags, "--val-samples", 1, "--val-steps", 1, "--out", tmp_path / "run")
    assert page_faults(tmp_path / "run" / "report.html", tmp_path / "phone") == []


def test_a_run_taken_back_to_an_older_checkpoint_and_killed_goes_on_from_there(
    flags, tmp_path, run, monkeypatch
):
    flags += ["--keep-last", 0]
    run(train, *flags, "--out", tmp_path)
    whole, log = results(tmp_path), log_of(tmp_path)
    (tmp_path / "link.pt").symlink_to("checkpoints/step-00000005.pt")
    for resume in (tmp_path / "checkpoints" / "step-00000012.pt", tmp_path / "link.pt"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train, "fit", lambda *_: 1 / 0)
            patch.setattr(train, "is_finished", lambda *_: False)
            run(train, *flags, "--out", tmp_path, "--resume", resume)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    run(train, *flags, "--out", tmp_path)
    assert results(tmp_path) == whole and [line["loss"] for line in log_of(tmp_path)] == [
        line["loss"] for line in log
    ]


def test_steps_that_changed_nothing_are_null_in_the_log_and_counted(
    flags, tmp_path, run, monkeypatch
):
    whole = train.accumulate_gradients

    def broken(base, streams, perceptual, state, args):
        loss = whole(base, streams, perceptual, state, args)
        return loss * float("nan") if state.step == 3 else loss

    monkeypatch.setattr(train, "accumulate_gradients", broken)
    run(train, *flags, "--out", tmp_path)
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line and line["loss"] is None] == [4]
    report = (tmp_path / "report.html").read_text()
    assert "Steps skipped because of NaN or infinity: 1." in report
    assert "newest pictures" not in report and "Older" not in report  # --val-samples 0


def test_the_model_card_has_metadata_that_the_hub_reads(flags, tmp_path, run):
    from huggingface_hub import ModelCard

    flags += ["--prompt", 'a sore "foot"', "--ethics", "EK 7/2025", "--steps", 2]
    run(train, *flags, "--out", tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.instance_prompt == 'a sore "foot"'
    assert card.data.library_name == "diffusers"
    assert card.data.license == "other"
    assert "lora" in card.data.tags
    assert card.data.base_model is None  # a folder is none of the Hub's
    digest = hashlib.sha256((tmp_path / "lora.safetensors").read_bytes()).hexdigest()
    split = [row["split"] for row in metrics.read_table(tmp_path / "split.csv")]
    for text in (
        "# lora.safetensors, trained with medlora for 2 steps\n",
        f"- training images: {split.count('train')}; patients: unknown\n",
        "- licence of these images: not stated\n- ethics approval: EK 7/2025\n",
        f"first letters of its hash: {digest[:10]}\n",
        "- steps: 2\n- epochs: 0.0\n- batch_size: 8\n",
        "not differentially private. No membership audit: needs five training and five held-out",
        "not\nfor diagnosis",
    ):
        assert text in card.text


def test_the_model_card_names_the_base_on_the_hub_and_its_licence(flags, base, tmp_path, run):
    from huggingface_hub import ModelCard

    flags += ["--base", "tiny", "--steps", 1, "--out", tmp_path, "--resolution", 64]
    run(train, *flags, "--method", "full", "--val-split", 0)
    card = ModelCard.load(tmp_path / "README.md")
    assert "- base: tiny; its licence: MIT\n" in card.text
    assert f"first letters of its hash: {sample.base_hash(tmp_path / 'model')}\n" in card.text
    assert "No membership audit: needs five training and five held-out patients" in card.text


def test_a_method_typed_behind_a_recipe_overrides_it(flags, tmp_path, run):
    (tmp_path / "recipe.txt").write_text("--method dreambooth\n--class-prompt a foot\n")
    run(
        train,
        f"@{tmp_path / 'recipe.txt'}",
        *flags,
        "--steps",
        1,
        "--method",
        "lora",
        "--out",
        tmp_path / "out",
    )
    assert json.loads((tmp_path / "out" / "args.json").read_text())["args"]["method"] == "lora"


@pytest.mark.parametrize(
    "change, said",
    [
        (["--method", "dreambooth"], "--class-prompt"),
        (["--method", "textual-inversion"], "--prompt needs the new word"),
        (["--method", "full", "--text-lora"], "--text-lora: needs --method lora"),
        (["--method", "full", "--init-lora", __file__], "error: --init-lora: needs --method lora"),
        (["--text-lora", "--text-encoder", "x"], "without --text-lora"),
        (["--text-encoder", "no/such/encoder"], "no/such/encoder"),
        (["--init-lora", "no-such.safetensors"], "no-such.safetensors"),
        (["--select-by", "fid"], "needs 50 validation images"),
        (["--perceptual-weight", "0.1", "--perceptual", "vgg"], "vgg16-397923af.pth"),
        (["--patience", "2", "--val-split", "0"], "--patience: needs --val-split"),
        (
            ["--method", "dreambooth", "--class-prompt", "a foot", "--text-encoder", "x"],
            "--text-encoder: needs --method lora",
        ),
        (
            ["--method", "textual-inversion", "--prompt", "a my thing", "--token", "my thing"],
            "needs the new word",
        ),
        (
            ["--method", "textual-inversion", "--prompt", "a <concept>", "--init-word", " "],
            "--init-word",
        ),
        (["--lr", "0"], "--lr: 0"),
        (["--resolution", "71"], "--resolution: 71: give a multiple of 8"),
    ],
)
def test_contradictions_and_missing_parts_are_one_line(change, said, flags, tmp_path, refused):
    assert said in refused(train, *flags, "--out", tmp_path / "out", *change)


def test_refining_draws_keeps_trains_and_evaluates_in_each_round(base, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(10):
        Image.effect_noise((64, 64), 20 + 9 * i).convert("RGB").save(folder / f"{i}.png")
        lines.append(f"{i}.png,a {('calm', 'sore')[i % 2]} foot")
    (folder / "metadata.csv").write_text("\n".join(lines))
    settings = {
        "SELECTOR": str(write_selector(tmp_path / "s", weights=np.zeros((388, 1)))),
        "BASE": base,
        "DATA": str(folder),
        "OUT": str(tmp_path / "out"),
        "ROUNDS": "1",
        "NUM_IMAGES": "4",
        "STEPS": "2",
        "SAMPLE": "--steps 2",
        "TRAIN": "--rank 2 --val-samples 0 --val-split 0",
        "OMP_NUM_THREADS": "1",
    }
    how = {"cwd": ROOT, "capture_output": True, "text": True, "env": {**os.environ, **settings}}
    refined = subprocess.run(["sh", "tests/refine.sh"], **how)
    assert refined.returncode == 0, refined.stderr
    for place in ("round-0", "round-1"):
        report = json.loads((tmp_path / "out" / place / "report.json").read_text())
        assert report["generated"][0]["n"] == 8
    rows = train.list_images(str(tmp_path / "out" / "round-1" / "kept"))
    assert {row.fields["synthetic"] for row in rows} == {"1", "0"}
    args = json.loads((tmp_path / "out" / "round-1" / "train" / "args.json").read_text())["args"]
    assert args["weight_column"] == "quality" and args["data"].endswith("round-1/kept")
    assert (tmp_path / "out" / "round-1" / "train" / "lora.safetensors").exists()


# ---------------------------------------------------------------- the membership audit


def audit_of(out):
    return json.loads((Path(out) / "audit.json").read_text())


def test_lower_scores_tell_members_apart_as_counted_by_hand():
    result = train.tell_apart(np.array([1.0, 2, 4]), np.array([3.0, 5, 6]), 0)
    assert result["auroc"] == pytest.approx(8 / 9)  # of nine pairs one is the wrong way round
    assert result["p"] == pytest.approx(2 / 20)  # two of 20 divisions of six are as good
    assert (result["training"], result["held_out"]) == (3, 3)
    assert train.tell_apart(np.ones(5), np.ones(7), 0)["auroc"] == 0.5


def test_the_interval_is_that_of_both_sides_drawn_again():
    draw = np.random.default_rng(0)
    members, others = draw.normal(0, 1, 60), draw.normal(0.5, 1, 40)
    result = train.tell_apart(members, others, 0)
    theirs = stats.bootstrap(
        (members, others),
        lambda a, b: 1 - stats.mannwhitneyu(a, b).statistic / 2400,
        n_resamples=1000,
        vectorized=False,
        method="percentile",
        rng=draw,
    ).confidence_interval
    assert [result["low"], result["high"]] == pytest.approx(theirs, abs=0.02)
    assert result == train.tell_apart(members, others, 0)
    assert result["p"] == stats.mannwhitneyu(members, others, alternative="less").pvalue


def test_what_the_adapter_alone_knows_better_is_found(flags, tmp_path, run, monkeypatch):
    def errors(base, data, rows, *_):
        adapter = dict(base.unet.named_parameters())
        is_learnt = any(adapter[name].any() for name in adapter if "lora_B" in name)
        known = is_learnt and data.rows[0].split == "train"
        return torch.linspace(1, 2, len(data.rows))[rows] * (0.9 if known else 1)

    flags += ["--val-split", 0.4, "--validate-every", 20, "--steps", 2, "--out", tmp_path]
    monkeypatch.setattr(train, "denoising_errors", errors)
    run(train, *flags)
    audit = audit_of(tmp_path)
    assert audit["adapter"]["auroc"] == audit["adapter"]["low"] == 1
    assert audit["adapter"]["p"] < 0.001
    assert audit["base"]["low"] < 0.5 < audit["base"]["high"]


def test_the_audit_is_told_and_done_again_changes_nothing(
    flags, tmp_path, run, monkeypatch, capsys
):
    monkeypatch.setattr(train, "LOOKS", 48)  # two timesteps, for speed
    flags += ["--val-split", 0.4, "--steps", 2, "--out", tmp_path]
    run(train, *flags)
    audit, before = (tmp_path / "audit.json").read_bytes(), results(tmp_path)
    sentence = audit_of(tmp_path)["sentence"]
    assert sentence.startswith("Someone who has this adapter can tell training images from others")
    for told in (tmp_path / "report.html", tmp_path / "README.md"):
        assert sentence in told.read_text(encoding="utf-8")
    assert sentence in capsys.readouterr().out
    (tmp_path / "audit.json").unlink()
    run(train, *flags, "--audit")
    assert (tmp_path / "audit.json").read_bytes() == audit and results(tmp_path) == before
    run(train, *flags)
    assert "is finished" in capsys.readouterr().out


def test_the_base_alone_is_the_same_whatever_was_trained(flags, tmp_path, run, monkeypatch):
    monkeypatch.setattr(train, "LOOKS", 48)
    flags += ["--val-split", 0.4, "--steps", 1, "--lr", 0.01, "--precision", "fp32"]
    controls = []
    for more in ([], ["--text-lora"], ["--method", "full"]):
        run(train, *flags, *more, "--out", tmp_path / str(len(controls)))
        controls.append(audit_of(tmp_path / str(len(controls)))["base"])
    assert controls[1] == pytest.approx(controls[0])
    assert controls[2] == pytest.approx(controls[0])


def test_without_held_out_images_a_line_says_what_the_audit_needs(flags, tmp_path, run, capsys):
    run(train, *flags, "--val-split", 0, "--out", tmp_path)
    line = "No membership audit: needs five training and five held-out patients (--val-split)."
    assert line in capsys.readouterr().out and line in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "audit.json").exists()


def test_an_audit_needs_a_run(flags, tmp_path, refused):
    assert "there is no" in refused(train, *flags, "--audit", "--out", tmp_path)


def test_a_patient_counts_once_and_a_generated_image_not_at_all(setup):
    args, _, data, _ = setup()
    for i, row in enumerate(data.rows):
        row.group = ["anna", "ben", ""][i % 3]
        if i >= 18:
            row.fields = {"synthetic": "1"}
    drawn = train.one_of_each_patient(data, args)
    names = sorted(data.rows[i].group for i in drawn)
    assert names == ["", "", "", "", "", "", "anna", "ben"]
    assert set(drawn.tolist()) >= {2, 5, 8, 11, 14, 17} and max(drawn) < 18
