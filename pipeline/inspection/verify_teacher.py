"""Runs the teacher again over samples of a sealed cache and compares with what is stored.

Samples come from the shards. Each is computed twice: in its batch of the build (A), and in another
one (B): alone, or in a pair if the build had it alone. The difference between A and B is the
control: rounding that depends on the batch's shape. A sample passes if, for every quantity
(compare_outputs.py), neither the root mean square nor the largest difference between the stored
numbers and A exceeds

    max(4 x the control's over all samples, 4 x eps x the size of the numbers + the codec's error),

with the eps of the coarser of compute and storage dtype. Both runs pass through the cache's codec
first. A teacher whose identity differs from the spec is not run; the report lists the fields.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pipeline.build.teacher_identity import load_as, other_teacher
from pipeline.inspection.compare_outputs import (
    OutputDifference,
    Spread,
    output_differences,
    replaced_ids,
    top_k_by_name,
)
from pipeline.sources.tried import positions_to_try
from teacher_cache.folder.layout import require_plan
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.checkpoint import load_checked_processor, load_config
from teacher_cache.records.make_records import DTYPES_BY_NAME
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput
from teacher_cache.shards.rows import decode_row, encode_row
from teacher_cache.teacher.teacher import Teacher

FACTOR = 4.0
"""Largest acceptable difference, in multiples of the control and of eps."""
_NOTHING = Spread(rms=0.0, largest=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One stored quantity over all samples: the largest spread of any sample, and the verdict."""

    name: str
    stored: Spread
    """Stored against run again, in the same batch."""
    control: Spread
    """Run again in two different batches."""
    failed: int
    """How many samples hold numbers that are not this teacher's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReport:
    """The result of running the teacher again; without problems for the cache's own teacher."""

    samples: int
    other_teacher: tuple[tuple[str, str, str], ...] = ()
    """(field, stored, found) if the teacher is another one; then nothing was run."""
    quantities: tuple[Quantity, ...] = ()
    ids_replaced: tuple[int, int] = (0, 0)
    """(Kept ids that the teacher did not keep again, all kept ids); near ties are expected."""
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class _Sums:
    """The numbers of the samples that were run; no tensors."""

    seen: list[tuple[str, dict[str, tuple[Spread, Spread]]]] = field(default_factory=list)
    """(key, quantity -> (stored against A, smallest tolerance))."""
    control: dict[str, Spread] = field(default_factory=dict)
    ids: tuple[int, int] = (0, 0)
    problems: list[str] = field(default_factory=list)


def require_processor(path: str) -> None:
    """Raise ValueError for a teacher without a usable config or processor; opens no weights."""
    load_checked_processor(path, load_config(path))


def verify_teacher(
    reader: CacheReader,
    path: str,
    *,
    num_samples: int = 32,
    device: str = "auto",
    seed: int = 0,
    plugins: tuple[str, ...] = (),
    progress: Progress = no_progress,
) -> TeacherReport:
    """Compare `num_samples` stored samples (all, if there are fewer) with the teacher in `path`.

    `plugins` is what `load_plugins` returned.

    Raises ValueError if the teacher cannot be loaded or nothing would be compared, and
    `ShardCorruptError` for damaged samples.
    """
    if num_samples < 1:
        raise ValueError(f"samples is {num_samples}, expected at least 1 to compare")
    spec = reader.spec
    tried = (reader.read(row, ()).sample for row in positions_to_try(len(reader)))
    teacher = load_as(path, spec, device, tried)
    teacher.plugins = plugins
    other = other_teacher(spec, teacher)
    if other:
        fields = ", ".join(name for name, _, _ in other)
        problem = f"{path} is not the teacher of {reader.cache}: it differs in {fields}"
        return TeacherReport(samples=0, other_teacher=tuple(other), problems=(problem,))
    if spec.sketch_digest is not None:
        teacher.sketch = reader.sketch_basis()
    settings = spec.settings
    sums, done = _Sums(), 0
    for batch in _batches(reader, num_samples, seed):
        stored = [reader.read(index, reader.parts) for index in batch]
        samples = [cached.sample for cached in stored]
        again = _run(teacher, samples, settings)
        # Alone, or beside another sample if the build had it alone.
        others = [] if len(batch) > 1 else [reader.read((batch[0] + 1) % len(reader), ()).sample]
        control = [_run(teacher, [sample, *others], settings)[0] for sample in samples]
        for cached, first, second in zip(stored, again, control, strict=True):
            _compare(cached, first, second, spec, sums)
        done += len(batch)
        progress("teacher", done, max(done, min(num_samples, len(reader))))
    return _report(sums, done)


def _batches(reader: CacheReader, num_samples: int, seed: int) -> Iterator[list[int]]:
    """The build's batches in a seeded order, until there are enough samples."""
    size = reader.spec.batch_size
    batches: list[list[int]] = []
    row = 0
    for planned, commit in zip(require_plan(reader.cache).shards, reader.seal.shards, strict=True):
        rejected = {sample.key for sample in commit.rejected}
        for start in range(0, len(planned), size):
            count = sum(key not in rejected for key, _ in planned[start : start + size])
            batches.append(list(range(row, row + count)))
            row += count
    random.Random(seed).shuffle(batches)
    left = num_samples
    for batch in filter(None, batches):
        if left <= 0:
            return
        left -= len(batch)
        yield batch


def _run(
    teacher: Teacher, samples: Sequence[Sample], settings: RecordSettings
) -> list[TeacherOutput | str]:
    """Outputs of one batch; the reason in place of a rejected sample's output."""
    outputs = teacher.outputs(samples, settings)
    return [item if isinstance(item, TeacherOutput) else item.reason for item in outputs]


def _compare(
    cached: CachedSample,
    first: TeacherOutput | str,
    second: TeacherOutput | str,
    spec: CacheSpec,
    sums: _Sums,
) -> None:
    sample = cached.sample
    if isinstance(first, str) or isinstance(second, str):
        sums.problems.append(f"sample {sample.key}: the teacher rejects it: {first}, {second}")
        return
    try:
        coded = _through_codec(sample, first, spec)
        stored = output_differences(cached.output, coded)
        control = output_differences(coded, _through_codec(sample, second, spec))
        codec = output_differences(first, coded)
    except ValueError as error:
        sums.problems.append(f"sample {sample.key}: {error}")
        return
    seen: dict[str, tuple[Spread, Spread]] = {}
    for name, difference in stored.items():
        seen[name] = (difference.apart, _least(difference, codec[name], spec))
        known = sums.control.get(name, _NOTHING)
        sums.control[name] = known.each(control[name].apart, max)
    if cached.output.sketch is not None:  # int8 codes are part of the record itself
        steps = Spread.of(cached.output.sketch.scale)
        apart, least = seen["sketch"]
        seen["sketch"] = (apart, least.each(steps, lambda left, right: left + right))
    sums.seen.append((sample.key, seen))
    theirs = top_k_by_name(coded)
    for name, record in top_k_by_name(cached.output).items():
        replaced, kept = replaced_ids(record, theirs[name])
        sums.ids = (sums.ids[0] + replaced, sums.ids[1] + kept)


def _through_codec(sample: Sample, output: TeacherOutput, spec: CacheSpec) -> TeacherOutput:
    return decode_row(encode_row(CachedSample(sample=sample, output=output), spec), spec).output


def _least(stored: OutputDifference, codec: OutputDifference, spec: CacheSpec) -> Spread:
    """The tolerance where the control finds no difference."""
    eps = max(
        torch.finfo(dtype).eps for dtype in (stored.dtype, DTYPES_BY_NAME[spec.compute_dtype])
    )
    rounding = stored.scale.times(FACTOR * eps)
    return rounding.each(codec.apart, lambda left, right: left + right)


def _report(sums: _Sums, num_samples: int) -> TeacherReport:
    problems = list(sums.problems)
    quantities: list[Quantity] = []
    for name, control in sums.control.items():
        largest, failed = _NOTHING, 0
        for key, quantities_of in sums.seen:
            if name not in quantities_of:
                continue
            apart, least = quantities_of[name]
            allowed = control.times(FACTOR).each(least, max)
            largest = largest.each(apart, max)
            if not apart.within(allowed):
                failed += 1
                problems.append(
                    f"sample {key}: its {name} differ from this teacher's by {apart.rms:.3g} "
                    f"(rms; largest {apart.largest:.3g}), expected at most {allowed.rms:.3g} "
                    f"(largest {allowed.largest:.3g}); the cache is of another teacher, or was "
                    "computed on other hardware or libraries: build it again"
                )
        quantities.append(Quantity(name=name, stored=largest, control=control, failed=failed))
    return TeacherReport(
        samples=num_samples,
        quantities=tuple(quantities),
        ids_replaced=sums.ids,
        problems=tuple(problems),
    )


def render_teacher(report: TeacherReport) -> list[str]:
    """The report as lines of text."""
    if report.other_teacher:
        return [f"  {name}: stored {have}, found {now}" for name, have, now in report.other_teacher]
    heads = ("stored: rms", "largest", "control: rms", "largest")
    lines = [f"{'quantity':28}" + "".join(f"{head:>14}" for head in heads)]
    for found in report.quantities:
        numbers = (found.stored.rms, found.stored.largest, found.control.rms, found.control.largest)
        failed = f"  {found.failed} samples differ" if found.failed else ""
        lines.append(f"{found.name:28}" + "".join(f"{x:>14.3g}" for x in numbers) + failed)
    replaced, kept = report.ids_replaced
    if kept:
        lines.append(f"ids that the teacher did not keep again: {replaced} of {kept}")
    return lines
