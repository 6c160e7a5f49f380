"""Turns nested settings into flat flags: presets first, overrides after.

tyro derives flags and help from the dataclasses of `pipeline.config`. The rules here define how
nested records look. A source is `--source PATH --image-root DIR --limit N`. An objective is
`--objective emkd` (a preset) and one flag for each setting that overrides it. A progression is
`--schedule tcd` and its settings; its default follows from the objective. A flag without effect is
refused.

Parsing makes `Unchecked` values. `checked` then makes the records, which check themselves, so that
their errors reach the caller and not tyro.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jobs.cli.flag_groups import group_spec, grouped, ungrouped
from jobs.cli.flag_records import PRESET, GridFlags, NewRecords, Preset, ProgressionFlags
from pipeline.config.build import SourceConfig
from pipeline.config.checks import refuse_url_paths
from pipeline.config.extend import ExtendConfig
from student_train.config.objective import (
    TERMS,
    CorrespondenceName,
    DivergenceName,
    MatchMetric,
    MatchScope,
    ObjectiveConfig,
    ObjectiveName,
    TailPolicy,
    VladText,
    preset,
)
from student_train.config.progression import ProgressionConfig
from student_train.config.recipe import TrainerSettings
from teacher_cache.schema.options import GridSettings, RecordKind, RecordSettings

REGISTRY = ConstructorRegistry()

# flag -> (type, help); the attribute of ObjectiveConfig has the same name
_OBJECTIVE_FLAGS: dict[str, tuple[Any, str]] = {
    "supervised_weight": (float, "Weight of the supervised loss (alpha)."),
    "rld_weight": (float, "Weight of response logit distillation (1 - alpha)."),
    "kd_weight": (float, "Weight of EPIC's consistency term (lambda)."),
    "vsd_weight": (float, "Weight of vision semantic distillation (beta)."),
    "vlad_weight": (float, "Weight of vision-language affinity distillation (gamma)."),
    "temperature": (float, "Softmax temperature of VSD, RLD and KD."),
    "divergence": (DivergenceName, "Divergence of VSD and RLD; EPIC's KD is always forward KL."),
    "tail": (TailPolicy, "Assumption about the teacher's mass outside its top-k."),
    "blend": (float, "Weight of the tail term under --tail blend."),
    "vlad_text": (VladText, "Text tokens that VLAD compares."),
    "smooth_l1_beta": (float, "Threshold of VLAD's smooth L1."),
}
_MATCHING_FLAGS: dict[str, tuple[str, Any, str]] = {
    "correspondence": (
        "correspondence",
        CorrespondenceName,
        "How costs become pairs: least total cost (hungarian, the paper's), the same inside a "
        "token's own window (local), with distances (spatial); greedy, nearest and random are "
        "controls.",
    ),
    "place_weight": ("place_weight", float, "Weight of squared distances, for spatial."),
    "match_metric": ("metric", MatchMetric, "Cost of a pair of vision tokens."),
    "match_scope": ("scope", MatchScope, "One assignment per view or one per image."),
    "match_shared_ids": (
        "num_shared_ids",
        int | None,
        "Vocabulary rows at which L1 costs are summed; None: all.",
    ),
    "match_certify": ("certify", bool, "Prove which pairs are those of the exact costs."),
}

_VISION = frozenset({"vsd", "vlad"})
_USED_BY: dict[str, frozenset[str]] = {
    "temperature": frozenset({"rld", "vsd", "kd", "cached kd"}),
    "divergence": frozenset({"rld", "vsd"}),
    "tail": frozenset({"rld", "vsd", "cached kd"}),
    "blend": frozenset({"rld", "vsd", "cached kd"}),
    "vlad_text": frozenset({"vlad"}),
    "smooth_l1_beta": frozenset({"vlad"}),
    **dict.fromkeys(_MATCHING_FLAGS, _VISION),
}
"""The terms that use a flag; a weight is used by its own term."""


def _field(name: str, kind: Any, default: Any, text: str) -> StructFieldSpec:
    return StructFieldSpec(name=name, type=kind, default=default, helptext=text)


def _changed(plain: StructConstructorSpec, name: str, **changes: Any) -> StructConstructorSpec:
    """The spec with one field changed."""
    fields = [dataclasses.replace(f, **changes) if f.name == name else f for f in plain.fields]
    return dataclasses.replace(plain, fields=tuple(fields))


def _source_spec(info: StructTypeInfo, plain: StructConstructorSpec) -> StructConstructorSpec:
    """The path's flag is `--source`."""
    path, *others = plain.fields
    return dataclasses.replace(
        plain,
        instantiate=lambda source, **rest: SourceConfig(path=source, **rest),
        fields=(dataclasses.replace(path, name="source"), *others),
    )


def _objective_spec(info: StructTypeInfo, _plain: StructConstructorSpec) -> StructConstructorSpec:
    """A preset, and the flags that override it."""
    known = info.default if isinstance(info.default, ObjectiveConfig) else None

    def build(objective: ObjectiveName, **flags: Any) -> ObjectiveConfig:
        base = known if known is not None and known.name == objective else preset(objective)
        chosen = {name: value for name, value in flags.items() if value != PRESET}
        matching = {_MATCHING_FLAGS[n][0]: v for n, v in chosen.items() if n in _MATCHING_FLAGS}
        terms = {name: value for name, value in chosen.items() if name in _OBJECTIVE_FLAGS}
        found = dataclasses.replace(
            base, **terms, matching=dataclasses.replace(base.matching, **matching)
        )
        _refuse_idle(found, chosen)
        return found

    name = _field(
        "objective",
        ObjectiveName,
        known.name if known else "emkd",
        "Preset: supervised, rld (adds response logits), emkd (all terms of EM-KD), or EPIC's; "
        "epic-cached-* learns from the cached teacher, a variant.",
    )
    matching = {flag: (kind, text) for flag, (_, kind, text) in _MATCHING_FLAGS.items()}
    flags = {**_OBJECTIVE_FLAGS, **matching}
    fields = [_field(flag, kind | Preset, PRESET, text) for flag, (kind, text) in flags.items()]
    return StructConstructorSpec(instantiate=build, fields=(name, *fields))


def _refuse_idle(objective: ObjectiveConfig, given: Collection[str]) -> None:
    """Raise ValueError for flags that no term of the objective uses."""
    terms = {term for term in TERMS if getattr(objective, f"{term}_weight") > 0}
    if objective.kd_from_cache:  # of the student's own logits, all are known
        terms = terms - {"kd"} | {"cached kd"}
    idle = [flag for flag in given if not _USED_BY.get(flag, terms) & terms]
    why = f"objective {objective.name!r} has the terms {', '.join(sorted(terms))} alone"
    if not idle and "blend" in given and objective.tail != "blend":
        idle, why = ["blend"], f"tail is {objective.tail}"
    metric = objective.matching.metric
    if not idle and "match_shared_ids" in given and metric not in ("raw_l1", "centred_l1"):
        idle, why = ["match_shared_ids"], f"matching by {metric} looks at the whole vocabulary"
    if idle:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in idle)
        raise ValueError(f"{flags} would have no effect: {why}; omit it")


def _training_spec(info: StructTypeInfo, plain: StructConstructorSpec) -> StructConstructorSpec:
    """The settings as tyro makes them, except the progression, which the objective decides too."""
    known: ProgressionConfig | None = getattr(info.default, "progression", None)

    def build(progression: ProgressionFlags, **settings: Any) -> Any:
        resolved = progression.resolve(settings["objective"], known)
        return plain.instantiate(**settings, progression=resolved)

    spec = _changed(plain, "progression", type=ProgressionFlags, default=ProgressionFlags())
    last = sorted(spec.fields, key=lambda field: field.name == "progression")
    return StructConstructorSpec(instantiate=build, fields=tuple(last))


def _records_spec(info: StructTypeInfo, plain: StructConstructorSpec) -> StructConstructorSpec:
    """The settings as tyro makes them, the grid by flags of its own."""
    known: GridSettings | None = getattr(info.default, "grid", None)
    given = GridFlags()
    if known is not None:
        given = GridFlags(
            compressor=known.compressor,
            ratios=known.ratios,
            compress_layer=known.layer,
            compress_text=known.text,
            compress_seed=known.seed,
        )

    def build(grid: GridFlags, **settings: Any) -> RecordSettings:
        return plain.instantiate(**settings, grid=grid.resolve())

    spec = _changed(plain, "grid", type=GridFlags, default=given, helptext="")
    return dataclasses.replace(spec, instantiate=build)


def _new_records_spec(_info: StructTypeInfo, plain: StructConstructorSpec) -> StructConstructorSpec:
    """The settings of new records, or None; a cache's grid cannot be extended."""

    def build(records: RecordKind | None, **settings: Any) -> RecordSettings | None:
        if records is None:
            for name in NewRecords(**settings).changed:
                raise ValueError(f"{name} would have no effect: no records are given")
            return None
        return RecordSettings(records=records, **settings)

    fields = tuple(field for field in plain.fields if field.name != "grid")
    return StructConstructorSpec(instantiate=build, fields=fields)


def _extend_spec(info: StructTypeInfo, plain: StructConstructorSpec) -> StructConstructorSpec:
    """The settings as tyro makes them, with the flags of new records."""
    known: RecordSettings | None = getattr(info.default, "settings", None)
    fields = () if known is None else dataclasses.fields(known)
    default = NewRecords(**{field.name: getattr(known, field.name) for field in fields})
    return _changed(plain, "settings", type=NewRecords, default=default)


_SPECS = {
    SourceConfig: _source_spec,
    RecordSettings: _records_spec,
    NewRecords: _new_records_spec,
    ExtendConfig: _extend_spec,
    ObjectiveConfig: _objective_spec,
    TrainerSettings: _training_spec,
}
_SEEN = object()
"""Marks a type that our rule has seen already, so that tyro's own rule applies."""


@REGISTRY.struct_rule
def _record_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Every dataclass of ours is parsed into an `Unchecked`."""
    group = group_spec(info.type)
    if group is not None:
        return group
    ours = dataclasses.is_dataclass(info.type) and not info.type.__module__.startswith("tyro.")
    if not ours or _SEEN in info.markers:
        return None
    seen = dataclasses.replace(info, markers=(*info.markers, _SEEN))
    spec = ConstructorRegistry.get_struct_spec(seen)
    assert isinstance(spec, StructConstructorSpec)
    if info.type in _SPECS:
        spec = _SPECS[info.type](info, spec)
    unchecked = dataclasses.replace(spec, instantiate=partial(_unchecked, spec.instantiate))
    return grouped(info.type, unchecked)


@dataclass(frozen=True, slots=True)
class Unchecked:
    """The parsed values of a record; `make` makes the record, which checks them."""

    make: Callable[..., Any]
    values: Mapping[str, Any]


def _unchecked(make: Callable[..., Any], **values: Any) -> Unchecked:
    return Unchecked(make, ungrouped(values))


def checked(value: Any) -> Any:
    """The record of an `Unchecked`, nested records first; ValueError where one refuses a value."""
    if not isinstance(value, Unchecked):
        return value
    record = value.make(**{name: checked(nested) for name, nested in value.values.items()})
    if dataclasses.is_dataclass(record):
        refuse_url_paths(record)
    return record
