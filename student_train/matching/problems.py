"""Cuts a micro-batch's vision tokens into assignment problems.

A problem is one view of one image (`scope=view`: both models cut the image alike) or all views of
one image (`scope=global`). Its rows are spans of those of the batch. Problems are in the order of
samples and of the student's views. Dropped student tokens are in no problem; a view (image) without
student tokens gives none. Refuses two sides with different views or, for scope=global, images.
"""

import zlib
from bisect import bisect_left
from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from student_train.config.objective import MatchScope
from student_train.matching.geometry import TokenPlaces, view_geometry
from teacher_cache.schema.samples import ViewGrid

_Spans = dict[tuple[int, ...], list[range]]
"""Rows by (image, view) or by (image,)."""


class VisionTokens(NamedTuple):
    """The vision tokens of one sample on each side, in the order of their rows."""

    student_views: Sequence[ViewGrid]
    teacher_views: Sequence[ViewGrid]
    student_kept: Int[Tensor, " N"] | None = None
    """Ascending numbers of the student's tokens that are left; None: all."""
    seed: int = 0
    """A number of the sample, for the correspondence `random`."""


class Problem(NamedTuple):
    """One assignment problem, as spans of the rows of all samples."""

    sample: int
    student: list[range]
    teacher: list[range]
    seed: int = 0
    """Differs from problem to problem of a sample, and never changes."""
    geometry: TokenPlaces | None = None
    """None for scope=global."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of student and of teacher tokens."""
        return sum(map(len, self.student)), sum(map(len, self.teacher))


class Problems(NamedTuple):
    """The problems of a micro-batch, and the number of rows of each sample on each side."""

    all: list[Problem]
    num_student: list[int]
    num_teacher: list[int]


def find_problems(samples: Sequence[VisionTokens], scope: MatchScope) -> Problems:
    """Cut samples into problems. ValueError where their two sides differ in views (images)."""
    found = Problems([], [], [])
    student_start = teacher_start = 0
    for number, sample in enumerate(samples):
        student, student_stop = _spans(sample.student_views, scope, student_start)
        teacher, teacher_stop = _spans(sample.teacher_views, scope, teacher_start)
        _require_same(student.keys(), teacher.keys(), scope)
        whole, kept = student, sample.student_kept
        if kept is not None:
            student = _only_kept(student, student_start, kept.tolist())
            student_stop = student_start + len(kept)
        grids = _grids(sample) if scope == "view" else {}
        for key, own in student.items():
            geometry = None
            if scope == "view":
                geometry = view_geometry(*grids[key])
                if kept is not None:
                    start = whole[key][0].start - student_start
                    inside = (kept >= start) & (kept < start + len(whole[key][0]))
                    geometry = geometry.of_students(kept[inside] - start)
            seed = zlib.crc32(repr((sample.seed, key)).encode())
            found.all.append(Problem(number, own, teacher[key], seed, geometry))
        found.num_student.append(student_stop - student_start)
        found.num_teacher.append(teacher_stop - teacher_start)
        student_start, teacher_start = student_stop, teacher_stop
    return found


def rows_of(spans: Sequence[range]) -> slice | Tensor:
    """The rows of spans in order: a slice, which copies nothing, where the spans adjoin."""
    start = stop = spans[0].start
    for span in spans:
        if span.start != stop:
            return torch.cat([torch.arange(each.start, each.stop) for each in spans])
        stop = span.stop
    return slice(start, stop)


def _spans(views: Sequence[ViewGrid], scope: MatchScope, start: int) -> tuple[_Spans, int]:
    """The spans of each problem, counted from `start`, and the start of the next sample."""
    spans: _Spans = {}
    for view in views:
        key = (view.image, view.view) if scope == "view" else (view.image,)
        stop = start + view.num_tokens
        spans.setdefault(key, []).append(range(start, stop))
        start = stop
    return spans, start


def _grids(sample: VisionTokens) -> dict[tuple[int, ...], tuple[ViewGrid, ViewGrid]]:
    """The student's and the teacher's grid of each view."""
    theirs = {(view.image, view.view): view for view in sample.teacher_views}
    own = {(view.image, view.view): view for view in sample.student_views}
    return {key: (view, theirs[key]) for key, view in own.items()}


def _only_kept(spans: _Spans, start: int, kept: list[int]) -> _Spans:
    """The same spans, counted in kept tokens instead of all tokens."""
    assert kept == sorted(kept)

    def left(span: range) -> range:
        first, last = (bisect_left(kept, edge - start) for edge in (span.start, span.stop))
        return range(start + first, start + last)

    rows = {key: [left(span) for span in each] for key, each in spans.items()}
    return {key: each for key, each in rows.items() if any(map(len, each))}


def _require_same(
    student: Set[tuple[int, ...]], teacher: Set[tuple[int, ...]], scope: MatchScope
) -> None:
    if student == teacher:
        return
    only_student, only_teacher = sorted(student - teacher), sorted(teacher - student)
    if scope == "view":
        raise ValueError(
            "matching view by view needs the same views on both sides, as (image, view): only the "
            f"student has {only_student}, only the teacher {only_teacher}; use scope=global"
        )
    raise ValueError(
        f"the student and the teacher saw different images: only the student has {only_student}, "
        f"only the teacher {only_teacher}; the cache belongs to other samples"
    )
