"""A training run in a process of its own, to be killed or to be one of several workers."""

import sys
from pathlib import Path

import torch

from student_train.settings import TrainerSettings
from student_train.training_run import train_student
from teacher_cache.decode import decode_json
from teacher_cache.reader import CacheReader
from tests.caches import student_loader


def main() -> None:
    """Arguments: run folder, cache, vanilla model, settings as JSON."""
    run, cache, model, settings = sys.argv[1:]
    torch.set_num_threads(1)
    train_student(
        Path(run),
        CacheReader.open(Path(cache)),
        student_loader(Path(model)),
        decode_json(TrainerSettings, settings, "settings"),
        student="tiny",
    )


if __name__ == "__main__":
    main()
