"""What every script stands on: flags, errors, files, seeds and devices."""

import argparse
import os
import signal

import pytest
import torch

from metrics import (
    BadImage,
    Flags,
    data_set,
    existing_file,
    generator,
    interval,
    number,
    replacing,
    run_script,
)


def parsed(*words):
    """The values of a small parser for these words of a command line."""
    parser = Flags("A test.")
    parser.add_argument("--steps", type=number(1, 10), default=5, help="how many")
    parser.add_argument("--share", type=number(0, 0.5), help="of all")
    parser.add_argument("--max-share")
    parser.add_argument("--range", type=interval)
    parser.add_argument("--data", type=data_set)
    parser.add_argument("--selector", type=existing_file)
    return parser.parse_args([str(word) for word in words])


def test_numbers_are_whole_where_both_bounds_are_and_lie_between_them():
    assert number(1, 10)("7") == 7
    assert number(0, 0.5)("0.25") == 0.25
    for text in ("0", "11", "2.5", "x", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1 to 10"):
            number(1, 10)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="a number from 0 to 0.5"):
        number(0, 0.5)("nan")


@pytest.mark.parametrize(
    "typed, ending",
    [
        ("--share_", "did you mean --share?)"),
        ("--max_share", "did you mean --max-share?)"),
        ("--zzz", "--zzz 3"),
    ],
)
def test_a_flag_nearly_right_is_named(typed, ending, capsys):
    with pytest.raises(SystemExit):
        parsed(typed, 3)
    assert capsys.readouterr().err.endswith(ending + "\n")


def test_a_value_may_begin_with_a_minus():
    assert parsed("--range", "-1000,400").range == [-1000, 400]


def test_wrong_flags_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "flags.txt").write_text("--selector a\0b")
    messages = {
        (f"@{tmp_path}/flags.txt",): "'--selector a\\x00b' in a file of flags: is not text",
        ("--steps", "0"): "--steps: 0: give a whole number from 1 to 10",
        ("--data", "nowhere"): "nowhere: no such file or folder",
        ("--selector", tmp_path): f"{tmp_path}: no such file",
        ("--step", "3"): "--step",
        (f"@{tmp_path}/mpoks.txt",): f"@{tmp_path}/mpoks.txt: No such file or directory: give a",
    }
    for words, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            parsed(*words)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]


def test_flags_come_from_a_file_and_later_ones_win(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("\ufeff# a recipe\n\n--steps 3\n--share 0.25\n", encoding="utf-8")
    args = parsed(f"@{recipe}", "--steps", 4)
    assert args.steps == 4
    assert args.share == 0.25


def test_help_shows_the_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "how many (default: 5)" in text
    assert "None" not in text


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    replace = os.replace

    def noted_replace(*names):
        calls.append("replace")
        replace(*names)

    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", noted_replace)
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    assert calls == ["fsync", "replace"]


def test_a_full_disk_is_named_whatever_hides_it(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(OSError) as error, replacing(path):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64") from None  # as torch.save does
    assert error.value.errno == 28
    assert os.listdir(tmp_path) == []


def test_a_generator_depends_on_seed_and_key_alone():
    def draw(*key):
        return torch.rand(3, generator=generator(*key))

    first = draw(1, "noise", 4)
    assert torch.equal(first, draw(1, "noise", 4))
    for key in ((2, "noise", 4), (1, "order", 4), (1, "noise")):
        assert not torch.equal(first, draw(*key))


def test_what_a_user_did_ends_in_one_line(handlers, capsys):
    def full_gpu(args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def full_memory(args):
        raise MemoryError("Unable to allocate 745 GiB")

    def bad_image(args):
        raise BadImage("x.png", "is empty")

    messages = {
        lambda args: open("/no/such/place"): "/no/such/place: No such file or directory",
        lambda args: b"\xff".decode(): "is not UTF-8",
        full_gpu: "try a smaller --batch-size",
        full_memory: "error: the memory is full",
        bad_image: "error: x.png: is empty",
    }
    for main, message in messages.items():
        with pytest.raises(SystemExit) as stop:
            run_script(main, lambda: argparse.Namespace(batch_size=8))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1
        assert message in lines[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_and_status_130(number, handlers, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: os.kill(os.getpid(), number), argparse.Namespace)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_a_traceback(handlers):
    with pytest.raises(KeyError):
        run_script(lambda args: {}["bug"], argparse.Namespace)
