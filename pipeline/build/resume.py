"""Recognises a build that was begun with the same settings and files, so that it may resume.

A resumed build reads plan, sketch and template from the cache, skips every committed shard, and
goes on with the first sample of each other shard. If a setting or a file differs, it first reads
all samples again, to make a plan that must equal the stored one (manifest.py). Refuses the one
change that no plan shows: another number of quality samples.
"""

import dataclasses
import json
from pathlib import Path

from pipeline.config.build import BuildConfig
from pipeline.config.plugins import load_plugins
from teacher_cache.folder.layout import committed
from teacher_cache.storage.open_store import open_store

SETTINGS_FILE = "build.json"


def keep_settings(config: BuildConfig) -> None:
    """Write the settings and the state of the input files beside the plan."""
    open_store(config.out).write_atomic(SETTINGS_FILE, _settings(config).encode())


def is_unchanged(config: BuildConfig) -> bool:
    """Whether the cache was begun with these settings, and teacher and source are unchanged."""
    cache = open_store(config.out)
    known = cache.exists(SETTINGS_FILE) and cache.read(SETTINGS_FILE) == _settings(config).encode()
    # Whether anything remote changed cannot be seen here: the plan compares its content.
    return known and Path(config.teacher).exists() and Path(config.source.path).exists()


def require_same_quality_samples(config: BuildConfig) -> None:
    """Raise ValueError if written shards were measured on another number of samples."""
    cache = open_store(config.out)
    if not cache.exists(SETTINGS_FILE) or not committed(cache):
        return
    begun = json.loads(cache.read(SETTINGS_FILE))["config"].get("quality_samples")
    if begun is not None and begun != config.quality_samples:
        raise ValueError(
            f"{config.out}: the quality of its {len(committed(cache))} written shards was measured "
            f"on {begun} samples of each, found quality_samples {config.quality_samples} now; "
            f"continue with {begun}, or build into a new folder"
        )


def _settings(config: BuildConfig) -> str:
    """The build's settings and the state of its input files, as text to compare."""
    state = {
        "config": dataclasses.asdict(dataclasses.replace(config, require_quality=False)),
        "teacher": _files(Path(config.teacher)),
        "source": _files(Path(config.source.path)),
        "chat_template": config.chat_template and _files(config.chat_template),
        "plugins": load_plugins(config.plugin),
    }
    return json.dumps(state, sort_keys=True, indent=1, default=str) + "\n"


def _files(path: Path) -> list[tuple[str, int, int]] | None:
    """(name, bytes, time of change) of a file or of a folder's files; None if not local."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    if not path.exists():
        return None
    stats = [(str(file), file.stat()) for file in found if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
