"""The command ``coda``."""

from __future__ import annotations

import pathlib
import sys
from typing import Optional, Sequence

import click
import transformers

from .. import __version__
from .calibrate import calibrate
from .convert import convert
from .demo import demo
from .eval import evaluate
from .generate import generate
from .memory import memory

_PACKAGE = pathlib.Path(__file__).parent.parent


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="coda")
@click.pass_context
def cli(context: click.Context) -> None:
    """Language models that read any length of text in a memory of fixed size.

    \b
    Examples:
      coda demo
      coda eval ppl --model smollm2 --policy full,window,bounded
      coda generate --model smollm2 --prompt-file book.txt --max-new-tokens 100
      coda memory --shape mistral-7b
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (demo, convert, calibrate, generate, evaluate, memory):
    cli.add_command(_command)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs the command line and returns its exit status: 2 after bad input, which is one line on standard error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # With standalone_mode off, click returns the status of --help and --version and raises everything else.
        status = cli.main(arguments, prog_name="coda", standalone_mode=False, obj=arguments)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        return _bad_input(error.format_message())
    except click.Abort:
        click.echo("coda: interrupted", err=True)
        return 130
    except (ValueError, NotImplementedError) as error:
        # Ours say what was asked and what is supported. Raised anywhere else they are faults, and keep their traceback.
        if not _raised_here(error):
            raise
        return _bad_input(str(error))


def _bad_input(message: str) -> int:
    click.echo("coda: error: " + " ".join(message.split()), err=True)
    return 2


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return _PACKAGE in pathlib.Path(trace.tb_frame.f_code.co_filename).parents
