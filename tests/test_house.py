"""The shape of the house: what may not yield, whatever is built in it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train", "sample", "evaluate", "filter", "lora"]
IMPORTS = {
    "filter": {"metrics"},
    "evaluate": {"metrics", "sample"},
    "train": {"sample", "metrics", "lora"},
    "sample": {"metrics", "lora"},
    "metrics": set(),
    "lora": set(),
}
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in IMPORTS}
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def functions():
    return [
        (name, node)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def depth(node, inside_elif=False):
    """The deepest nesting of if, for, while, with and try below a node; an elif is no deeper than its if."""
    below = [
        depth(child, isinstance(node, ast.If) and [child] == node.orelse)
        for child in ast.iter_child_nodes(node)
    ]
    return max(below, default=0) + (
        isinstance(node, NESTING) and not (inside_elif and isinstance(node, ast.If))
    )


def test_the_top_level_holds_exactly_what_it_should():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {path.split("/")[0] for path in listed if path and not path.startswith(".")}
    assert top == {f"{name}.py" for name in IMPORTS} | {"tests", "requirements.txt", "README.md"}


@pytest.mark.parametrize("name", IMPORTS)
def test_files_import_only_downhill(name):
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found & set(IMPORTS) == IMPORTS[name]


def test_no_function_is_long_and_none_is_deeply_nested():
    for name, node in functions():
        lines, allowed = node.end_lineno - node.lineno + 1, 120 if node.name == "fit" else 60
        assert lines <= allowed, f"{name}.{node.name} has {lines} lines"
        assert depth(node) <= 4, f"{name}.{node.name} nests {depth(node)} deep"


@pytest.mark.parametrize("twin", ["fail", "replacing"])
def test_the_twins_are_equal(twin):
    trees = {name: ast.dump(node) for name, node in functions() if node.name == twin}
    assert len(set(trees.values())) == 1
    assert {"metrics", "lora"} <= set(trees) and (twin != "fail" or set(trees) == set(IMPORTS))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_loading_torch(name):
    code = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / f"{name}.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # some terminals have no more
    assert shown.returncode == 0, shown.stderr
    assert f"python {name}.py" in shown.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_while_the_libraries_load_is_no_traceback(name, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, sys, time\n"
        "os.kill(os.getpid(), signal.SIGINT if 'a' in sys.argv else signal.SIGTERM)\ntime.sleep(60)"
    )
    flags = {
        "train": ["--data", "a"],
        "sample": ["--prompt", "a"],
        "evaluate": ["a", "b"],
        "filter": ["--undo", "b"],
        "lora": ["info", "b"],
    }
    said = subprocess.run(
        [sys.executable, f"{name}.py", *flags[name]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert said.returncode == 130 and said.stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_flag_is_one_line_and_status_2(name):
    said = subprocess.run(
        [sys.executable, f"{name}.py", "--no-such-flag"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        said.returncode == 2
        and said.stderr.startswith("error: ")
        and len(said.stderr.splitlines()) == 1
    )
