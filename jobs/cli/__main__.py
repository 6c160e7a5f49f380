"""Runs the `emkd` command: one subcommand for each stage, its flags made from the settings' fields.

Exit codes: 0 done; 1 a crash (with its traceback) or a failed job; 2 bad input, named in one
message; 3 `verify` found problems; 4 `build --require-quality` made a cache below the stated
quality; 5 `submit` lost the cluster's dashboard; 141 whoever read the output is gone. `--config
FILE` (JSON or YAML, or inline JSON) gives the settings of a stage; flags beside it override them.
Each command imports its own heavy libraries when it is called, so that `emkd --help` is quick.
"""

import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import tyro

from jobs.cli import flags, stage_commands
from jobs.cli.config_file import read_config
from jobs.cli.output import EscapingFormatter, echo, warn
from jobs.cli.removed_flags import refuse_removed
from jobs.cli.stage_commands import Submit

BROKEN_PIPE = 141
"""Exit code of a process that SIGPIPE ends, as shells report it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    log = logging.StreamHandler()
    log.setFormatter(EscapingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        echo(f"emkd {version('emkd')}")
        return 0
    try:
        try:
            return parse(arguments)()
        finally:
            sys.stdout.flush()  # else a broken pipe is only found after this function has ended
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        expected = isinstance(error, ValueError | OSError) or _is_memory(error)
        if not expected or os.environ.get("EMKD_DEBUG"):
            raise
        warn(f"emkd {' '.join(arguments[:1])}: {_said(error)}")
        return 2


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out. Torch says so by RuntimeErrors, which are told without torch."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch)


def _said(error: Exception) -> str:
    if not _is_memory(error):
        return str(error)
    text = f" ({error})" if str(error) else ""
    return (
        f"there is not enough memory{text}; use a smaller --batch-size (of train: "
        "--micro-batch-size), fewer workers or a machine with more. What is finished stays: the "
        "same command goes on"
    )


def parse(arguments: Sequence[str]) -> stage_commands.Command:
    """The command that the arguments describe.

    What follows `--` are the arguments of the stage that `emkd submit` sends. Raises ValueError
    for a value that a record refuses; exits with usage and code 2 for unknown or malformed flags.
    """
    arguments, behind = _split(list(arguments))
    refuse_removed(arguments)
    config_text, arguments = _take_config(arguments)
    defaults = stage_commands.defaults()
    if config_text is not None:
        name = arguments[0] if arguments else ""
        config_class = stage_commands.CONFIG_CLASSES.get(name)
        if config_class is None:
            raise ValueError(
                f"--config goes with {', '.join(stage_commands.CONFIG_CLASSES)}; found {name!r}"
            )
        config = read_config(config_class, config_text)
        defaults[name] = dataclasses.replace(defaults[name], config=config)
    described = {name: inspect.cleandoc(type(one).__doc__ or "") for name, one in defaults.items()}
    first_lines = {name: text.splitlines()[0] for name, text in described.items()}
    chosen = arguments[0] if arguments else ""
    texts = first_lines | {name: text for name, text in described.items() if name == chosen}
    kind = tyro.extras.subcommand_type_from_defaults(defaults, texts)
    with flags.REGISTRY:
        parsed: Any = tyro.cli(
            kind,
            prog="emkd",
            description=stage_commands.__doc__,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    try:
        command = flags.checked(parsed)
    except ValueError as error:
        raise ValueError(_name_flags(str(error), arguments)) from error
    if behind is not None:
        if not isinstance(command, Submit):
            raise ValueError("'--' goes with emkd submit: emkd submit STAGE ... -- FLAGS")
        return command.with_stage(parse([command.stage, *behind]))
    return command


def _name_flags(message: str, arguments: Sequence[str]) -> str:
    """The message of a record, with a flag in place of the field that it begins with.

    `top_k must be >= 1` becomes `--top-k must be >= 1` where that flag was given.
    """
    field, _, rest = message.partition(" ")
    flag = f"--{field.replace('_', '-')}"
    given = {argument.split("=")[0] for argument in arguments}
    return f"{flag} {rest}" if flag in given else message


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--config VALUE` or `--config=VALUE`, and the other arguments."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:at] + arguments[at + 1 :]
        if argument == "--config":
            if at + 1 == len(arguments):
                raise ValueError("--config needs a file, or JSON")
            return arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    return None, arguments


if __name__ == "__main__":
    sys.exit(main())
