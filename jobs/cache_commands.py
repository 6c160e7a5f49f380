"""The subcommands that look at sealed caches, and those that make caches from caches.

verify and inspect read; nothing here loads a heavy library before its command is called. Exit codes
as of every command (cli.py); 3 is a cache that something is wrong with.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from jobs.progress import say


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte, key and number of a sealed cache; exit code 3 if anything is wrong."""

    cache: tyro.conf.Positional[Path]
    json: bool = False
    """Print the report as JSON."""

    def __call__(self) -> int:
        """Verify, and print what was found."""
        from jobs.progress import Bars
        from teacher_cache.verify import verify_cache

        with Bars() as bars:
            report = verify_cache(self.cache, partial(bars.update, "verify"))
        if self.json:
            say(json.dumps(dataclasses.asdict(report)))
        else:
            for problem in report.problems:
                say(f"PROBLEM {problem}")
            state = f"{len(report.problems)} problems" if report.problems else "no problem found"
            say(f"{self.cache}: {report.samples} samples in {report.shards} shards, {state}")
        return 3 if report.problems else 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a cache says of itself, or one of its samples, in words and as a picture."""

    cache: tyro.conf.Positional[Path]
    sample: str | None = None
    """Key (or its beginning) of the sample to show."""
    tokenizer: str | None = None
    """Folder of the teacher: shows a sample's tokens as texts, not as ids."""
    picture: Path | None = None
    """PNG file to draw the sample in: its images, view grids and what each token leaves open."""
    json: bool = False
    """Print the description as JSON."""

    def __call__(self) -> int:
        """Print the description; draw the picture."""
        from pipeline.inspect_cache import describe_cache, render
        from teacher_cache.reader import CacheReader

        reader = CacheReader.open(self.cache)
        if self.sample is None:
            if self.picture is not None or self.tokenizer is not None:
                raise ValueError("--picture and --tokenizer show one sample: name it by --sample")
            described = describe_cache(reader)
        else:
            from pipeline.inspect_picture import draw_sample
            from pipeline.inspect_sample import describe_sample, load_tokenizer

            path = self.tokenizer
            tokenizer = None if path is None else load_tokenizer(path, reader.spec)
            described = describe_sample(reader, self.sample, tokenizer)
            if self.picture is not None:
                described["picture"] = str(draw_sample(reader, self.sample, self.picture))
        say(json.dumps(described, indent=1) if self.json else render(described))
        return 0
