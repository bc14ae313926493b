"""`harness`: assembles the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import ConfigError, HarnessError

COMMANDS = (
    "audit", "compare", "datasets", "doctor", "models", "plugin", "report", "run", "show", "sync", "techniques", "train", "ui", "verify",
)  # fmt: skip
INTERRUPTED = 130


class _Commands(click.Group):
    """Commands are imported when called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __package__).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from ..errors import unknown

            raise unknown("command", args[0], COMMANDS, "`harness --help`")
        return super().resolve_command(ctx, args)


class State:
    """What the global options say; shared by all commands."""

    def __init__(self, registries: Sequence[Path], debug: bool, words: Sequence[str] = ()) -> None:
        self.registries, self.debug, self.words = list(registries), debug, words

    def used_registries(self) -> list[str]:
        """The user's registry files, those of the environment first: what has to be given where the environment is another."""
        return list(dict.fromkeys([*self._named(), *(str(path) for path in self.registries)]))

    @staticmethod
    def _named() -> list[str]:
        from ..registry import named_registries

        return [str(path) for path in named_registries()]

    def command(self) -> str:
        """The command line as it was given, with the registries of the environment and less what does not bear on the results: a store's
        address may hold a password."""
        given = {str(path) for path in self.registries}
        kept = [word for path in self._named() if path not in given for word in ("-r", path)]
        words = iter(self.words)
        for word in words:
            if word == "--tracking-uri":
                next(words, None)
            elif word not in ("--debug", "--no-cache") and not word.startswith("--tracking-uri="):
                kept.append(word)
        return shlex.join(["harness", *kept])

    def registry(self) -> Any:
        from ..registry import load_registry

        return load_registry(self.registries)

    def plugins(self) -> Any:
        from ..plugins import load_plugins

        plugins = load_plugins()
        _ = plugins.techniques  # duplicate names are found here, before any work
        for failure in plugins.failures:
            click.echo(f"warning: {failure} (see `harness doctor`)", err=True)
        return plugins


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "-r",
    "--registry",
    "registries",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A registry file laid over the shipped one; may be repeated.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.version_option(__version__, prog_name="vision-harness")
@click.pass_context
def cli(ctx: click.Context, registries: tuple[Path, ...], debug: bool) -> None:
    """Understand, compare and audit image models."""
    ctx.obj = State(registries, debug, ctx.obj or ())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and exits with its code."""
    sys.exit(invoke(arguments))


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 fine, 1 a run failed, 2 usage, configuration or input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(args=list(words), prog_name="harness", standalone_mode=False, obj=words)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("interrupted; finished runs are kept, the same command goes on from there", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except HarnessError as error:
        if "--debug" in words:
            traceback.print_exc()
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if "--debug" in words:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        return ConfigError.exit_code
    except Exception as error:  # a user's own network or plugin may raise anything
        if "--debug" in words:
            traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        click.echo(f"error: {type(error).__name__}: {text} (`harness --debug` shows where)", err=True)
        return 1


if __name__ == "__main__":
    main()
