"""Entry point of the command line: verbs in groups, one clear line for every mistake, exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click
from click.exceptions import Exit, NoSuchCommand

from alignbench.cli.checks import check_method, doctor, fit, ls, new_method, plan, validate
from alignbench.cli.common import DONE, EPILOG, EXIT_CODES, INTERRUPTED, USAGE, Choice, write_paragraphs
from alignbench.cli.reports import compare, import_, report, score
from alignbench.cli.sweeps import cancel, gc, logs, rerun, retry, run, status, sweep
from alignbench.store.machine import denial, obstacle

GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Start here": (sweep, status, report, plan, ls),
    "Run": (run, logs, cancel, retry, rerun, gc),
    "Inspect": (validate, fit, compare, doctor),
    "Share": (score, import_),
    "Extend": (new_method, check_method),
}
WORKING = (sweep, run, retry, rerun)  # verbs that are not done once nobody reads what they print
COMPLETE = "_ALIGNBENCH_COMPLETE"  # environment variable that a shell sets to request completions
RC_LINES = {  # shell -> (its startup file, the line to add there)
    "bash": ("~/.bashrc", 'eval "$(alignbench --completion bash)"'),
    "zsh": ("~/.zshrc", 'eval "$(alignbench --completion zsh)"'),
    "fish": ("~/.config/fish/config.fish", "alignbench --completion fish | source"),
}


class Verbs(click.Group):
    """Click group that lists its verbs by purpose."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{verb.name:<{width}}", verb.short_help or "") for verb in verbs])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_paragraphs(formatter, EPILOG, EXIT_CODES)


def _print_completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    """Print a shell's completion script and the line that installs it, then exit."""
    if shell is None or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    file, line = RC_LINES[shell]
    click.echo(f"{script(cli, {}, 'alignbench', COMPLETE).source().rstrip()}\n# To keep it, add to {file}:\n# {line}")
    ctx.exit()


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="alignbench", message="%(prog)s %(version)s")
@click.option(
    "--completion",
    type=Choice(tuple(RC_LINES)),
    is_eager=True,
    expose_value=False,
    callback=_print_completion,
    help=f"Print the shell's completion script and exit. In {RC_LINES['bash'][0]}: {RC_LINES['bash'][1]}",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Compare methods that align flow-matching text-to-image models with human preferences, fairly."""
    if ctx.invoked_subcommand is None:
        raise click.UsageError("name a verb, for instance sweep", ctx)


for group in GROUPS.values():
    for verb in group:
        cli.add_command(verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    _prepare_streams()
    if reason := obstacle():
        return _refuse(reason)
    context = None
    try:
        if instruction := os.environ.get(COMPLETE):
            from click.shell_completion import shell_complete

            return shell_complete(cli, {}, "alignbench", COMPLETE, instruction)
        with cli.make_context("alignbench", list(sys.argv[1:] if argv is None else argv)) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
        return code
    except Exit as end:  # --help and --version
        return end.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "alignbench"
        return _refuse(f"{_in_one_line(error)} (see `{where} --help`)")
    except KeyboardInterrupt:
        print("alignbench: interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the output was piped into `head`
        sys.stdout = None  # type: ignore[assignment]  # nothing left to flush
        interrupted = context and context.invoked_subcommand in [verb.name for verb in WORKING]
        return INTERRUPTED if interrupted else DONE
    except OSError as error:
        if (reason := denial(error)) is None:
            raise
        if error.filename is None:
            sys.stdout = None  # type: ignore[assignment]  # nothing left to flush
        return _refuse(reason)
    except Exception as error:
        from alignbench.config import UserError  # imported late: its dependencies would double the time of --help

        if not isinstance(error, UserError):
            raise
        return _refuse(str(error))


def _prepare_streams() -> None:
    """Open closed streams, and let the others write every character, if need be as an escape such as ``\\u2191``.

    In place of a closed stream, the system would give its number to the next file, and children would write into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (open for good)
            setattr(sys, name, stream)
            os.set_inheritable(stream.fileno(), True)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(text: str) -> int:
    """Print one line, in which whatever would break it or steer the terminal is written as Python writes it."""
    plain = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    print(f"alignbench: {plain}", file=sys.stderr)
    return USAGE


def _in_one_line(error: click.UsageError) -> str:
    """Return one line that says where the mistake is, what it is, and what to type instead."""
    if isinstance(error, click.NoSuchOption):
        return f"there is no option '{error.option_name}'{_nearest(error.possibilities)}"
    if isinstance(error, NoSuchCommand):
        return f"there is no verb '{error.command_name}'{_nearest(error.possibilities)}"
    if not isinstance(error, click.BadParameter) or error.param is None or error.ctx is None:
        return error.format_message().rstrip(".").replace("Got unexpected", "unexpected")
    where = "/".join(error.param.opts) if isinstance(error.param, click.Option) else error.param.make_metavar(error.ctx)
    return f"{where}: {'is missing' if isinstance(error, click.MissingParameter) else error.message.rstrip('.')}"


def _nearest(names: Sequence[str] | None) -> str:
    return f"; did you mean '{names[0]}'?" if names else ""
