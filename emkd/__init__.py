"""What you may build on. `import emkd` loads nothing heavy; a name loads its module on first use.

    cache     CacheReader, Sample, TeacherOutput, verify
    student   load_student, SampleEncoder, TrainingStream, BatchPlan, compress
    loss      preset, TeacherAssets, match_tokens, distillation_loss, student_loss
    stages    build, train, evaluate, report, each with the settings that it takes

Names outside this list may move between releases. `python -m emkd` is the command line.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.build.build import build
    from pipeline.config.build import BuildConfig, SourceConfig
    from pipeline.config.stages import EvaluateConfig, ReportConfig, TrainConfig
    from pipeline.report.report import write_report as report
    from pipeline.student.evaluate import evaluate
    from pipeline.student.train import train
    from student_train.compression.compression import compress
    from student_train.config.objective import ObjectiveConfig, preset
    from student_train.config.recipe import TrainerSettings
    from student_train.data.batch_plan import BatchPlan
    from student_train.data.stream import TrainingStream
    from student_train.losses.objective_loss import distillation_loss
    from student_train.matching.matching import match_tokens
    from student_train.models.student import load_student
    from student_train.training.student_loss import student_loss
    from teacher_cache.encoding.sample_encoder import SampleEncoder
    from teacher_cache.folder.reader import CacheReader
    from teacher_cache.folder.verify import verify_cache as verify
    from teacher_cache.records.assets import TeacherAssets
    from teacher_cache.schema.options import RecordSettings
    from teacher_cache.schema.samples import Sample
    from teacher_cache.schema.teacher_output import TeacherOutput

__version__ = version("emkd")

__all__ = [
    "BatchPlan",
    "BuildConfig",
    "CacheReader",
    "EvaluateConfig",
    "ObjectiveConfig",
    "RecordSettings",
    "ReportConfig",
    "Sample",
    "SampleEncoder",
    "SourceConfig",
    "TeacherAssets",
    "TeacherOutput",
    "TrainConfig",
    "TrainerSettings",
    "TrainingStream",
    "__version__",
    "build",
    "compress",
    "distillation_loss",
    "evaluate",
    "load_student",
    "match_tokens",
    "preset",
    "report",
    "student_loss",
    "train",
    "verify",
]

# The imports above once more, for the interpreter: by the name here, module and name there.
_HOMES = {
    "BatchPlan": "student_train.data.batch_plan:BatchPlan",
    "BuildConfig": "pipeline.config.build:BuildConfig",
    "CacheReader": "teacher_cache.folder.reader:CacheReader",
    "EvaluateConfig": "pipeline.config.stages:EvaluateConfig",
    "ObjectiveConfig": "student_train.config.objective:ObjectiveConfig",
    "RecordSettings": "teacher_cache.schema.options:RecordSettings",
    "ReportConfig": "pipeline.config.stages:ReportConfig",
    "Sample": "teacher_cache.schema.samples:Sample",
    "SampleEncoder": "teacher_cache.encoding.sample_encoder:SampleEncoder",
    "SourceConfig": "pipeline.config.build:SourceConfig",
    "TeacherAssets": "teacher_cache.records.assets:TeacherAssets",
    "TeacherOutput": "teacher_cache.schema.teacher_output:TeacherOutput",
    "TrainConfig": "pipeline.config.stages:TrainConfig",
    "TrainerSettings": "student_train.config.recipe:TrainerSettings",
    "TrainingStream": "student_train.data.stream:TrainingStream",
    "build": "pipeline.build.build:build",
    "compress": "student_train.compression.compression:compress",
    "distillation_loss": "student_train.losses.objective_loss:distillation_loss",
    "evaluate": "pipeline.student.evaluate:evaluate",
    "load_student": "student_train.models.student:load_student",
    "match_tokens": "student_train.matching.matching:match_tokens",
    "preset": "student_train.config.objective:preset",
    "report": "pipeline.report.report:write_report",
    "student_loss": "student_train.training.student_loss:student_loss",
    "train": "pipeline.student.train:train",
    "verify": "teacher_cache.folder.verify:verify_cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"emkd has no {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
