"""Everything that the README shows runs as it stands there."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from coda_attn.cli import cli, main
from coda_attn.cli.options import megabytes

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_lines():
    """Command lines in bash blocks and in inline code."""
    inline = re.findall(r"`((?:coda|make|python) [^`\n]*)`", README)
    indented = re.findall(r"^    ((?:coda|make|python) .*?)(?: +#.*)?$", README, re.MULTILINE)
    return [line for block in blocks("bash") for line in block.splitlines()] + inline + indented


def commands(program):
    return [line.removeprefix(program).strip() for line in shell_lines() if line.startswith(program)]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_example(number, tmp_path):
    example = tmp_path / "example.py"
    example.write_text(blocks("python")[number], encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:__main__", example.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_examples_are_there():
    assert len(blocks("python")) == 3 and len(blocks("cpp")) == 1 and len(commands("coda ")) >= 5


@pytest.mark.parametrize("line", commands("coda "))
def test_coda_command_parses(line):
    node, arguments = cli, shlex.split(line)
    while hasattr(node, "commands"):
        node, arguments = node.commands[arguments[0]], arguments[1:]
    parser_arguments = node.make_parser(node.context_class(node)).parse_args(list(arguments))
    assert parser_arguments[1] == []


@pytest.mark.parametrize("name", sorted({line.split()[0] for line in commands("make ")}))
def test_make_target_exists(name):
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", sorted({line.split()[0] for line in commands("python -m benchmarks.run")}))
def test_benchmark_exists(name):
    listed = subprocess.run([sys.executable, "-m", "benchmarks.run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert name in [line.split()[0] for line in listed.splitlines()]


def test_cpp_example_is_the_program_that_the_consumer_project_builds():
    assert blocks("cpp") == [(ROOT / "tests/cmake-project/readme.cpp").read_text(encoding="utf-8")]


def test_memory_table_is_what_the_command_says(capfd):
    said = {}
    lengths = (4096, 32768, 131072, 1048576)
    for shape in ("smollm2-135m", "mistral-7b"):
        assert main(["memory", "--shape", shape, "--lengths", ",".join(map(str, lengths)), "--json"]) == 0
        said[shape] = [megabytes(row["state_bytes"]) for row in json.loads(capfd.readouterr().out)["rows"]]
    for i, length in enumerate(lengths):
        cells = [f"{length:,}"] + [said[shape][i + offset] for shape in said for offset in (0, len(lengths))]
        assert f"| {' | '.join(cells)} |" in README


def test_files_named_in_the_readme_exist():
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[A-Z]+(?:\.md)?)`", README)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), path
