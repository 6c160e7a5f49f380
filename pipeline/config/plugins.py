"""Imports the modules of a user's own that `--plugin` names, and says which code they hold.

A plugin registers what the product looks up by name: a geometry, a compressor, classes of
transformers. Every process of a stage imports it before it looks anything up.
"""

import hashlib
import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def load_plugins(names: Sequence[str]) -> tuple[str, ...]:
    """Import the modules; returns "<name> <SHA-256 of its source>" for each.

    A package's digest covers all .py files in it. ValueError for a module that is not found or
    cannot be imported.
    """
    return tuple(f"{name} {_imported(name)}" for name in names)


def _imported(name: str) -> str:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # its parent is missing, or is no package
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"--plugin {name}: there is no such module; install it, or put its folder into "
            "PYTHONPATH (of every worker)"
        )
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"--plugin {name}: importing {spec.origin} fails: {type(error).__name__}: {error}"
        ) from error
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files or [Path(spec.origin)]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
