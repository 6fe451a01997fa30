"""`ggpy serve`: answer over HTTP."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Error
from ..installed import missing_packages
from .common import KVType, byte_count, find_model, kernel_progress
from .sampling import sampling_values, with_sampling_flags


@with_sampling_flags
def serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="A .gguf file, a checkpoint folder or a hub id; NAME=MODEL gives it a name; if none, the demo model.",
            metavar="[MODEL]...",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0: others can reach it, too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8080,
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key", envvar="GGPY_API_KEY", help="What clients must show, as their API key.", show_default=False
        ),
    ] = "",
    alias: Annotated[str | None, typer.Option("--alias", help="The name of the only model.")] = None,
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", min=1, help="Tokens of context, for each answer.")] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    kv_memory: Annotated[
        str | None, typer.Option("--kv-memory", help="Memory for keys and values of all answers: 6G, 512M.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory for all loaded models; default: four fifths of the machine's.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="Folder that keeps conversations' keys and values, also for the next start."),
    ] = None,
    cache_size: Annotated[str, typer.Option("--cache-size", help="What its files may take.")] = "4G",
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Answers that may wait for their turn.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that an answer may take.")] = 3600.0,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="This machine's name, if clients ask for it by one; may be repeated."),
    ] = None,
    chat_template_kwargs: Annotated[
        str,
        typer.Option(help="What chat templates are told, in JSON: '{\"enable_thinking\": false}'.", show_default=False),
    ] = "{}",
    **sampling: Any,
) -> None:
    """Serve models over HTTP, by the APIs of OpenAI and Anthropic, with a page to talk to.

    After `ggpy serve model.gguf` the page is at http://127.0.0.1:8080, and OpenAI's API at http://127.0.0.1:8080/v1.

    Sampling options and those of chat templates are for requests that don't say otherwise.
    """
    if missing := missing_packages("serve"):
        raise Error(f"serving needs {', '.join(missing)}: pip install 'ggpy[serve]'")
    try:
        import uvicorn

        from ..generate.memory import machine_memory
        from ..server.app import application
        from ..server.connections import bound, config
        from ..server.guard import Limits
        from ..server.models import Cache, Served
    except ImportError as error:
        raise Error(f"serving needs more packages ({error}): pip install 'ggpy[serve]'") from None
    named = [_named(model) for model in models or ["demo"]]
    if alias is not None:
        if len(named) > 1:
            raise Error("--alias is for one model; name several as NAME=MODEL")
        named = [(alias, named[0][1])]
    if len({name for name, _ in named}) < len(named):
        raise Error("two models have the same name; NAME=MODEL gives another")
    how = {"n_ctx": ctx, "n_threads": threads, "kv_type": kv_type}
    if kv_memory is not None:
        how["kv_memory"] = byte_count(kv_memory)
    hosts = [*(allowed_host or []), host]
    limits = Limits(api_key, max_queue, timeout, hosts=hosts)
    given = {n: v for n, v in sampling.items() if context.get_parameter_source(n) != _default_source()}
    most = byte_count(memory) if memory is not None else machine_memory() * 4 // 5
    template_kwargs = _template_kwargs(chat_template_kwargs)
    _log_as_json()
    # Before anything that takes time: the port may be somebody else's.
    with bound(host, port) as at, kernel_progress() as progress:
        served = [
            Served(
                name,
                find_model(model),
                {**how, "progress": progress},
                None if cache_dir is None else Cache(cache_dir, byte_count(cache_size)),
            )
            for name, model in named
        ]
        failures: list[Exception] = []

        def end(error: Exception) -> None:
            failures.append(error)
            server.should_exit = True

        app = application(served, most, limits, sampling_values(given), template_kwargs, end)
        server = uvicorn.Server(config(app, host, port))
        at.listen(server.config.backlog)
        name = f"[{host}]" if ":" in host else host
        logging.getLogger("ggpy.server").info("running on http://%s:%d", name, at.getsockname()[1])
        server.run([at])
    if failures:
        raise failures[0]
    if not server.started:
        sys.exit(1)


def _named(model: str) -> tuple[str, str]:
    """The name and the place of a MODEL argument."""
    found = re.fullmatch(r"([\w.:-]+)=(.+)", model)
    if found and not Path(model).exists():
        return found[1], found[2]
    return (Path(model).stem if model.endswith(".gguf") else Path(model).name or model), model


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise Error(f"--chat-template-kwargs is a JSON object, not {text}")
    return kwargs


def _default_source() -> Any:
    from click.core import ParameterSource

    return ParameterSource.DEFAULT


class _JSONFormatter(logging.Formatter):
    """A line of JSON for each record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        line |= {"message": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONFormatter())
    for name in ("ggpy", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(os.environ.get("GGPY_LOG", "info").upper())
