"""The subcommands that read sealed caches (verify, inspect) and remove leftovers (gc)."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cli.extras import require_extra
from jobs.cli.output import echo, warn
from pipeline.config.plugins import load_plugins


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte, key and number of a sealed cache; exit code 3 if anything is wrong.

    With --teacher, also run the teacher again over some samples and compare.

    Example: emkd verify cache
    """

    cache: tyro.conf.Positional[str]
    """Folder, or URL in an object store."""
    workers: int | None = None
    """Threads, one shard each; default: 8, at most the number of CPUs."""
    teacher: str | None = None
    """Also run this teacher again and compare: the one of the cache, folder or hub id."""
    samples: int = 32
    """Samples that the teacher runs over, in the same batches as in the build."""
    device: str = "auto"
    """Device of the teacher."""
    json: bool = False
    """Print the report as JSON."""
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Module of yours to import first (package.module); repeatable."""

    def __call__(self) -> int:
        """Verify, then print the problems."""
        from jobs.cluster.progress import ProgressBars
        from teacher_cache.folder.verify import verify_cache

        plugins = load_plugins(self.plugin)
        if self.teacher is not None:
            from pipeline.inspection.verify_teacher import require_processor

            require_processor(self.teacher)  # before every byte of the cache is read
        with ProgressBars() as bars:
            report = verify_cache(self.cache, bars.update, self.workers)
            problems, plain = list(report.problems), dataclasses.asdict(report)
            lines = [f"{self.cache}: {report.samples} samples in {report.shards} shards"]
            if self.teacher is not None and not problems:
                from pipeline.inspection.verify_teacher import render_teacher, verify_teacher
                from teacher_cache.folder.reader import CacheReader

                again = verify_teacher(
                    CacheReader.open(self.cache),
                    self.teacher,
                    num_samples=self.samples,
                    device=self.device,
                    plugins=plugins,
                    progress=bars.update,
                )
                problems += again.problems
                plain["teacher"] = dataclasses.asdict(again)
                lines += [f"{self.teacher}: ran over {again.samples} samples again"]
                lines += render_teacher(again)
        if self.json:
            echo(json.dumps(plain))
        else:
            for line in [*(f"PROBLEM {problem}" for problem in problems), *lines]:
                echo(line)
            echo(f"{len(problems)} problems" if problems else "no problem found")
        return 3 if problems else 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a cache, or one of its samples in words and as a picture.

    Example: emkd inspect cache --sample 3f2a --tokenizer teacher --picture sample.png
    """

    cache: tyro.conf.Positional[str]
    """Folder, or URL in an object store."""
    sample: str | None = None
    """The sample to show: its key, the first characters of it, or its id in the source."""
    tokenizer: str | None = None
    """Folder of the teacher, to show a sample's tokens as text instead of ids."""
    picture: Path | None = None
    """PNG file to draw the sample to: images, view grids and the uncertainty of each token."""
    json: bool = False
    """Print the description as JSON."""
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Module of yours to import first (package.module); repeatable."""

    def __call__(self) -> int:
        """Print the description; draw the picture."""
        load_plugins(self.plugin)
        if self.picture is not None:
            require_extra("report")
        from pipeline.fidelity.cache_quality import render_quality, summarise, warning_text
        from pipeline.inspection.cache import describe_cache, render
        from teacher_cache.folder.reader import CacheReader

        reader, quality = CacheReader.open(self.cache), None
        if self.sample is None:
            if self.picture is not None or self.tokenizer is not None:
                raise ValueError("--picture and --tokenizer show one sample: name it by --sample")
            described, quality = describe_cache(reader), summarise(reader.seal)
            if quality is not None and not self.json:
                del described["quality"]  # a table says it better
        else:
            from pipeline.inspection.sample import describe_sample, find_sample, load_tokenizer

            key = reader.keys[find_sample(reader, self.sample)]
            path = self.tokenizer
            tokenizer = None if path is None else load_tokenizer(path, reader.spec)
            described = describe_sample(reader, key, tokenizer)
            if self.picture is not None:
                from pipeline.inspection.picture import draw_sample

                described["picture"] = str(draw_sample(reader, key, self.picture))
        echo(json.dumps(described, indent=1) if self.json else render(described))
        if quality is not None:
            if not self.json:
                echo(render_quality(quality))
            warn(warning_text(quality, self.cache))
        return 0


@dataclass(frozen=True, kw_only=True)
class Gc:
    """Remove the leftover files of killed and losing attempts from a sealed cache.

    Example: emkd gc cache --dry-run
    """

    cache: tyro.conf.Positional[str]
    """Folder, or URL in an object store."""
    grace_hours: float = 24.0
    """Keep files younger than this."""
    dry_run: bool = False
    """List the files without removing them."""
    json: bool = False
    """Print the report as JSON."""

    def __call__(self) -> int:
        """Remove the files and list them."""
        from teacher_cache.folder.garbage import collect_garbage

        report = collect_garbage(self.cache, self.grace_hours, self.dry_run)
        if self.json:
            echo(json.dumps(dataclasses.asdict(report) | {"num_bytes": report.num_bytes}, indent=1))
            return 0
        done = "would be removed" if self.dry_run else "removed"
        for leftover in report.removed:
            echo(f"{leftover.file}: {leftover.num_bytes} bytes {done}")
        echo(
            f"{self.cache}: {len(report.removed)} files, {report.num_bytes} bytes {done}; "
            f"{len(report.kept)} are younger than {self.grace_hours:g} hours"
        )
        return 0
