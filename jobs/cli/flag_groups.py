"""Puts the flags of a command's help into groups: the required ones first, then by subject."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import tyro
from tyro.constructors import StructConstructorSpec, StructFieldSpec

from jobs.cluster.options import RayOptions
from pipeline.config.build import BuildConfig, SourceConfig
from pipeline.config.extend import ExtendConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.stages import EvaluateConfig, TrainConfig
from student_train.config.recipe import TrainerSettings

REQUIRED = "required"

_GROUPS: dict[type, dict[str, str]] = {
    SourceConfig: {"source": "image_root limit max_pixels confine_images"},
    PlanConfig: {
        "counts": "samples images_per_sample samples_per_image vision_tokens views text_tokens "
        "response_tokens vocab_size hidden_size image_bytes",
        "records": "logits_codec affinity_dtype mean_kept ratios",
        "time": "teacher_seconds_per_sample online_teacher_seconds_per_step steps_per_run",
        "pilot": "pilot source image_root max_pixels confine_images teacher chat_template "
        "append_eos match_metric batch_size device dtype attention plugin",
    },
    BuildConfig: {
        "text": "system_prompt chat_template append_eos",
        "shards": "format samples_per_shard share_vision",
        "checks": "on_bad_sample quality_samples require_quality",
        "computation": "batch_size device dtype attention torch_threads plugin",
    },
    ExtendConfig: {
        "source": "source image_root limit max_pixels confine_images samples_per_shard",
        "checks": "on_bad_sample",
        "computation": "device torch_threads plugin",
    },
    TrainConfig: {
        "student": "projector stride",
        "text": "chat_template append_eos",
        "checks": "expect_cache",
        "computation": "torch_threads plugin",
    },
    TrainerSettings: {
        "checks": "on_bad_sample",
        "student": "train_parts records",
        "optimization": "batch_size max_steps epochs learning_rate min_lr_ratio warmup_ratio "
        "weight_decay adam_beta2 max_grad_norm seed",
        "computation": "dtype micro_batch_size shard gradient_checkpointing device loader_threads",
        "logging": "log_steps save_steps grad_norm_steps match_check_steps",
    },
    EvaluateConfig: {
        "answers": "scores max_new_tokens",
        "checks": "on_bad_sample",
        "text": "system_prompt chat_template append_eos",
        "dropping": "compressor compress_layer ratio stages compress_text compress_seed",
        "pictures": "cache num_pictures",
        "computation": "batch_size device dtype torch_threads plugin",
    },
    RayOptions: {
        "Ray": "ray num_workers cpus_per_worker gpus_per_worker max_retries worker_timeout"
    },
}
"""Title -> names of fields. Fields of two records with the same title share one group."""

_NESTED = {
    "config": "",
    "settings": "records",
    "grid": "grid",
    "objective": "objective",
    "progression": "progression",
}
"""Field that is a record -> title of its flags' group."""


_HELP = {
    "attention": "Implementation of the teacher's attention.",
    "batch_size": "Samples of one forward pass.",
    "confine_images": "Refuse image paths that lead out of the image root (`..`, links, absolute).",
    "device": "`auto` takes CUDA where it is available.",
    "format": "Format of the shards.",
    "image_root": "Folder that image paths are relative to; default: the source's folder.",
    "limit": "Read only this many samples, from the first on.",
    "max_pixels": "Most pixels of an image; samples with a larger one are refused.",
    "on_bad_sample": "refuse: stop and name the samples; record: leave them out and list them.",
    "out": "What is written: a folder, or the page of a report.",
    "plugin": "Module of yours to import first (package.module); repeatable.",
    "seed": "Seed of everything random.",
    "system_prompt": "System message put before every conversation that has none.",
    "torch_threads": "CPU threads of torch; default: torch's own choice.",
}
"""Help of flags whose field has no docstring."""


class FlagGroup:
    """The type of a group of flags; each group has a subclass, as tyro tells groups by types."""

    spec: ClassVar[StructConstructorSpec]


class Grouped(dict[str, Any]):
    """The values of a group's flags, which belong to the record around it."""


def group_spec(kind: object) -> StructConstructorSpec | None:
    """The flags of a group's type; None for other types."""
    return kind.spec if isinstance(kind, type) and issubclass(kind, FlagGroup) else None


def grouped(record: type, spec: StructConstructorSpec) -> StructConstructorSpec:
    """The spec with its flags in groups; `ungrouped` undoes it when the values are there."""
    groups = _GROUPS.get(record, {})
    titles = {name: title for title, names in groups.items() for name in names.split()}
    found: dict[str, list[StructFieldSpec]] = {}
    others: list[StructFieldSpec] = []
    for field in spec.fields:
        field = dataclasses.replace(field, helptext=partial(_help, field.name, field.helptext))
        if field.name == "plugin":
            repeatable: Any = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
            field = dataclasses.replace(field, type=repeatable)
        required = field.default is tyro.MISSING and not dataclasses.is_dataclass(field.type)
        title = REQUIRED if required else titles.get(field.name)
        if title is not None and groups:
            found.setdefault(title, []).append(field)
        elif field.name in _NESTED:
            named: Any = _titled(field.type, _NESTED[field.name])
            others.append(dataclasses.replace(field, type=named))
        else:
            others.append(field)
    first: list[StructFieldSpec] = []
    for title in (title for title in (REQUIRED, *groups) if title in found):
        spec_of_group = StructConstructorSpec(Grouped, tuple(found[title]))
        kind = type("FlagGroup", (FlagGroup,), {"spec": spec_of_group})
        named = _titled(kind, title)
        first.append(StructFieldSpec(f"group {title}", named, kind(), helptext=lambda: ""))
    return dataclasses.replace(spec, fields=(*first, *others))


def _help(name: str, text: str | Callable[[], str | None] | None) -> str:
    """A flag's help in one paragraph; a function, since reading docstrings takes time."""
    found = text() if callable(text) else text
    return " ".join((found or _HELP.get(name, "")).split())


def _titled(kind: Any, title: str) -> Any:
    return Annotated[kind, tyro.conf.arg(name=title, prefix_name=False)]


def ungrouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record, those of its groups among them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, Grouped) else {name: value}
    return flat
