"""The shape of the house: who imports whom, how the code is formatted, how long functions are."""

import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import metrics

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "tests" / "ruff.toml"
# Each script may import the files that stand after it, and no other of ours.
MAY_IMPORT = {
    "train": {"sample", "lora", "metrics"},
    "sample": {"filter", "lora", "metrics"},
    "evaluate": {"metrics"},
    "filter": {"metrics"},
    "lora": {"metrics"},
    "metrics": set(),
}
COMMANDS = ["train", "sample", "evaluate", "filter", "lora"]
MAX_TOKENS = 350  # of a function; flags and the training loop are lists, and may be longer
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}


def source_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imported_modules(node):
    """The modules that an import statement names; none for any other node."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module}
    return set()


def code_tokens(source):
    """The tokens of a file without comments, docstrings and layout."""
    docstring_lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            docstring_lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in docstring_lines:
            tokens.append(token)
    return tokens


def function_sizes(source):
    """(tokens, name, node) of each function, the longest first."""
    tokens = code_tokens(source)
    sizes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            size = sum(node.lineno <= token.start[0] <= node.end_lineno for token in tokens)
            sizes.append((size, node.name, node))
    return sorted(sizes, key=lambda entry: entry[0], reverse=True)


def adds_flags(function):
    """Whether a function is a list of command-line flags."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "add_argument_group":
            return True
    return False


def nested_comprehensions(source):
    """How many comprehensions stand inside another."""
    inner = set()
    for outer in ast.walk(ast.parse(source)):
        if isinstance(outer, COMPREHENSIONS):
            inside = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS)]
            inner.update(node for node in inside if node is not outer)
    return len(inner)


def run_script(name, *flags):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # some terminals know nothing else
    command = [sys.executable, f"{name}.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def run_ruff(*words):
    files = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("tests/*.py"))
    command = [sys.executable, "-m", "ruff", *words, "--config", CONFIG, "--no-cache", *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_top_level_holds_exactly_what_it_should():
    command = ["git", "ls-files"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    top = {path.split("/")[0] for path in listing.stdout.splitlines() if not path.startswith(".")}
    scripts = {f"{name}.py" for name in MAY_IMPORT}
    assert top == scripts | {"tests", "requirements.txt", "README.md"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_files_import_only_downhill(name):
    imported = set()
    for node in ast.walk(ast.parse(source_of(name))):
        imported |= imported_modules(node)
    ours = imported & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_our_files_are_imported_at_the_top_alone(name):
    tree = ast.parse(source_of(name))
    top = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        top.append(node)
    late = []
    for node in ast.walk(tree):
        ours = imported_modules(node) & set(MAY_IMPORT)
        if ours and node not in top:
            late.append(f"{name}.py:{node.lineno} imports {', '.join(ours)}")
    assert not late, "\n".join(late)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_no_rule_is_switched_off(name):
    assert re.findall(r"# *(?:noqa|fmt: *(?:off|skip)|ruff:).*", source_of(name)) == []


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_no_function_is_long(name):
    long = []
    for size, function_name, node in function_sizes(source_of(name)):
        is_loop = name == "train" and function_name == "fit"
        if size > MAX_TOKENS and not is_loop and not adds_flags(node):
            long.append(f"{name}.py:{node.lineno} {function_name} has {size} tokens")
    assert not long, "\n".join(long)


def test_the_code_is_formatted():
    answer = run_ruff("format", "--check")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_linter_has_no_complaint():
    answer = run_ruff("check", "--output-format", "concise")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_sizes_are_printed_and_not_judged(capsys):
    report = ["", "file           lines  tokens  nested comprehensions  longest function"]
    for name in MAY_IMPORT:
        source = source_of(name)
        size, longest, _ = function_sizes(source)[0]
        lines = source.count("\n")
        tokens = len(code_tokens(source))
        nested = nested_comprehensions(source)
        report.append(f"{name + '.py':13}{lines:>7}{tokens:>8}{nested:>23}  {longest} ({size})")
    with capsys.disabled():
        print("\n".join(report))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers(name):
    answer = run_script(name, "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"python {name}.py" in answer.stdout
    if name != "lora":  # its flags belong to its commands
        assert "(default: " in answer.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_help_text_and_so_shows_its_default(name, monkeypatch):
    parsers = []

    def keep(parser, args=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(metrics.Flags, "parse_args", keep)
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args()

    silent = {action.dest for action in parsers[0]._actions if not action.help}
    assert silent <= {"command"}  # of lora.py, whose commands have help texts of their own


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_one_line_and_status_2(name, refused):
    refused(importlib.import_module(name), "--no-such-flag")
