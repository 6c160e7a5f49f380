"""Generates answers for a source and scores them: the evaluation stage.

Answers are greedy and do not depend on where an evaluation was killed: batches are fixed by the
source's order, and one with a missing answer is generated again as a whole. Of two processes on one
folder the later goes on and the other stops (storage/folder_owner.py). Vision tokens may be dropped
inside the language model. Bad samples are refused before the first answer, or left out and counted.
Refuses compression that the model cannot do, and a folder with the answers of another model,
source, prompt or compression.

    evaluation.json    what decides the answers, written first
    predictions.jsonl  one answer per line
    skipped.jsonl      samples that are left out, if any, see unusable.py
    pictures.json      the matching of vision tokens, if a cache was given
    metrics.json       mean scores, also by category, vision tokens, compression, seconds; written
                       last, once every sample is answered
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.plugins import load_plugins
from pipeline.config.stages import EvaluateConfig, ScoreName
from pipeline.sources.source import SampleSource, open_source, refuse_samples, scan
from pipeline.sources.tried import samples_to_try
from pipeline.student.generation import Generator
from pipeline.student.matching_pictures import PICTURES_FILE, draw_pictures
from pipeline.student.predictions import (
    PREDICTIONS_FILE,
    Prediction,
    append_predictions,
    find_predictions,
    read_predictions,
    score_predictions,
    write_predictions,
)
from pipeline.student.unusable import SKIPPED_FILE, find_unusable, write_skipped
from student_train.config.compression import CompressionSettings
from student_train.data.misfits import describe_misfits
from student_train.data.sample_order import SkippedSamples, skipped_samples
from student_train.models.student import load_student
from student_train.training.checkpoint import require_intact
from teacher_cache.encoding.chat_template import text_rules
from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.checkpoint import require_one_encodes, resolve_device
from teacher_cache.models.digests import (
    chat_template_digest,
    image_processor_digest,
    tokenizer_digest,
    weights_digest,
)
from teacher_cache.schema.checked_json import from_checked_json, to_checked_json
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.fingerprint import digest_json
from teacher_cache.schema.manifest import require_equal
from teacher_cache.schema.options import EARLIER_PICTURE_RULE, EARLIER_TEXT_RULES, PictureRule
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.schema.samples import RejectedSample, Sample
from teacher_cache.schema.strict_json import StrictRecord, decode_mapping
from teacher_cache.storage.durable_files import create_exclusive, write_atomic
from teacher_cache.storage.folder_owner import FolderOwner

logger = logging.getLogger(__name__)

IDENTITY_FILE = "evaluation.json"
METRICS_FILE = "metrics.json"
_REMEDY = (
    "Fix or remove them, or evaluate the others with --on-bad-sample skip, which lists and counts "
    "those that it leaves out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIdentity(StrictRecord):
    """Everything that decides the answers; two attempts of one evaluation agree in every field."""

    model_class: str
    weights: str
    tokenizer: str
    chat_template: str
    image_processor: str
    dtype: str
    samples: str
    """Digest of the ordered sample keys, and of the answers that the source lists apart."""
    system_prompt: str | None
    max_new_tokens: int
    batch_size: int
    compression: CompressionSettings | None = None
    """Absent in the folders of earlier versions, where nothing was dropped."""
    append_eos: bool = False
    """Whether a token was appended to earlier turns; absent in folders of earlier versions."""
    text_version: int = EARLIER_TEXT_RULES.version
    pictures: PictureRule = EARLIER_PICTURE_RULE
    """By which rules messages and images were read; absent in folders of earlier versions."""
    skipped: SkippedSamples | None = None
    """Samples that are left out; they are not among `samples`."""
    plugins: tuple[str, ...] = ()
    """Name and digest of each module that was imported first."""


def evaluate(config: EvaluateConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Answer every sample of the source and return the metrics, as metrics.json holds them.

    Keeps the answers that exist. Raises ValueError with the list of samples that cannot be used
    (`config.on_bad_sample` skip leaves them out), and CacheMismatchError if `config.out` holds
    another evaluation.
    """
    load_plugins(config.plugin)
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    device = resolve_device(config.device)
    if config.cache is not None:
        CacheReader.open(config.cache)  # fails here, not after all answers
    source = open_source(config.source)
    rules = text_rules(config.append_eos, config.chat_template)

    def check(processor: Any, model_config: Any) -> None:
        encoder = SampleEncoder(processor, model_config, config.system_prompt, rules)
        require_one_encodes(encoder.encode_prompt, samples_to_try(source), config.model)

    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    require_intact(Path(config.model))
    model, processor = load_student(config.model, dtype, check)
    scanned, rejected = scan(source, answered=False)
    model.to(device)  # pyright: ignore[reportArgumentType]
    generator = Generator(
        model, processor, config.system_prompt, config.max_new_tokens, config.compression, rules
    )
    skipped = [*rejected, *find_unusable(generator.encoder, source, scanned)]
    if config.on_bad_sample == "refuse":
        _refuse(source, skipped)
    left_out = {sample.key for sample in skipped}
    scanned = [sample for sample in scanned if sample.key not in left_out]
    if not scanned:
        _refuse(source, skipped, "No sample is left. Fix them.")
    pictures = None
    if config.cache is not None:  # a cache of another tokenizer is refused here, not at the end
        pictures = draw_pictures(model, generator.encoder, config.cache, config.num_pictures)
    keys = [(sample.key, sample.index) for sample in scanned]
    samples = [s.key if s.answers is None else f"{s.key} {s.answers}" for s in scanned]
    identity = _identity(config, generator, samples, [sample.key for sample in skipped])
    _claim(config.out, identity)
    owner = FolderOwner.take(config.out)
    write_skipped(config.out, skipped)
    if skipped:
        logger.warning(
            "%d of %d samples of %s cannot be used and are skipped:\n%s\n%s lists all of them",
            len(skipped),
            len(skipped) + len(keys),
            source.name,
            describe_misfits(skipped),
            config.out / SKIPPED_FILE,
        )
    path = config.out / PREDICTIONS_FILE
    known = _mend(path, [key for key, _ in keys])
    for predictions in _answer(generator, source, keys, known, config.batch_size):
        owner.require()
        append_predictions(path, predictions)
        known |= {prediction.key for prediction in predictions}
        progress("evaluate", len(known), len(keys))
    owner.require()
    if pictures is not None:
        write_atomic(config.out / PICTURES_FILE, (to_checked_json(pictures) + "\n").encode())
    lost = {key for key, _ in keys} - _mend(path, [key for key, _ in keys])
    if lost:  # something else has written to the file meanwhile
        raise ValueError(f"{path} has lost {len(lost)} answers; run emkd evaluate again")
    metrics = _metrics(config, identity, read_predictions(path))
    text = to_checked_json(metrics, indent=1)
    write_atomic(config.out / METRICS_FILE, f"{text}\n".encode())
    return json.loads(json.dumps(metrics))


def _mend(path: Path, keys: Sequence[str]) -> set[str]:
    """Drop lines that cannot be used, and name them; returns the keys that are answered."""
    predictions, problems = find_predictions(path)
    wanted = set(keys)
    for prediction in predictions:
        if prediction.key not in wanted:
            problems.append(
                f"{path} answers {prediction.source_id}, which the source does not have"
            )
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    if problems or torn:
        for problem in problems:
            logger.warning("%s; it is dropped", problem)
        predictions = [prediction for prediction in predictions if prediction.key in wanted]
        write_predictions(path, predictions)
    return {prediction.key for prediction in predictions}


def _answer(
    generator: Generator,
    source: SampleSource,
    keys: Sequence[tuple[str, int]],
    known: set[str],
    batch_size: int,
) -> Iterator[list[Prediction]]:
    """The missing answers, batch after batch.

    Once a sample cannot be encoded, the others are only encoded, to list all such samples.
    """
    bad: list[str] = []
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        if all(key in known for key, _ in batch):
            continue
        started = time.monotonic()
        samples = [source[index] for _, index in batch]
        prompts: list[EncodedSample] = []
        for sample in samples:
            try:
                prompts.append(generator.encoder.encode_prompt(sample))
            except SampleError as error:
                bad.append(f"{error.sample_id}: {error.reason}")
        if bad:
            continue
        answers = generator.answers(prompts, generator.stop_ids)
        seconds = (time.monotonic() - started) / len(batch)
        yield [
            Prediction(
                key=key,
                source_id=sample.source_id,
                answer=answer.text,
                num_vision=answer.num_vision,
                num_kept=answer.num_kept,
                reference=_reference(sample),
                references=sample.references,
                choices=sample.choices,
                category=sample.category,
                seconds=seconds,
            )
            for (key, _), sample, answer in zip(batch, samples, answers, strict=True)
            if key not in known
        ]
    refuse_samples(source.name, bad, _REMEDY)


def _refuse(source: SampleSource, bad: Sequence[RejectedSample], remedy: str = _REMEDY) -> None:
    """Raise ValueError with the list of these samples, if there are any."""
    refuse_samples(source.name, [f"{each.source_id}: {each.reason}" for each in bad], remedy)


def _identity(
    config: EvaluateConfig, generator: Generator, samples: Sequence[str], skipped: Sequence[str]
) -> EvaluationIdentity:
    model, processor = generator.model, generator.encoder.processor
    return EvaluationIdentity(
        model_class=type(model).__name__,
        weights=weights_digest(model),
        tokenizer=tokenizer_digest(processor.tokenizer),
        chat_template=chat_template_digest(processor),
        image_processor=image_processor_digest(processor),
        dtype=str(model.dtype).removeprefix("torch."),
        samples=digest_json(list(samples)),
        system_prompt=config.system_prompt,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        compression=config.compression,
        append_eos=generator.encoder.rules.append_eos,
        text_version=generator.encoder.rules.version,
        pictures=generator.encoder.pictures,
        skipped=skipped_samples(skipped),
        plugins=load_plugins(config.plugin),
    )


def _claim(out: Path, identity: EvaluationIdentity) -> None:
    """Make `out` the folder of this evaluation, or check that it already is."""
    path = out / IDENTITY_FILE
    text = to_checked_json(dataclasses.asdict(identity), indent=1) + "\n"
    if not create_exclusive(path, text.encode()):
        fields = from_checked_json(path.read_bytes(), str(path))
        stored = decode_mapping(EvaluationIdentity, fields, str(path))
        remedy = "Nothing was changed. Give another --out, or remove the folder"
        require_equal(stored, identity, f"The evaluation in {out}", remedy)


def _metrics(
    config: EvaluateConfig, identity: EvaluationIdentity, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    known = [prediction for prediction in predictions if prediction.answer_key]
    names = config.scores if known else ()
    values: dict[ScoreName, list[float]] = {n: score_predictions(known, n) for n in names}
    scores = {name: math.fsum(each) / len(known) for name, each in values.items()}
    num_skipped = 0 if identity.skipped is None else identity.skipped.num_samples
    return {
        "model": config.model,
        "weights": identity.weights,
        "source": config.source.path,
        "samples_digest": identity.samples,
        "num_samples": len(predictions),
        "num_scored": len(known),
        "num_skipped": num_skipped,
        **(_note_skipped(num_skipped, len(predictions)) if num_skipped else {}),
        "scores": scores,
        "scores_by_category": _by_category(known, values),
        "compression": identity.compression and dataclasses.asdict(identity.compression),
        "vision_tokens": _vision_tokens(predictions),
        "seconds": math.fsum(prediction.seconds for prediction in predictions),
    }


def _note_skipped(num_skipped: int, num_answered: int) -> dict[str, str]:
    total = num_skipped + num_answered
    text = f"means over the {num_answered} answered of {total} samples; {SKIPPED_FILE} lists others"
    return {"scores_are": text}


def _reference(sample: Sample) -> str | None:
    last = sample.messages[-1]
    return last.text.strip() if last.role == "assistant" else None


def _by_category(
    predictions: Sequence[Prediction], values: Mapping[ScoreName, Sequence[float]]
) -> dict[str, dict[str, float | int]] | None:
    """Mean scores and the number of samples of each category; None where there are none."""
    places: dict[str, list[int]] = {}
    for place, prediction in enumerate(predictions):
        if prediction.category is not None:
            places.setdefault(prediction.category, []).append(place)
    return {
        category: {"num_samples": len(own)}
        | {name: math.fsum(each[i] for i in own) / len(own) for name, each in values.items()}
        for category, own in sorted(places.items())
    } or None


def _vision_tokens(predictions: Sequence[Prediction]) -> dict[str, float] | None:
    """Mean vision tokens of a sample before and after dropping; None unless all were counted."""
    counts = [(p.num_vision, p.num_kept) for p in predictions]
    known = [(n, kept) for n, kept in counts if n is not None and kept is not None]
    if len(known) < len(counts):
        return None
    before, kept = (sum(column) / len(known) for column in zip(*known, strict=True))
    return {"before": before, "kept": kept}
