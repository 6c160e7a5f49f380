"""The report names what training and evaluation left out."""

import json
from pathlib import Path

from pipeline.config.stages import ReportConfig
from tests.support.lazy import write_report
from tests.support.run_fakes import fake_evaluation, fake_run


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_skipped_samples_are_named_with_their_number(tmp_path: Path) -> None:
    whole = fake_evaluation(fake_run(tmp_path / "whole", "rld", 0), [True, False])
    part = fake_evaluation(fake_run(tmp_path / "part", "rld", 1), [True, False])
    config = ReportConfig(runs=(whole, part), out=tmp_path / "report.html")
    before = write_report(config)
    _change(part / "emkd_run.json", skipped={"num_samples": 7, "digest": "d" * 64})
    _change(part / "eval" / "metrics.json", num_skipped=3)
    said = write_report(config)
    trained = f"{part}: was trained without 7 samples of its cache"
    evaluated = f"{part}: its evaluation skipped 3 samples; its scores are means over the 2"
    for text in (trained, evaluated):
        assert [line for line in said if line.startswith(text)]
        assert text in config.out.read_text()
    assert len(said) == len(before) + 3  # a run on other samples is a group of its own
