"""Trains a student from a sealed cache: the train stage. Knows nothing of Ray.

The same function runs in a plain process, under torchrun and in a Ray Train worker. No teacher is
loaded. The resolved settings are written beside the run as config.json; `--config` reads them back.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.config.plugins import load_plugins
from pipeline.config.stages import CONFIG_FILE, TrainConfig
from pipeline.sources.tried import positions_to_try
from student_train.models.student import student_from_vanilla, vanilla_student
from student_train.training.checkpoint import FINAL_FOLDER, RUN_FILE, require_intact
from student_train.training.run import train_student
from student_train.training.trainer import MetricsCallback
from teacher_cache.encoding.chat_template import text_rules
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.models.checkpoint import (
    load_checked_processor,
    load_config,
    require_one_encodes,
)
from teacher_cache.models.digests import vocabulary_digest
from teacher_cache.schema.errors import CacheMismatchError
from teacher_cache.schema.fingerprint import digest_json
from teacher_cache.schema.progress import Progress, no_progress
from teacher_cache.storage.durable_files import sha256_file, write_atomic

_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""Endings of the files that a model and its processor are loaded from."""


def train(
    config: TrainConfig, report: MetricsCallback | None = None, progress: Progress = no_progress
) -> Path:
    """Train the student of `config`, or resume it; returns the final folder.

    Raises `IncompleteCacheError` for a cache that is not sealed, `CacheMismatchError` for another
    cache, tokenizer or run folder than expected, and for samples of the cache that do not fit the
    student.
    """
    plugins = load_plugins(config.plugin)
    if config.torch_threads is not None:
        torch.set_num_threads(config.torch_threads)
    reader = CacheReader.open(config.cache)
    if not reader.fingerprint.startswith(config.expect_cache or ""):
        raise CacheMismatchError(
            f"{config.cache} has fingerprint {reader.fingerprint}, expected one that begins with "
            f"{config.expect_cache}; give that cache, or omit --expect-cache"
        )

    if reader.spec.text.append_eos and not config.append_eos:
        raise CacheMismatchError(
            f"{config.cache} was built with an end-of-sequence token appended to assistant turns, "
            "but append_eos is off; omit --no-append-eos, or build a cache with it"
        )
    template = text_rules(config.append_eos, config.chat_template).template

    def check(processor: Any, student: Any) -> None:
        _require_vocabulary(config, processor, reader)
        spec = reader.spec
        text = spec.text if template is None else dataclasses.replace(spec.text, template=template)
        encoder = SampleEncoder(processor, student, spec.system_prompt, text, spec.pictures)
        positions = positions_to_try(len(reader))
        samples = (reader.read(index, ()).sample for index in positions)
        require_one_encodes(encoder.encode, samples, config.student)

    load_checked_processor(config.student, load_config(config.student), check)

    def load() -> tuple[Any, Any]:
        require_intact(Path(config.student))
        if config.projector == "none":
            model, processor = vanilla_student(config.student, dtype=torch.float32)
        else:
            model, processor = student_from_vanilla(
                config.student, config.projector, config.stride, dtype=torch.float32
            )
        return model, processor

    def begin() -> None:
        if os.environ.get("RANK", "0") == "0":
            text = json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True, default=str)
            write_atomic(config.out / CONFIG_FILE, f"{text}\n".encode())

    train_student(
        config.out,
        reader,
        load,
        config.training,
        student=student_identity(
            config.student, config.projector, config.stride, template, plugins
        ),
        chat_template=template,
        begin=begin,
        report=report,
        progress=progress,
    )
    return config.out / FINAL_FOLDER


def student_identity(
    path: str,
    projector: str,
    stride: int,
    chat_template: str | None = None,
    plugins: tuple[str, ...] = (),
) -> str:
    """A digest of the initial student: its weights and settings on disk, or a hub commit.

    The record of an earlier training of the student, which holds wall times, is left out.
    """
    folder = Path(path)
    if folder.is_dir():
        files = [file for file in folder.iterdir() if file.suffix in _MODEL_FILES]
        content: object = {f.name: sha256_file(f) for f in files if f.name != RUN_FILE}
    else:
        config = load_config(path)
        content = {"hub": path, "commit": config._commit_hash}
    given: dict[str, object] = {}
    if chat_template is not None:
        given["chat_template"] = chat_template
    if plugins:
        given["plugins"] = plugins
    return digest_json({"begins_as": content, "projector": projector, "stride": stride, **given})


def _require_vocabulary(config: TrainConfig, processor: Any, reader: CacheReader) -> None:
    """Refuse a tokenizer whose ids stand for other tokens than the teacher's."""
    num_rows = reader.spec.vocab_size
    found = vocabulary_digest(processor.tokenizer, num_rows)
    if found != reader.spec.vocabulary:
        raise CacheMismatchError(
            f"the tokenizer of {config.student} differs from that of the teacher of "
            f"{config.cache} within the {num_rows} shared ids: vocabulary stored "
            f"{reader.spec.vocabulary[:12]}, found {found[:12]}; use a student with the teacher's "
            "tokenizer"
        )
