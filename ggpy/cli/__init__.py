"""The command line: one module for each command of `ggpy`, with one function of its name.

What goes wrong on purpose is one line on stderr and exit code 1; `--debug` before the command shows the traceback.
"""

import os
import sys
from importlib import import_module

from ..printable import one_line

_COMMANDS = (
    "run",
    "pull",
    "list",
    "rm",
    "batch",
    "serve",
    "convert",
    "quantize",
    "inspect",
    "graph",
    "experts",
    "perplexity",
    "imatrix",
    "error",
    "compare",
    "bench",
    "profile",
    "demo",
    "warmup",
)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments[:1]
    from ..errors import Error
    from .streams import prepared

    try:
        with prepared():
            _app(arguments[1:] if debug else arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has left: no words needed. Python would complain again as it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (Error, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"ggpy: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # A traceback says little to somebody whose packages are too old.
        from ..installed import missing_packages

        if debug or not (missing := missing_packages()):
            raise
        print(f"ggpy: {_one_line(error)}; ggpy needs {', '.join(missing)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}", 1000)
    return one_line(str(error), 1000)


def _app(arguments: list[str]) -> None:
    import typer

    app = typer.Typer(
        help="Convert, inspect and run GGUF language models on the CPU.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
        debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    ) -> None:
        if version:
            from .. import __version__
            from ..errors import Error
            from ..installed import missing_packages

            print(f"ggpy {__version__}")
            if missing := missing_packages():  # an older typer takes every command for this option
                raise Error(f"ggpy needs {', '.join(missing)}")
            raise typer.Exit

    # Only the command that is called is imported; help needs all.
    named = [c for c in arguments if c in _COMMANDS][:1]
    for name in named or _COMMANDS:
        app.command(name)(getattr(import_module(f".{name}", __name__), name))
    app(arguments, prog_name="ggpy", standalone_mode=True)


__all__ = ["main"]
