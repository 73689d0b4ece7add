"""``python -m benchmarks.run NAME``: measures, prints, and writes ``results/<machine>/<name>.json`` and a plot."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any, Optional, Sequence

import click
import torch
import transformers

from coda_attn.cli import options
from coda_attn.files import new_file

from . import machine
from .checks import CheckFailed, Run
from .registry import BENCHMARKS, Benchmark

RESULTS = machine.ROOT / "benchmarks" / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Every benchmark for this machine's GPU, or for its CPU where it has none.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Where to run.  [default: the benchmark's own]")
@click.option("--quick", is_flag=True, help="Small sizes, to see that it works; written only where --output says so.")
@click.option("--output", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Where results go, in a folder named after the machine.  [default: benchmarks/results]")
@click.option("--commit", help="The commit to note, for a copy of the tree without git.")
@click.option("--lengths", type=options.integers(), help="Sequence lengths to measure.")
@click.option("--model", help="The model to measure: smollm2, random:mistral-tiny, or a folder.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--plot", "drawn", type=click.Path(exists=True, dir_okay=False), metavar="FILE.json",
              help="Draw the plot of results that are there already, and measure nothing.")
@click.pass_obj
def command(arguments: Sequence[str], name: Optional[str], everything: bool, device: Optional[str], quick: bool,
            output: Optional[str], commit: Optional[str], drawn: Optional[str], **given: Any) -> int:
    """Measure one benchmark, or list them when none is named. Nothing is timed or written where a result is wrong.

    \b
    Examples:
      python -m benchmarks.run
      python -m benchmarks.run smollm2_cpu
      python -m benchmarks.run diff_attention --lengths 2048,8192
      python -m benchmarks.run --all
    """
    if drawn is not None:
        redraw(pathlib.Path(drawn))
        return 0
    if everything:
        if name:
            raise click.UsageError(f"{name!r} and --all were both given; give one of them")
        return run_all([argument for argument in arguments if argument != "--all"])
    if name is None:
        width = max(map(len, BENCHMARKS))
        for each, benchmark in BENCHMARKS.items():
            click.echo(f"{each:{width}}  {'/'.join(benchmark.devices):8}  {benchmark.summary}")
        return 0
    if name not in BENCHMARKS:
        raise click.UsageError(f"benchmark {name!r} is not known; choose one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    run = Run(_device(name, benchmark, device), quick)
    given = {option: value for option, value in given.items() if value is not None}
    for option in given.keys() - set(benchmark.options):
        raise click.UsageError(f"{name} has no --{option}; it takes {', '.join('--' + o for o in benchmark.options) or 'none'}")
    rows = benchmark.measure(run, **given)
    print_rows(rows)
    result = {"benchmark": name, "machine": machine.describe(run.device), "versions": machine.versions(),
              "commit": commit or machine.commit(), "command": f"python -m benchmarks.run {shlex.join(arguments)}",
              "checks": run.checks, "rows": rows}
    if output or not quick:
        write(result, pathlib.Path(output) if output else RESULTS)
    return 0


def run_all(arguments: Sequence[str]) -> int:
    """Each benchmark in a process of its own, so that none inherits another's memory; the worst exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst = 0
    for name, benchmark in BENCHMARKS.items():
        if benchmark.devices[0] == device:
            click.echo(f"{name}: {benchmark.summary}", err=True)
            worst = max(worst, subprocess.run([sys.executable, "-m", "benchmarks.run", name, *arguments]).returncode)
    return worst


def write(result: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """``folder/<machine>/<benchmark>.json`` and the plot beside it; returns the first."""
    path = folder / result["machine"]["name"] / f"{result['benchmark']}.json"
    try:
        with new_file(path) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"wrote {path}", err=True)
    draw(result, path)
    return path


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """The plot of results in ``path``, beside them, where the benchmark has one."""
    plot = BENCHMARKS[result["benchmark"]].plot
    if plot is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        click.echo(f"no plot without matplotlib; where it is installed: python -m benchmarks.run --plot {path}", err=True)
        return
    with new_file(path.with_suffix(".png")) as partial:
        plot(result["rows"], partial)
    click.echo(f"wrote {path.with_suffix('.png')}", err=True)


def redraw(path: pathlib.Path) -> None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = result["benchmark"] in BENCHMARKS and isinstance(result["rows"], list)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise click.UsageError(f"{path} holds no results of {', '.join(BENCHMARKS)}; give a file written by this command")
    draw(result, path)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Tables, one for each run of rows with the same fields."""
    def flat(row: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in row.items() if name != "baselines"}, **row.get("baselines", {})}

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    for fields, table in itertools.groupby(map(flat, rows), tuple):
        options.print_table(fields, [[cell(value) for value in row.values()] for row in table])


def _device(name: str, benchmark: Benchmark, asked: Optional[str]) -> torch.device:
    device = asked or benchmark.devices[0]
    if device not in benchmark.devices:
        raise click.UsageError(f"{name} does not run on {device}; it runs on {' and '.join(benchmark.devices)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(f"{name} needs an NVIDIA GPU, and torch finds none here")
    return torch.device(device)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit status: 1 where a result is wrong, 2 after bad input, each with one line on standard error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return command.main(arguments, prog_name="python -m benchmarks.run", standalone_mode=False, obj=arguments)
    except CheckFailed as failure:
        click.echo(f"benchmarks: check failed, nothing timed or written: {' '.join(str(failure).split())}", err=True)
        return 1
    except click.ClickException as error:
        click.echo(f"benchmarks: error: {' '.join(error.format_message().split())}", err=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
