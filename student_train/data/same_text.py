"""Refuses samples whose text, images or views differ between student and teacher."""

import torch

from student_train.config.objective import MatchScope
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import TokenSpans
from teacher_cache.schema.teacher_output import TeacherOutput


def check_against_teacher(
    encoded: EncodedSample, output: TeacherOutput, scope: MatchScope | None
) -> None:
    """Raise SampleError where the student's tokens do not correspond to the teacher's.

    The text of the messages must be the same tokens, with the same roles, on the same side of the
    first image. `scope` is the matching's, None without matching: `view` needs the same views in
    the same order, `global` the same images.
    """
    difference = _difference(encoded.spans, output, scope)
    if difference is not None:
        raise SampleError(encoded.source_id, difference)


def _difference(spans: TokenSpans, output: TeacherOutput, scope: MatchScope | None) -> str | None:
    if not torch.equal(spans.content_ids, output.content_ids):
        return _first_difference(spans.content_ids, output)
    for name in ("is_response", "after_image"):
        if not torch.equal(getattr(spans, name), getattr(output, name)):
            return (
                "student and teacher have the same text tokens but differ in which of them are "
                f"{name}; use the teacher's chat template for the student"
            )
    student = [(view.image, view.view) for view in spans.views]
    teacher = [(view.image, view.view) for view in output.views]
    seen, shown = ({image for image, _ in side} for side in (student, teacher))
    if seen != shown:
        return f"the student sees {len(seen)} images, the teacher saw {len(shown)}"
    if scope == "view" and student != teacher:
        return (
            f"the student sees the (image, view) pairs {student}, the teacher saw {teacher}; "
            "use matching scope `global`, or image settings that give equal views"
        )
    return None


def _first_difference(student_ids: torch.Tensor, output: TeacherOutput) -> str:
    common = min(len(student_ids), len(output.content_ids))
    differs = student_ids[:common] != output.content_ids[:common]
    where = int(differs.nonzero()[0]) if bool(differs.any()) else common
    found = student_ids[where : where + 5].tolist()
    expected = output.content_ids[where : where + 5].tolist()
    return (
        f"the student's tokenizer gives {len(student_ids)} text tokens, the teacher's gave "
        f"{len(output.content_ids)}; from token {where} on found ids {found}, expected {expected}; "
        "use a student with the tokenizer and chat template of the cache's teacher"
    )
