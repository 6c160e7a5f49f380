"""What is known of GPUs without one: bytes are counted rightly, kernels compile for real chips."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import gpu
from benchmarks.gpu.bytes_moved import (
    bytes_moved,
    l1_additions,
    l1_least_bytes,
    l1_pair_bytes,
    l1_tile_bytes,
)
from benchmarks.gpu.loss_bytes import kernel_readings, make_head_problem, torch_readings
from student_train.head import chunked_pass
from student_train.head.fused_loss import head_loss
from student_train.losses import logit_terms
from tests.support.paths import ROOT


def moved(work: object) -> int:
    assert callable(work)
    return sum(bytes_moved(work).values())


def test_operators_move_what_they_read_and_write() -> None:
    values, row = torch.ones(8, 16), torch.ones(16)
    size = 4 * 8 * 16
    assert moved(lambda: values + values) == 2 * size
    assert moved(lambda: values + 2 * values.T.T) == 2 * size + 3 * size
    assert moved(lambda: values.mul_(row)) == 2 * size + 64
    assert moved(lambda: values.mul_(row.expand(8, 16))) == 2 * size + 64
    assert moved(lambda: values.sum(dim=1)) == size + 32
    assert moved(lambda: values.view(-1)[3:7].unflatten(0, (2, 2))) == 0
    index = torch.zeros(8, 2, dtype=torch.int64)
    assert moved(lambda: values.gather(1, index)) == 8 * 2 * (8 + 4 + 4)
    assert moved(lambda: torch.empty(8, 16).fill_(1)) == size


def test_backward_passes_are_counted() -> None:
    leaf = torch.ones(8, 16, requires_grad=True)
    size = 4 * 8 * 16
    there = moved(lambda: leaf.exp())
    assert there == 2 * size
    assert moved(lambda: torch.autograd.grad(leaf.exp(), leaf, leaf.detach())) == there + 3 * size


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (5, 2, 16)])
def test_counts_of_distances_are_those_of_the_loops(sizes: tuple[int, int, int]) -> None:
    num_left, num_right, num_columns = sizes
    additions = by_pairs = by_tiles = 0
    for _ in range(num_left * num_right):
        additions += 2 * num_columns
        by_pairs += 4 * (2 * num_columns + 1)
    for left in range(0, num_left, 2):
        for right in range(0, num_right, 4):
            rows = min(2, num_left - left) + min(4, num_right - right)
            by_tiles += 4 * rows * num_columns
    for _ in range(0, num_columns, 8):
        by_tiles += 2 * 4 * num_left * num_right
    assert l1_additions(*sizes) == additions
    assert l1_pair_bytes(*sizes) == by_pairs
    assert l1_tile_bytes(*sizes, tile=(2, 4), span=8) == by_tiles
    least = num_columns * (num_left + num_right) + num_left * num_right
    assert l1_least_bytes(*sizes) == 4 * least


def test_the_readings_in_the_manual_are_those_that_are_counted() -> None:
    pytest.importorskip("triton")
    rows = [line.split(" | ") for line in (ROOT / "docs/gpu.md").read_text().splitlines()]
    (row,) = (row for row in rows if row[0] == "| supervised + reverse_kl, bucket")
    stated = [float(cell.strip(" |")) for cell in row[1:]]
    counted = [
        count
        for dtype in (torch.float32, torch.bfloat16)
        for count in (
            torch_readings("reverse_kl", False, dtype, 15_193),
            kernel_readings(False, dtype, 15_193),
        )
    ]
    assert counted == pytest.approx(stated, rel=0.02)


class Launched:
    """Instead of a kernel: takes whatever is on the device."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Launched":
        return self

    def __call__(self, *values: object, **constants: object) -> None:
        assert all(v.device.type == "meta" for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("by_kernels", [False, True])
def test_head_and_losses_never_wait_for_a_device(
    sketched: bool, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the meta device have no values, and refuse to be mixed with a CPU's."""
    pytest.importorskip("triton")
    from student_train.ops import logit_rows_triton

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # knows no such device
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: nullcontext())
    monkeypatch.setattr(logit_terms, "kept_mass", lambda signal: 1.0)  # waits, once a term
    monkeypatch.setattr(chunked_pass, "use_kernels", lambda rows: by_kernels)
    for name in ("read_rows", "write_gradient"):
        monkeypatch.setattr(logit_rows_triton, name, Launched())
    meta = torch.device("meta")
    problem = make_head_problem(150, 1000, 16, meta, torch.bfloat16, sketched=sketched)
    found = head_loss(problem.head, [problem.rows])
    found.total.backward()
    assert problem.hidden.grad is not None
    assert problem.head.weight.grad is not None
    assert found.total.device == problem.head.weight.grad.device == meta


def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu.main([]) == gpu.NO_CUDA
    assert "torch finds none here" in capsys.readouterr().err


def test_its_code_runs_on_a_cpu_too(tmp_path: Path) -> None:
    where = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--tiny", "--vocab", "300", "--json", str(where)]
    assert gpu.main(arguments) == 0
    lines = json.loads(where.read_text())["lines"]
    ways = {line["way"] for line in lines}
    assert {"torch.cdist", "strips", "kernel", "fused", "emkd", "dense"} <= ways
    assert all(line["milliseconds"] > 0 for line in lines)


def test_kernels_compile_for_real_chips_without_spilling(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import json\nfrom benchmarks.gpu.compiled_kernels import compiled_kernels\n"
        "print(json.dumps([c._asdict() for c in compiled_kernels(['fp32'], ['sm_90'])]))"
    )
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = json.loads(done.stdout)
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel["local_bytes"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
    distances = kernels[0]
    assert distances["kernel"] == "span_distances"
    assert distances["loop_additions"] >= 0.75 * distances["loop_instructions"]
