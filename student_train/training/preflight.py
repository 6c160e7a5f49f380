"""Checks every sample of a cache against the student, before the first step of a run.

Ranks share the samples; all of them get the whole result. Images are not decoded: the size in an
image's header decides its views (size_encoder.py). What fails so is confirmed with the encoder of
the training, which decodes. The result is stored in the run's folder, so that a resumed run does
not repeat the check:

    preflight.json    what was compared, and every misfit with its reason
"""

import dataclasses
import importlib.metadata
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel

from student_train.config.objective import MatchScope
from student_train.config.recipe import TrainerSettings
from student_train.data.batch_plan import BatchPlan
from student_train.data.misfits import StudentLimits, describe_misfits, find_misfits
from student_train.models.forward import output_head
from student_train.training.checkpoint import PREFLIGHT_FILE
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.size_encoder import SizeEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import CacheMismatchError, DecodeError, ShardCorruptError
from teacher_cache.schema.progress import Progress
from teacher_cache.schema.samples import RejectedSample
from teacher_cache.schema.strict_json import StrictRecord, decode_mapping
from teacher_cache.storage.durable_files import write_atomic

logger = logging.getLogger(__name__)

VERSION = 1
"""Goes up by one whenever the check finds other misfits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(StrictRecord):
    """What a check compared; a stored result counts only for the same."""

    cache: str
    """Fingerprint of the cache."""
    student: str
    """Digest of the student's initial weights and files."""
    chat_template: str | None
    scope: MatchScope | None
    libraries: dict[str, str]
    """Versions of what renders, tokenizes and resizes."""
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight(StrictRecord):
    """The result of a check."""

    compared: Compared
    num_samples: int
    misfits: tuple[RejectedSample, ...]
    """In the order of the cache."""

    def require_none(self, run: Path, reader: CacheReader) -> None:
        """Raise CacheMismatchError with all causes unless every sample fits."""
        if self.misfits:
            raise CacheMismatchError(
                f"{len(self.misfits)} of {self.num_samples} samples of {reader.cache} do not fit "
                f"the student:\n{describe_misfits(self.misfits)}\n{run / PREFLIGHT_FILE} lists all "
                "of them. Nothing was trained. Follow the remedies above, or leave these samples "
                "out with --on-bad-sample skip"
            )

    def skipped(self, reader: CacheReader) -> tuple[int, ...]:
        """The numbers of the misfits; CacheMismatchError where no sample is left to train on."""
        if len(self.misfits) == self.num_samples:
            raise CacheMismatchError(
                f"none of the {self.num_samples} samples of {reader.cache} fits the student:\n"
                f"{describe_misfits(self.misfits)}\nNothing was trained. Follow the remedies above"
            )
        return tuple(reader.find(misfit.key) for misfit in self.misfits)

    def describe_skipped(self, run: Path) -> str:
        """What is left out, for the console."""
        return (
            f"{len(self.misfits)} of {self.num_samples} samples do not fit the student and are "
            f"skipped:\n{describe_misfits(self.misfits)}\n{run / PREFLIGHT_FILE} lists all of them"
        )


def what_is_compared(
    reader: CacheReader, student: str, chat_template: str | None, scope: MatchScope | None
) -> Compared:
    """What a check of this cache against this student compares."""
    names = ("transformers", "tokenizers", "pillow")
    return Compared(
        cache=reader.fingerprint,
        student=student,
        chat_template=chat_template,
        scope=scope,
        libraries={name: importlib.metadata.version(name) for name in names},
    )


def stored_preflight(run: Path, compared: Compared) -> Preflight | None:
    """The result that the folder holds, if it is of the same comparison."""
    path = run / PREFLIGHT_FILE
    if not path.exists():
        return None
    try:
        fields = from_checked_json(path.read_bytes(), str(path))
        stored = decode_mapping(Preflight, fields, str(path))
    except DecodeError as error:
        logger.warning("%s; the samples are checked again", error)
        return None
    return stored if stored.compared == compared else None


def store_preflight(run: Path, preflight: Preflight) -> None:
    """Write the result into the folder of the run."""
    text = to_checked_json(dataclasses.asdict(preflight), indent=1)
    write_atomic(run / PREFLIGHT_FILE, f"{text}\n".encode())


def check_cache(
    reader: CacheReader,
    model: PreTrainedModel,
    encoder: SampleEncoder,
    compared: Compared,
    plan: BatchPlan,
    settings: TrainerSettings,
    progress: Progress,
) -> Preflight:
    """Check all samples; every rank calls this and returns the same.

    ShardCorruptError for damage, on every rank, so that none waits for another.
    """
    started = time.monotonic()
    embeddings: Any = model.get_input_embeddings()
    limits = StudentLimits(
        scope=compared.scope,
        num_embeddings=embeddings.weight.shape[0],
        num_rows=output_head(model).get_parameter("weight").shape[0],
    )
    first, last = (len(reader) * rank // plan.world_size for rank in (plan.rank, plan.rank + 1))
    own: list[tuple[int, RejectedSample]] = []
    damage: list[str] = []
    try:
        own = find_misfits(
            reader,
            range(first, last),
            SizeEncoder(encoder).encode,
            encoder.encode,
            limits,
            settings.loader_threads,
            lambda count: progress("preflight", count, last - first),
        )
    except ShardCorruptError as error:
        damage = [str(error)]
    damage = gather_object(damage)
    found: list[tuple[int, RejectedSample]] = gather_object(own)
    if damage:
        raise ShardCorruptError(damage[0])
    found.sort(key=lambda each: each[0])
    seconds = time.monotonic() - started
    logger.info("Checked %d samples of the cache in %.1f s", len(reader), seconds)
    misfits = tuple(misfit for _, misfit in found)
    return Preflight(compared=compared, num_samples=len(reader), misfits=misfits)
