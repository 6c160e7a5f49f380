"""Loads a teacher as a cache's spec says, and checks that it is the cache's own.

Dtype, attention, system prompt, text rules and picture rule are the spec's. Every field that
identifies the teacher is compared; settings of the stored records are not.
"""

import dataclasses
from collections.abc import Iterable

from pipeline.build.response_grid import with_grid
from teacher_cache.schema.errors import CacheMismatchError
from teacher_cache.schema.manifest import CacheSpec, differences
from teacher_cache.schema.options import RecordSettings
from teacher_cache.schema.samples import Sample
from teacher_cache.teacher.teacher import Teacher

TEACHER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "logits_dtype",
    "teacher_class",
    "teacher_weights",
    "teacher_config",
    "compute_dtype",
    "attention",
    "tokenizer",
    "vocabulary",
    "chat_template",
    "image_processor",
    "system_prompt",
    "text",
    "pictures",
    "plugins",
)
"""Fields of a spec that identify the teacher, whatever is recorded of it."""


def load_as(
    path: str, spec: CacheSpec, device: str = "auto", samples: Iterable[Sample] = ()
) -> Teacher:
    """Load the teacher of a folder or hub id as the cache's spec says.

    ValueError before a weight is opened if the processor can encode none of `samples`.
    """
    teacher = Teacher.load(
        path,
        device=device,
        dtype=spec.compute_dtype,
        attention=spec.attention,
        system_prompt=spec.system_prompt,
        text=spec.text,
        pictures=spec.pictures,
        samples=samples,
    )
    return with_grid(teacher, spec.grid)


def other_teacher(spec: CacheSpec, teacher: Teacher) -> list[tuple[str, str, str]]:
    """(field, stored, found) of every field in which the teacher differs from the cache's."""
    found = teacher.spec(RecordSettings(records="topk", top_k=1), batch_size=spec.batch_size)
    stored = dataclasses.replace(found, **{name: getattr(spec, name) for name in TEACHER_FIELDS})
    return differences(stored, found)


def require_same_teacher(spec: CacheSpec, teacher: Teacher, path: str) -> None:
    """Raise `CacheMismatchError` with a table unless the teacher is the cache's own."""
    rows = other_teacher(spec, teacher)
    if rows:
        table = "\n".join(f"  {name}: stored {have}, found {now}" for name, have, now in rows)
        raise CacheMismatchError(
            f"{path} is not the teacher of the cache:\n{table}\n"
            "Give the teacher that the cache was built with."
        )
