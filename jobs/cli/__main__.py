"""The `emkd` command: one subcommand for each stage, flags and help from the settings' fields.

Exit codes: 0 done; 1 a crash (with its traceback) or a failed job; 2 bad input, named in one
message; 3 `verify` found problems; 4 `build --require-quality` made a cache that misses its stated
quality. `--config FILE` (JSON or YAML, or inline JSON) gives a stage's
settings; flags beside it override them. Heavy libraries are imported by the command that needs
them, not before, so that `emkd --help` answers at once.
"""

import dataclasses
import io
import logging
import os
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import tyro
import yaml

from jobs.cli import flags, stage_commands
from jobs.cli.stage_commands import Submit
from teacher_cache.schema.strict_json import decode_json, decode_mapping

_FRAME = " |+\u2502\u256d\u256e\u2570\u256f"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_REFUSED = re.compile(r"Error parsing __tyro\S*: (.*?)(?= (?:\u2500|-){3}|$)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return parse(arguments)()
    except (ValueError, OSError) as error:
        if os.environ.get("EMKD_DEBUG"):
            raise
        print(f"emkd {' '.join(arguments[:1])}: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str]) -> stage_commands.Command:
    """Build the command that the arguments describe; exits with usage and code 2 where they err.

    What follows `--` belongs to the stage that `emkd submit` sends, and is parsed as that stage's
    own arguments.
    """
    arguments, behind = _split(list(arguments))
    config_text, arguments = _take_config(arguments)
    defaults = stage_commands.defaults()
    if config_text is not None:
        name = arguments[0] if arguments else ""
        config_class = stage_commands.CONFIG_CLASSES.get(name)
        if config_class is None:
            raise ValueError(
                f"--config goes with {', '.join(stage_commands.CONFIG_CLASSES)}; found {name!r}"
            )
        config = _decode(config_class, config_text)
        defaults[name] = dataclasses.replace(defaults[name], config=config)
    kind = tyro.extras.subcommand_type_from_defaults(
        defaults, {name: command.__doc__ or "" for name, command in defaults.items()}
    )
    with flags.REGISTRY, _plain_errors(arguments):
        command: Any = tyro.cli(
            kind,
            prog="emkd",
            description=stage_commands.__doc__,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    if behind is not None:
        if not isinstance(command, Submit):
            raise ValueError("'--' goes with emkd submit: emkd submit STAGE ... -- FLAGS")
        return command.with_stage(parse([command.stage, *behind]))
    return command


@contextmanager
def _plain_errors(arguments: Sequence[str]) -> Generator[None]:
    """Let what settings refuse read like every other message: tyro frames it with its own names.

    `Error parsing __tyro-dummy-inner__.config: top_k must be ...` becomes
    `emkd build: --top-k must be ...`; what tyro itself finds stays as it is.
    """
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            yield
    finally:
        text = captured.getvalue()
        flat = " ".join(line.strip(_FRAME) for line in _COLOURS.sub("", text).splitlines())
        found = _REFUSED.search(flat)
        if found is not None:
            name, _, rest = found[1].strip().partition(" ")
            flag = f"--{name.replace('_', '-')}"
            given = any(argument.split("=")[0] == flag for argument in arguments)
            text = f"emkd {arguments[0]}: {flag if given else name} {rest}\n"
        sys.stderr.write(text)


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Remove `--config VALUE` (or `--config=VALUE`) from the arguments and return VALUE."""
    for at, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:at] + arguments[at + 1 :]
        if argument == "--config":
            if at + 1 == len(arguments):
                raise ValueError("--config needs a file, or JSON")
            return arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    return None, arguments


def _decode(config_class: type, text: str) -> object:
    if text.lstrip().startswith("{"):
        return decode_json(config_class, text, "--config")
    file = Path(text)
    if not file.exists():
        raise ValueError(f"--config {file}: no such file")
    if file.suffix in (".yaml", ".yml"):
        return decode_mapping(config_class, yaml.safe_load(file.read_text()), str(file))
    return decode_json(config_class, file.read_text(), str(file))


if __name__ == "__main__":
    sys.exit(main())
