"""Run folders as the commands train, evaluate and build leave them, with made-up content."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.student.predictions import Prediction, append_predictions
from student_train.config.compression import CompressionSettings
from student_train.config.objective import DivergenceName, ObjectiveName, UsedTail, preset
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings, TrainRecipe
from student_train.training.checkpoint import FinishedRun, RunIdentity
from teacher_cache.schema.manifest import (
    LAYOUT_VERSION,
    CacheSpec,
    Seal,
    ShardCommit,
    ShardFile,
    record_bytes,
)
from teacher_cache.schema.options import PICTURE_RULE, TextRules
from teacher_cache.schema.shard_quality import ShardQuality

CACHE = "c0ffee" * 10 + "abcd"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, default=str))


def fake_run(
    folder: Path,
    name: ObjectiveName,
    seed: int,
    *,
    learning_rate: float = 1e-3,
    cache: Path | None = None,
    divergence: DivergenceName = "reverse_kl",
    tails: Mapping[str, UsedTail] | None = None,
    progression: ProgressionConfig | None = None,
) -> Path:
    """A finished training of 40 steps; `tails` are those of its divergences, exact elsewhere."""
    objective = dataclasses.replace(preset(name), divergence=divergence)
    recipe = TrainRecipe(
        objective=objective, seed=seed, learning_rate=learning_rate, progression=progression
    )
    identity = RunIdentity(
        cache=CACHE, teacher="f" * 64, student="e" * 64, num_steps=40, recipe=recipe
    )
    shared = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    settings = TrainerSettings(**shared, max_steps=40)
    finished = FinishedRun(identity=identity, settings=settings, num_samples=1280, seconds=21.5)
    write_json(folder / "emkd_run.json", dataclasses.asdict(identity))
    write_json(folder / "final" / "emkd_run.json", dataclasses.asdict(finished))
    if cache is not None:
        write_json(folder / "config.json", {"cache": cache})
    terms = [
        t
        for t in ("supervised", "rld", "kd", "vsd", "vlad")
        if getattr(preset(name), f"{t}_weight")
    ]
    rng = np.random.default_rng(seed)
    lines: list[dict[str, float]] = []
    for step in range(2, 41, 2):
        line: dict[str, float] = {"step": step, "seconds": 0.5 * step, "loss": 3 / step}
        for number, term in enumerate(terms):
            line[f"term/{term}"] = (3 + number) / (step + 3) + 0.02 * rng.random()
            if step % 10 == 0:
                line[f"gradient/{term}"] = 0.3**number * (1 + rng.random())
        line |= {f"diagnostic/{term}_tail_is_{tail}": 1.0 for term, tail in (tails or {}).items()}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def fake_evaluation(
    folder: Path,
    right: list[bool],
    *,
    pictures: bool = False,
    digest: str = "d",
    answer: str = "no",
    name: str = "eval",
    compression: CompressionSettings | None = None,
    kept: float | None = None,
) -> Path:
    """An evaluation whose sample i is answered rightly where `right[i]`, from `kept` of 36 tokens.

    Without `kept`, as earlier versions wrote it.
    """
    place = folder / name
    place.mkdir(parents=True)
    append_predictions(
        place / "predictions.jsonl",
        [
            Prediction(
                key=f"key{i}",
                source_id=f"id{i}",
                answer="bs5 dq2" if ok else answer,
                reference="bs5 dq2",
                seconds=0.01,
            )
            for i, ok in enumerate(right)
        ],
    )
    mean = sum(right) / len(right)
    metrics: dict[str, Any] = {
        "samples_digest": digest,
        "num_samples": len(right),
        "seconds": 0.01 * len(right),
        "scores": {"exact_match": mean, "word_accuracy": mean},
    }
    if kept is not None:
        metrics["compression"] = compression and dataclasses.asdict(compression)
        metrics["vision_tokens"] = {"before": 36.0, "kept": kept}
    write_json(place / "metrics.json", metrics)
    if pictures:
        write_json(place / "pictures.json", fake_pictures())
    return folder


def fake_pictures(word: str = "bs") -> dict[str, Any]:
    """One sample: 4 x 4 teacher tokens, 2 x 2 student tokens."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    view = {
        "image": 0,
        "view": 0,
        "teacher": {"rows": 4, "cols": 4, "tokens": [[word, 0.25]] * 16},
        "student": {"rows": 2, "cols": 2, "tokens": [["\n", 0.5]] * 4},
        "pairs": [[0, 0], [1, 3], [2, 12], [3, 15]],
    }
    sample = {
        "key": "key0",
        "source_id": "id0",
        "messages": [["user", "<image>\nFill in bs? dq?"], ["assistant", "bs5 dq2"]],
        "images": [base64.b64encode(stream.getvalue()).decode()],
        "views": [view],
    }
    return {"cache": CACHE, "metric": "raw_l1", "samples": [sample]}


def fake_cache(folder: Path, quality: ShardQuality | None = None) -> Path:
    """A sealed cache, without its shards; `quality` as top-k records would have it."""
    fields: dict[str, Any] = {f.name: "x" for f in dataclasses.fields(CacheSpec)}
    fields |= {"layout_version": LAYOUT_VERSION, "records": "hidden", "top_k": None}
    fields |= {"sketch_rank": None, "top_p": None, "min_k": None, "hidden_group": None}
    fields |= {"logits_max_error": None, "hidden_max_error": None, "affinity_max_error": None}
    fields |= {"logits_codec": None, "affinity_dtype": None, "grid": None}
    fields |= {"least_logits": False, "template_digest": None}
    fields |= {"vocab_size": 512, "hidden_size": 64, "batch_size": 8}
    fields |= {"share_vision": True, "text": TextRules(), "pictures": PICTURE_RULE}
    fields["plugins"] = ()
    if quality is not None:
        fields |= {
            "records": "topk",
            "top_k": 8,
            "logits_codec": "exact",
            "logits_dtype": "float32",
        }
    file = ShardFile(
        file="shards/00000-0.arrow",
        num_bytes=5_600_000,
        sha256="0" * 64,
        cache=CACHE,
        index=0,
        columns=(),
    )
    commit = ShardCommit(
        index=0,
        files=(file,),
        num_rows=1280,
        num_vision_tokens=46080,
        num_response_tokens=21760,
        num_with_images=1280,
        num_vision_records=1280,
        num_stored_vision_tokens=46080,
        seconds=31.0,
        quality=quality,
    )
    seal = Seal(
        fingerprint=CACHE,
        plan=CACHE,
        spec=CacheSpec(**fields),
        format="arrow",
        source="data/train.json",
        shards=(commit,),
        rejected=(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SEALED.json").write_bytes(record_bytes(seal))
    return folder
