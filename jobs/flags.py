"""How nested settings appear on the command line: flat flags, presets first, overrides after.

tyro derives flags and help from the dataclasses of `pipeline.config`; the rules here only say how
two nested records look: a source is `--source PATH --image-root DIR --limit N`, an objective is
`--objective emkd` (a preset) and one flag for each of its settings that a user may override.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pipeline.config import SourceConfig
from student_train.objective import (
    MatchMetric,
    MatchScope,
    ObjectiveConfig,
    ObjectiveName,
    TailPolicy,
    VladText,
    preset,
)

REGISTRY = ConstructorRegistry()

_PRESET = "preset"
_Preset = Literal["preset"]  # an override that is not given keeps the preset's value

# flag -> (type, help); the attribute of ObjectiveConfig has the same name
_OBJECTIVE_FLAGS: dict[str, tuple[Any, str]] = {
    "supervised_weight": (float, "Weight of the supervised loss (alpha)."),
    "rld_weight": (float, "Weight of response logit distillation (1 - alpha)."),
    "vsd_weight": (float, "Weight of vision semantic distillation (beta)."),
    "vlad_weight": (float, "Weight of vision-language affinity distillation (gamma)."),
    "temperature": (float, "Softmax temperature of VSD and RLD."),
    "tail": (TailPolicy, "What the divergences assume of the mass outside a teacher's top-k."),
    "blend": (float, "Weight of the tail term under --tail blend."),
    "vlad_text": (VladText, "Text tokens whose affinity is distilled."),
    "smooth_l1_beta": (float, "Threshold of VLAD's smooth L1."),
}
_MATCHING_FLAGS: dict[str, tuple[str, Any, str]] = {
    "match_metric": ("metric", MatchMetric, "Cost of a pair of vision tokens."),
    "match_scope": ("scope", MatchScope, "One assignment per view or one per sample."),
    "match_shared_ids": (
        "num_shared_ids",
        int | None,
        "Vocabulary rows at which L1 costs are summed; None: all.",
    ),
    "match_certify": ("certify", bool, "Prove which pairs are those of the exact costs."),
}


def _field(name: str, kind: Any, default: Any, text: str) -> StructFieldSpec:
    return StructFieldSpec(name=name, type=kind, default=default, helptext=text)


def _default(info: StructTypeInfo) -> Any:
    """The record that `--config` gave, or None."""
    return info.default if dataclasses.is_dataclass(info.default) else None


@REGISTRY.struct_rule
def _source_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if info.type is not SourceConfig:
        return None
    known = _default(info)

    def build(source: str, image_root: Path | None, limit: int | None) -> SourceConfig:
        return SourceConfig(path=source, image_root=image_root, limit=limit)

    return StructConstructorSpec(
        instantiate=build,
        fields=(
            _field(
                "source",
                str,
                known.path if known else tyro.MISSING,
                "LLaVA .json/.jsonl, WebDataset .tar (braces allowed), Parquet file or folder.",
            ),
            _field(
                "image_root",
                Path | None,
                known.image_root if known else None,
                "Folder of a LLaVA JSON's images; default: the file's own.",
            ),
            _field(
                "limit",
                int | None,
                known.limit if known else None,
                "Read the first samples only.",
            ),
        ),
    )


@REGISTRY.struct_rule
def _objective_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if info.type is not ObjectiveConfig:
        return None
    known: ObjectiveConfig | None = _default(info)

    def build(objective: ObjectiveName, **flags: Any) -> ObjectiveConfig:
        base = known if known is not None and known.name == objective else preset(objective)
        chosen = {name: value for name, value in flags.items() if value != _PRESET}
        matching = {_MATCHING_FLAGS[n][0]: v for n, v in chosen.items() if n in _MATCHING_FLAGS}
        terms = {name: value for name, value in chosen.items() if name in _OBJECTIVE_FLAGS}
        return dataclasses.replace(
            base, **terms, matching=dataclasses.replace(base.matching, **matching)
        )

    name = _field(
        "objective",
        ObjectiveName,
        known.name if known else "emkd",
        "Preset: supervised only, + response logits, or EM-KD whole.",
    )
    fields = [
        _field(flag, kind | _Preset, _PRESET, text)
        for flag, kind, text in (
            [(flag, kind, text) for flag, (kind, text) in _OBJECTIVE_FLAGS.items()]
            + [(flag, kind, text) for flag, (_, kind, text) in _MATCHING_FLAGS.items()]
        )
    ]
    return StructConstructorSpec(instantiate=build, fields=(name, *fields))
