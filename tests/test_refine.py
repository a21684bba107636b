"""Refinement: its losses against closed forms, its guards on a toy of two prompts with four modes each, the whole by flags."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import filter as filter_script
import metrics
import sample
import train
from conftest import ROOT, write_selector
from metrics import generator

MODES = 2 * torch.tensor([[[math.cos(a), math.sin(a)] for a in (k * math.pi / 2 + p * math.pi / 4 for k in range(4))]
                          for p in range(2)])   # (prompts, modes, 2)
SPREAD = 0.2   # of a mode


class Toy(torch.nn.Module):
    """Says the noise in points of the plane, (B, 2, 1, 1), given a prompt."""

    def __init__(self):
        super().__init__()
        sizes = [2 + 16 + 3, 128, 128, 128, 2]
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x, timesteps, encoder_hidden_states, return_dict):
        angles = timesteps[:, None] / 1000 * torch.logspace(0, 1.5, 8) * math.pi
        y = torch.cat([x.flatten(1), angles.sin(), angles.cos(), encoder_hidden_states[:, 0]], 1)
        for layer in self.blocks[:-1]:
            y = torch.nn.functional.silu(layer(y))
        return (self.blocks[-1](y)[:, :, None, None],)


def points(count, seed, bad):
    """(points (N, 2), prompts (N,)): from the modes but for a share `bad`, which is scattered."""
    g = generator(seed, "points")
    prompt, mode = torch.randint(2, (count,), generator=g), torch.randint(4, (count,), generator=g)
    clean = MODES[prompt, mode] + SPREAD * torch.randn(count, 2, generator=g)
    return torch.where(torch.rand(count, 1, generator=g) < bad, 1.4 * torch.randn(count, 2, generator=g), clean), prompt


def is_good(x, prompt):
    """Within 2.3 deviations of a mode of its prompt: (bool (N,), nearest mode (N,))."""
    distance, mode = (x[:, None] - MODES[prompt]).norm(dim=2).min(1)
    return distance < 2.3 * SPREAD, mode


def as_data(x, prompt):
    text = {"encoder_hidden_states": torch.eye(3)[:, None]}
    return train.Data([{"caption": str(p)} for p in prompt.tolist()], x[:, :, None, None], torch.zeros(len(x), 2, 1, 1), text,
                      prompt, False)


def toy_base(unet):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return sample.Base("toy", unet, torch.nn.Identity(), [], [], {}, (1 - betas).cumprod(0), 8, torch.device("cpu"), torch.float32)


@torch.no_grad()
def draw(base, count, seed, steps=25):
    """DDIM (Song et al. 2021): (points, prompts), the prompts in turn."""
    prompt = torch.arange(count) % 2
    cond = {"encoder_hidden_states": torch.eye(3)[prompt][:, None]}
    x = torch.randn(count, 2, 1, 1, generator=generator(seed, "draw"))
    times = torch.linspace(999, 0, steps + 1).long()
    for now, then in zip(times, times[1:]):
        a, b = base.alphas_cumprod[now], base.alphas_cumprod[then]
        noise = train.denoise(base, x, now.repeat(count), cond)
        x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    return x[:, :, 0, 0], prompt


@pytest.fixture(scope="module")
def taught():
    """The toy, taught on points of which 40 % are bad."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # the matrices are small
    torch.manual_seed(0)
    base, (x, prompt) = toy_base(Toy()), points(20000, 1, 0.4)
    optimizer = torch.optim.Adam(base.unet.parameters())
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 3000)
        i, t, noise = torch.randint(len(x), (256,)), torch.randint(1000, (256,)), torch.randn(256, 2, 1, 1)
        noisy, target, _ = sample.noised_and_target(base, x[i][:, :, None, None], noise, t)
        loss = (train.denoise(base, noisy, t, {"encoder_hidden_states": torch.eye(3)[prompt[i]][:, None]}) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield base.unet.state_dict()
    torch.set_num_threads(threads)


def rater(base, count, half, flipped=0.2, features=200):
    """A selector from `count` rated drawings: ridge on random features of the point and its prompt, 0 to 1; and them."""
    g = generator(7, "features")
    w, shift = torch.randn(2, features, generator=g) * 3, torch.rand(features, generator=g) * 6.3
    x, prompt = draw(base, count, f"rated {half}")
    good = is_good(x, prompt)[0] ^ (torch.rand(count, generator=generator(half, "flip")) < flipped)

    def phi(x, prompt):
        z = (x @ w + shift).cos()
        return torch.cat([z * (prompt == p)[:, None] for p in range(2)], 1)
    z = phi(x, prompt).double()
    y = good.double() - good.double().mean()
    slope = z.T @ torch.linalg.solve(z @ z.T + 30 * torch.eye(count, dtype=torch.float64), y)
    return lambda x, prompt: (phi(x, prompt).double() @ slope + good.double().mean()).clamp(0, 1).numpy(), (x, prompt, good)


def look_of(base, reward, judge, most, count=600):
    """What `refine` sees of drawn points; reward above `most` earns nothing more."""
    def look(name):
        x, prompt = draw(base, count, f"look {name}")
        seen = {"reward": np.minimum(reward(x, prompt), most), "judge": judge(x, prompt), "prompts": prompt.numpy(),
                "vectors": x.numpy(), "copied": np.zeros(count), "bands": np.zeros((count, 5)), "tints": np.zeros((count, 3)), "x": x}
        near = (x.norm(dim=1) < 4.5).numpy()
        return {**seen, "passes": seen["judge"] > 0.5, "weights": train.reward_weights(seen["reward"], seen["prompts"], near)}
    return look


def learn(seen):
    data = as_data(seen["x"], torch.tensor(seen["prompts"]))
    data.weight = torch.tensor(seen["weights"], dtype=torch.float32)
    return data


@pytest.fixture
def toy(taught, tmp_path, monkeypatch):
    """start(flag, …): a namespace of all that `refine` takes, before the first round."""
    def start(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", "--data", "-", "--base", "tiny", "--init-lora", "-", "--selector", "-",
                                         "--batch-size", "64", "--lr", "1e-3", "--steps", "200", "--rank", "4", "--targets",
                                         "all", "--out", str(tmp_path), *map(str, flags)])
        args = train.parse_args()
        args.init_lora = args.selector = None
        args.steps, args.val_prompts, args.validate_every = args.steps * args.rounds, [], 0
        base = toy_base(Toy())
        base.unet.load_state_dict(taught)
        real, val = as_data(*points(100, 2, 0)), as_data(*points(200, 3, 0))
        base_of_its_own = toy_base(Toy())
        base_of_its_own.unet.load_state_dict(taught)
        (reward, rated), (judge, _) = (rater(base_of_its_own, 150, half) for half in (0, 1))
        most = np.median(reward(real.mean[:, :, 0, 0], real.caption))
        state = train.start(base, args, None)
        return SimpleNamespace(base=base, real=real, val=val, state=state, args=args, log=lambda *_: None, reward=reward,
                               judge=judge, most=most, rated=rated)
    return start


def refine(t, reward=None, learn=learn, most=None):
    look = look_of(t.base, reward or t.reward, t.judge, t.most if most is None else most)
    train.refine(t.base, t.real, t.val, t.state, t.args, t.log, look, learn)


def outcome(t, weights):
    """(share of good points, entropy of the modes among them, held-out loss) with these weights."""
    with train.swapped(t.state, t.base, weights):
        x, prompt = draw(t.base, 2000, "outcome")
        loss = train.validation_loss(t.base, t.val, 64)
    good, mode = is_good(x, prompt)
    shares = [torch.bincount(mode[good & (prompt == p)], minlength=4).double() for p in range(2)]
    entropy = sum(float(torch.special.entr(share / share.sum()).sum()) / math.log(4) / 2 for share in shares)
    return float(good.double().mean()), entropy, loss


def holds(t, weights):
    """The bounds: better by .15, at least 90 % of the variety, at most 105 % of the held-out loss."""
    (good, variety, loss), (good_before, variety_before, loss_before) = outcome(t, weights), outcome(t, t.state.reference)
    return good >= good_before + 0.15 and variety >= 0.9 * variety_before and loss <= 1.05 * loss_before


def best_weights(t):
    """What the run would leave: the best round's averaged weights, or those from before."""
    if not t.state.best["step"]:
        return t.state.reference
    return torch.load(Path(t.args.out, "checkpoints", "best.pt"), weights_only=True)["ema"]


def test_guarded_reward_weighting_improves_and_keeps_variety_and_fit(toy):
    t = toy("--refine", "rwr")
    refine(t)
    assert t.state.best["step"] and holds(t, best_weights(t)), (t.state.history, outcome(t, best_weights(t)))


def rated_data(t):
    data = as_data(*t.rated[:2])
    data.weight = t.rated[2].float() * 2 - 1
    data.classes = tuple(map(str, t.rated[2].tolist()))
    return data


def test_kto_improves_from_ratings_of_good_and_bad(toy, monkeypatch):
    monkeypatch.setattr(train, "KTO_BETA", 50 * 16384 / 2)   # what suits the toy (Li et al.'s is for latents)
    t = toy("--refine", "kto", "--ratings", "-", "--lr", "2e-3")
    refine(t, learn=lambda seen: rated_data(t))
    assert t.state.best["step"] and holds(t, best_weights(t)), (t.state.history, outcome(t, best_weights(t)))


def test_without_guards_the_best_of_many_collapses_and_with_them_it_ends_sound(toy, monkeypatch):
    monkeypatch.setattr(train, "REJECT", 0.75)
    monkeypatch.setattr(train, "TEMPERATURE", 100.0)   # all that is kept counts alike: best of four
    flags = ["--refine", "rwr", "--real-mix", "0", "--anchor", "0", "--rounds", "8"]
    guarded = toy(*flags)
    refine(guarded, most=np.inf)
    found, before = (outcome(guarded, weights) for weights in (best_weights(guarded), guarded.state.reference))
    assert guarded.state.step < 8 * 200 and train.objections(guarded.state.history)
    assert found[1] >= 0.9 * before[1] and found[2] <= 1.05 * before[2]
    monkeypatch.setattr(train, "objections", lambda history: [])
    t = toy(*flags)
    refine(t, most=np.inf)
    assert t.state.step == 8 * 200 and not holds(t, t.state.ema), outcome(t, t.state.ema)


def test_a_reward_that_can_be_hacked_meets_a_guard(toy):
    t = toy("--refine", "rwr", "--real-mix", "0", "--rounds", "8")
    refine(t, reward=lambda x, prompt: (x.norm(dim=1) / 4).numpy(), most=np.inf)
    assert train.objections(t.state.history) or not t.state.best["step"], t.state.history
    assert t.state.step < 8 * 200 or not t.state.best["step"]


def test_with_equal_weights_and_no_guard_terms_it_is_plain_training_to_the_bit(toy):
    def trained(t, learn):
        refine(t, learn=learn)
        return t.state.weights
    t = toy("--refine", "rwr", "--real-mix", "0", "--anchor", "0", "--rounds", "1")
    data = replace(t.real, weight=torch.ones(len(t.real.rows)))
    weighted = trained(t, lambda seen: data)
    plain = toy("--refine", "rwr", "--rounds", "1")
    plain.args.refine, plain.state.reference = None, None
    train.fit(plain.base, [("data", plain.real, 1.0)], lambda: False, plain.state, plain.args, plain.log, 200)
    assert all(torch.equal(w, weighted[name]) for name, w in plain.state.weights.items())


def test_kto_learns_the_same_however_passes_share_a_step(toy, monkeypatch):
    monkeypatch.setattr(train, "KTO_BETA", 2000 * 16384 / 2)   # as sharp as for pictures

    def learnt(batch, passes):
        t = toy("--refine", "kto", "--ratings", "-", "--anchor", "0", "--batch-size", batch, "--accumulate", passes)
        for w in t.state.weights.values():
            w.data += 0.01 * torch.randn(w.shape, generator=generator(1, "moved", *w.shape))
        t.state.gain = torch.tensor(1e-3)
        train.compute_gradients(t.base, [("data", rated_data(t), 1.0)], None, t.state, t.args)
        return torch.cat([*(w.grad.flatten() for w in t.state.weights.values()), t.state.gain[None]])
    whole = learnt(32, 1)
    assert whole.norm() > 0.1
    for batch in (8, 1):
        assert (learnt(batch, 32 // batch) - whole).norm() < 1e-3 * whole.norm()


def test_the_anchor_draws_back_to_what_the_network_was(toy):
    t = toy("--refine", "rwr", "--anchor", "1", "--rounds", "1", "--steps", "60")
    for w in t.state.weights.values():
        w.data += 0.05 * torch.randn(w.shape, generator=generator(1, "moved", *w.shape))
    before = partial(train.swapped, t.state, t.base, t.state.reference)
    far = train.validation_loss(t.base, t.val, 64, before)
    data = replace(t.real, weight=torch.zeros(len(t.real.rows)))   # nothing else to learn
    train.fit(t.base, [("data", data, 1.0)], lambda: False, t.state, t.args, t.log, 60)
    assert train.validation_loss(t.base, t.val, 64, before) < 0.5 * far


def test_each_round_begins_with_a_fresh_optimiser(toy, monkeypatch):
    t, made, make = toy("--refine", "rwr", "--rounds", "3", "--steps", "2"), [], train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *of: made.append(t.state.step) or make(*of))
    monkeypatch.setattr(train, "objections", lambda history: [])
    refine(t)
    assert made == [0, 2, 4]


def test_what_rewards_has_not_seen_the_ratings_that_judge(tmp_path):
    draw = np.random.RandomState(0)
    x, y, groups = draw.randn(60, 410), draw.randn(60), np.arange(60) // 2

    def fitted(y):
        return filter_script.heads(x, y, np.ones(60), groups, 1.0, 410, 0)
    tensors, judging = fitted(y)
    assert judging.sum() == 30 and (judging[::2] == judging[1::2]).all()   # whole groups
    for half, same in ((judging, slice(0, 10)), (~judging, slice(10, 20))):
        other = fitted(np.where(half, -y, y))[0]
        moved = ~np.isclose(other["boot.bias"], tensors["boot.bias"])
        assert not moved[same].any() and moved.sum() == 10
    path = write_selector(tmp_path / "s")
    selector = metrics.load_selector(path)
    selector["boot.bias"] = np.repeat([-1.0, 1.0], 10)
    given = metrics.apply_selector(selector, np.zeros((1, 389)), [{"fields": {}, "label": "", "caption": ""}])
    assert given["judge"] == pytest.approx(1 / (1 + math.exp(-1))) and given["reward"] == pytest.approx(1 / (1 + math.exp(1)))


def test_losses_and_weights_are_what_the_papers_say():
    error, weight = torch.tensor([0.3, 0.5, 0.2, 0.4]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    usual, none = torch.tensor(0.005), torch.zeros(())
    assert torch.allclose(train.kto_loss(0 * error, none, weight, 1024), weight.abs() / 2)   # nothing learnt: 0.5 each
    before = torch.tensor([0.31, 0.49, 0.2, 0.4])
    b, gain = 2000 * 1024 / 16384, np.array([0.01, -0.01, 0, 0])
    for z in (0.005, 0):
        expected = [abs(w) * (1 - 1 / (1 + math.exp(-np.sign(w) * b * (g - z)))) for w, g in zip(weight.tolist(), gain)]
        given = train.kto_loss(before - error, usual if z else -usual, weight, 1024)
        assert given.tolist() == pytest.approx(expected, rel=1e-3)
    error.requires_grad_()
    train.kto_loss(before - error, usual, weight, 1024).sum().backward()
    assert error.grad.sign().tolist() == [1, -1, 1, -1]   # good ones are learnt, bad ones unlearnt
    reward, prompts = np.arange(20) / 20, np.array(["a"] * 10 + ["b"] * 10)
    weights = train.reward_weights(reward, prompts, np.arange(20) != 19)
    assert weights.mean() == pytest.approx(1) and weights[19] == 0 and train.effective_share(weights) >= 0.3
    assert (weights > 0).tolist() == ([False] * 4 + [True] * 6) * 1 + [False] * 4 + [True] * 5 + [False]
    assert np.allclose(weights[:9], weights[10:19]) and (np.diff(weights[4:10]) > 0).all()
    assert not train.reward_weights(reward, prompts, reward > 2).any()


def test_the_trained_weights_come_back_whatever_happens(toy):
    t = toy("--refine", "rwr")
    t.base.unet.train()
    before = {name: w.clone() for name, w in t.state.weights.items()}
    with pytest.raises(RuntimeError), train.swapped(t.state, t.base, {name: w + 1 for name, w in before.items()}):
        assert not t.base.unet.training
        raise RuntimeError
    assert all(torch.equal(w, before[name]) for name, w in t.state.weights.items()) and t.base.unet.training


FINE = {"val_loss": 0.5, "drift": 0.0, "copied": 0.01, "bands": 2.0, "tints": 0.5, "reward": 0.5, "judge": 0.5, "diversity": 9.0, "vendi": 4.0,
        "ess": 0.5}


@pytest.mark.parametrize("figures", [{"val_loss": 0.52}, {"drift": 0.06}, {"copied": 0.03}, {"bands": 3.1}, {"tints": 1.2}, {"reward": 0.66},
                                     {"diversity": 8.0}, {"vendi": 3.5}, {"ess": 0.05}, {"val_loss": math.nan}])
def test_each_guard_objects_by_name_and_a_round_without_fault_passes(figures):
    assert train.objections([FINE]) == train.objections([FINE, {**FINE, "judge": 0.6}]) == []
    found = train.objections([FINE, {**FINE, **figures}])
    assert len(found) == 1 and (f"{next(iter(figures.values())):.3f}"[:3] in found[0] or "before" in found[0])
    falling = [FINE, {**FINE, "judge": 0.49}, {**FINE, "judge": 0.48}]
    assert train.objections(falling[:2]) == [] and len(train.objections(falling)) == 1


def test_no_reward_is_above_the_usual_real_images_and_copies_are_told(base, images, tmp_path, monkeypatch):
    rows = metrics.list_images(images, prompt="a {label} foot")
    selector, args = write_selector(tmp_path / "s"), train.argparse.Namespace(
        refine="rwr", resolution=64, crop="center", strict=True, window=None, range=None, allow_burned_in=False, seed=0)
    args.selector = selector
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    white = {**rows[0], "path": str(tmp_path / "white.png")}
    monkeypatch.setattr(train, "drawn_rows", lambda *_: [*rows, white])
    look, _ = train.judged_by_selector(SimpleNamespace(device="cpu"), SimpleNamespace(rows=rows), args)
    seen, features = look(0), metrics.quality_features(metrics.load_pixels(rows, 64)[1], "cpu")
    reward = metrics.apply_selector(metrics.load_selector(selector), features, rows)["reward"]
    assert seen["reward"] == pytest.approx([*np.minimum(reward, np.median(reward)), np.median(reward)])
    assert seen["copied"].tolist() == [True] * 24 + [False]


def test_filtered_to_a_third_are_the_best_of_what_was_drawn(tmp_path, monkeypatch):
    for name in ("looking", "swapped", "validation_loss", "start_from_adapter"):
        monkeypatch.setattr(train, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "content_hash", str)
    monkeypatch.setattr(train, "summary", lambda seen, which=slice(None): {"reward": seen["reward"][which].tolist()})
    state = SimpleNamespace(history=[{"reward": 0}], weights={}, reference={}, best={"step": 0})
    args, drawn = train.argparse.Namespace(out=tmp_path, batch_size=1), {"reward": np.array([1, 6, 3, 2, 5, 4])}
    found = train.compare(None, state, None, args, lambda name: drawn)
    assert found["before, filtered to a third"]["reward"] == [6, 5]


# ---- by flags

@pytest.fixture(scope="module")
def adapter(base, images, tmp_path_factory):
    """An adapter of two steps on the random base, a selector that likes brightness, and ratings it was fitted to."""
    folder = tmp_path_factory.mktemp("refine")
    subprocess.run([sys.executable, "train.py", "--base", base, "--data", images, "--prompt", "a {label} foot", "--steps", "2",
                    "--rank", "2", "--alpha", "4", "--val-samples", "0", "--out", folder / "run"], cwd=ROOT, check=True,
                   capture_output=True)
    rows = [[str(path), 1 + 2 * (i % 2), "", 3, "a sore foot"] for i, path in enumerate(sorted(Path(images).rglob("*.png")))]
    metrics.write_csv(folder / "ratings.csv", ["image_path", "rating", "modality", "expert_level", "prompt"], rows)
    spec = dict(judging=[metrics.content_hash(rows[0][0])[:16]], ratings_sha256=[metrics.content_hash(folder / "ratings.csv")])
    write_selector(folder / "selector.safetensors", **spec)
    write_selector(folder / "forced.safetensors", **spec, warnings=["the ratings do not predict quality better than chance"])
    return folder


@pytest.fixture
def flags(adapter, images):
    return ["--init-lora", adapter / "run" / "lora.safetensors", "--selector", adapter / "selector.safetensors", "--data", images,
            "--prompt", "a {label} foot", "--steps", "2", "--candidates", "32", "--val-steps", "1", "--batch-size", "4",
            "--val-samples", "1", "--seed", "3"]


def stop():
    raise KeyboardInterrupt


def left(out):
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*.safetensors")}
    return files, [{k: v for k, v in json.loads(line).items() if k not in ("images_per_second", "memory")}
                   for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["rwr", "kto"])
def test_a_refinement_leaves_the_table_and_goes_on_where_it_was_stopped(method, flags, adapter, tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(train, "objections", lambda history: [])   # random pictures pass no guard
    flags = ["--refine", method, *flags, *(["--ratings", adapter / "ratings.csv"] if method == "kto" else [])]
    run(train, *flags, "--rounds", "2", "--out", tmp_path / "a")
    said = capsys.readouterr().out
    table = json.loads((tmp_path / "a" / "args.json").read_text())["compared"]
    assert list(table)[:3] == ["before", "before, filtered to a third", "plain training"] and "plain training" in said
    assert "What refining brought" in (tmp_path / "a" / "report.html").read_text()
    assert len(list(tmp_path.glob("a/drawn/*/*.png"))) == 4 * 32   # before, after each round, plain training
    whole, calls = train.compute_gradients, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):   # in the first step of the second round
        patch.setattr(train, "compute_gradients", lambda *of: calls.append(1) or len(calls) == 7 and stop() or whole(*of))
        run(train, *flags, "--rounds", "2", "--save-every", "1", "--out", tmp_path / "b")
    for path in sorted(next((tmp_path / "b" / "drawn").glob("2-*")).iterdir())[:10]:
        path.unlink()
    run(train, *flags, "--rounds", "2", "--save-every", "1", "--out", tmp_path / "b")
    assert left(tmp_path / "a") == left(tmp_path / "b")
    run(train, *flags, "--rounds", "2", "--out", tmp_path / "a")
    assert "is finished" in capsys.readouterr().out


def test_a_refinement_that_is_interrupted_while_it_judges_ends_at_once_and_goes_on(flags, tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(train, "objections", lambda history: [])
    flags = ["--refine", "rwr", *flags, "--rounds", "1"]
    run(train, *flags, "--out", tmp_path / "a")
    save, saved = train.save_png, []

    def signalled(image, path, *rest):   # while the third picture after the round is drawn
        saved.extend([path] * path.parent.name.startswith("2-"))
        os.kill(os.getpid(), signal.SIGINT if len(saved) == 3 else 0)
        save(image, path, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_png", signalled)
        run(train, *flags, "--out", tmp_path / "b")
    assert len(saved) == 3 and torch.load(tmp_path / "b" / "checkpoints" / "latest.pt", weights_only=True)["step"] == 2
    keep = train.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):   # once it has judged and logged, before it saves
        patch.setattr(train, "save_checkpoint", lambda state, *of: stop() if len(state.history) > 1 else keep(state, *of))
        run(train, *flags, "--out", tmp_path / "b")
    with pytest.raises(SystemExit):   # what it judges by may not change on the way
        run(train, *flags, "--val-steps", "2", "--out", tmp_path / "b")
    assert "--val-steps 1 there, 2 here" in capsys.readouterr().err
    run(train, *flags, "--out", tmp_path / "b")
    assert left(tmp_path / "a") == left(tmp_path / "b")


def test_where_no_round_passes_the_adapter_comes_back_unchanged_with_the_reason(flags, adapter, tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(train, "objections", lambda history: ["diversity: 0.710 < 0.9"][:len(history) - 1])
    run(train, "--refine", "rwr", *flags, "--out", tmp_path / "a")
    assert "no round passed (diversity: 0.710 < 0.9)" in capsys.readouterr().out
    assert (tmp_path / "a" / "lora.safetensors").read_bytes() == (adapter / "run" / "lora.safetensors").read_bytes()
    assert json.loads((tmp_path / "a" / "args.json").read_text())["finished"] == 2   # the other rounds were not begun


@pytest.mark.parametrize("change, said", [
    (["--selector", ""], "needs --selector"),
    (["--init-lora", ""], "needs --init-lora"),
    (["--selector", "FORCED"], "written in spite of"),
    (["--val-split", "0"], "held-out images"),
    (["--refine", "kto"], "--ratings"),
    (["--refine", "kto", "--ratings", "OTHER"], "is not what"),
    (["--patience", "3"], "--patience"),
    (["--method", "full"], "--method lora"),
    (["--refine", "kto", "--ratings", "OTHER", "--perceptual-weight", "1"], "without --perceptual-weight"),
])
def test_what_cannot_be_refined_is_one_line(change, said, flags, adapter, tmp_path, refused):
    other = tmp_path / "other.csv"
    metrics.write_csv(other, ["image_path", "rating"], [["x.png", 1]])
    change = [{"FORCED": adapter / "forced.safetensors", "OTHER": other}.get(word, word) for word in change]
    assert said in refused(train, "--refine", "rwr", *flags, "--out", tmp_path / "run", *change)
