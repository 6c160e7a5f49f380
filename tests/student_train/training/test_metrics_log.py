"""Promises of training/metrics_log.py that other processes rely on while a run is going on."""

from pathlib import Path

from student_train.training.metrics_log import METRICS_LOG_FILE, logged_step


def test_the_logged_step_counts_whole_lines_only(tmp_path: Path) -> None:
    assert logged_step(tmp_path) == 0
    log = tmp_path / METRICS_LOG_FILE
    log.touch()
    assert logged_step(tmp_path) == 0
    written = ""
    for number, line in enumerate(['{"step": 10, "loss": 1.5}\n', '{"step": 20, "loss": 1.25}\n']):
        for end in range(len(line)):  # as a reader may find it while it is being written
            log.write_text(written + line[:end])
            assert logged_step(tmp_path) == 10 * number, line[:end]
        written += line
        log.write_text(written)
        assert logged_step(tmp_path) == 10 * (number + 1)
