"""The subcommands that make caches from caches: subset, export, merge, extend.

Each writes an ordinary sealed cache, and resumes when it is run again.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jobs.cli.output import echo
from jobs.cluster.options import RayOptions
from pipeline.config.extend import ExtendConfig
from teacher_cache.schema.options import ShardFormatName


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Write some samples of a sealed cache as a new cache; frames are copied unchanged.

    A sample must pass everything that is given; --fraction is drawn of what is left then.

    Example: emkd subset cache --fraction 0.1 --out small
    """

    cache: tyro.conf.Positional[str]
    """Folder, or URL in an object store."""
    out: str
    keys: Path | None = None
    """File with one key per line."""
    fraction: float | None = None
    """Share of the samples, drawn at random with --seed."""
    seed: int = 0
    min_vision_tokens: int | None = None
    max_vision_tokens: int | None = None
    min_response_tokens: int | None = None
    max_response_tokens: int | None = None
    format: ShardFormatName | None = None
    """Default: that of the cache."""
    samples_per_shard: int | None = None
    """Default: that of the cache's largest shard."""
    json: bool = False
    """Print the seal as JSON."""

    def __call__(self) -> int:
        """Write the cache, then print a summary."""
        from jobs.cluster.progress import ProgressBars
        from teacher_cache.derive.subset import Selection, subset_cache

        keys = None if self.keys is None else _read_keys(self.keys)
        names = [field.name for field in dataclasses.fields(Selection) if field.name != "keys"]
        selection = Selection(keys=keys, **{name: getattr(self, name) for name in names})
        with ProgressBars() as bars:
            seal = subset_cache(
                self.cache,
                self.out,
                selection,
                form=self.format,
                samples_per_shard=self.samples_per_shard,
                progress=bars.update,
            )
        return print_seal(self.out, seal, self.json)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a sealed cache in the other format: the same samples, order and identity.

    Exporting back gives the bytes of the files that were exported.

    Example: emkd export cache --format webdataset --out tars
    """

    cache: tyro.conf.Positional[str]
    """Folder, or URL in an object store."""
    out: str
    format: ShardFormatName
    json: bool = False
    """Print the seal as JSON."""

    def __call__(self) -> int:
        """Write the cache, then print a summary."""
        from jobs.cluster.progress import ProgressBars
        from teacher_cache.derive.export import export_cache

        with ProgressBars() as bars:
            seal = export_cache(self.cache, self.out, self.format, bars.update)
        return print_seal(self.out, seal, self.json)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Join sealed caches of one teacher and one recipe; files are linked or copied unopened.

    One disk holds them once then: a file has a name in both caches.

    Example: emkd merge cache-a cache-b --out both
    """

    caches: tyro.conf.Positional[tuple[str, ...]]
    """Folders, or URLs in an object store."""
    out: str
    on_duplicate: Literal["refuse", "first"] = "refuse"
    """What to do with samples that several caches hold."""
    format: ShardFormatName | None = None
    """Default: that of the first cache; files of the other format are rewritten."""
    json: bool = False
    """Print the seal as JSON."""

    def __call__(self) -> int:
        """Write the cache, then print a summary."""
        from jobs.cluster.progress import ProgressBars
        from teacher_cache.derive.merge import merge_caches

        with ProgressBars() as bars:
            seal = merge_caches(
                self.caches,
                self.out,
                on_duplicate=self.on_duplicate,
                form=self.format,
                progress=bars.update,
            )
        return print_seal(self.out, seal, self.json)


@dataclass(frozen=True, kw_only=True)
class Extend:
    """Write a new cache: a sealed one, and more samples (--source) or records (--records).

    Files of the old cache are linked or copied unopened. Run again to resume.

    Example: emkd extend --cache cache --source more.json --teacher MODEL --out larger
    """

    config: ExtendConfig
    run: RayOptions = RayOptions()
    json: bool = False
    """Print the seal as JSON."""

    def __call__(self) -> int:
        """Write the cache, then print a summary."""
        from jobs.stages.build import run_extend

        seal = run_extend(self.config, self.run)
        return print_seal(self.config.out, seal, self.json)


def _read_keys(file: Path) -> tuple[str, ...]:
    """The keys of a text file, one per line; ValueError if it is not text."""
    try:
        return tuple(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--keys {file} cannot be read ({error}); give a text file with one key a line"
        ) from error


def print_seal(out: str, seal: Any, as_json: bool) -> int:
    """Print a summary of a new seal; returns exit code 0."""
    told: dict[str, Any] = {
        "cache": out,
        "samples": seal.num_samples,
        "shards": len(seal.shards),
        "bytes": seal.num_bytes,
        "format": seal.format,
        "fingerprint": seal.fingerprint,
    }
    if as_json:
        echo(json.dumps(told))
    else:
        echo(
            f"{out}: {told['samples']} samples in {told['shards']} {told['format']} shards, "
            f"{told['bytes'] / 1e6:.1f} MB, fingerprint {told['fingerprint'][:12]}"
        )
    return 0
