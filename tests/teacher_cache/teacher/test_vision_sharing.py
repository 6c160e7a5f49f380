"""Two questions about one image have one vision record, where the teacher saw the same before."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from teacher_cache.codec.columns import VISION_COLUMNS, output_columns
from teacher_cache.schema.options import RecordKind, RecordSettings
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import TeacherOutput
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.teacher.vision_sharing import VisionOwners, vision_digest
from tests.conftest import TinyFolder
from tests.support.strategies import TIERS, assert_same_bits
from tests.support.tiny import FAMILIES, ask

HIDDEN = RecordSettings(records="hidden", hidden_dtype="float32")


FIRST = ask("<image>\nwhat is in the picture?")
SECOND = ask("<image>\nhow many digits do you see? are there three of them?", "a red square.")
OTHERS = [ask(f"<image>\n{number} images?", seeds=[number]) for number in range(2, 5)]
DIFFERENT = {
    "text before the image": ask("how many? <image>"),
    "a system message": ask("<image>\nwhat is in the picture?", system="describe the picture"),
    "another image": ask("<image>\nwhat is in the picture?", seeds=[2]),
    "one image more": ask("<image>\n<image>", seeds=[1, 1]),
}


@pytest.fixture(scope="module")
def llava(tiny_folder: TinyFolder) -> Teacher:
    teacher = Teacher.load(str(tiny_folder("llava")), device="cpu")
    settings = RecordSettings(records="topk+sketch", top_k=8, sketch_rank=8)
    teacher.calibrate([[FIRST, *OTHERS]], settings)
    return teacher


def run(
    teacher: Teacher,
    samples: Sequence[Sample],
    settings: RecordSettings = HIDDEN,
    owners: VisionOwners | None = None,
) -> list[TeacherOutput]:
    found = teacher.outputs(samples, settings, owners)
    outputs = [output for output in found if isinstance(output, TeacherOutput)]
    assert len(outputs) == len(samples), found
    return outputs


def states(output: TeacherOutput) -> Tensor:
    assert output.hidden is not None
    return output.hidden.vision


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_questions_about_one_image_differ_no_more_than_one_in_two_batches(
    family: str, tiny_folder: TinyFolder
) -> None:
    teacher = Teacher.load(str(tiny_folder(family)), device="cpu")
    [first], [second] = run(teacher, [FIRST]), run(teacher, [SECOND])
    assert first.views == second.views
    # The control: the same sample, alone and beside others.
    control = max(
        distance(states(run(teacher, [sample, *OTHERS[:count]])[0]), states(alone))
        for sample, alone in ((FIRST, first), (SECOND, second))
        for count in (1, 2, 3)
    )
    rounding = 64 * torch.finfo(torch.float32).eps * float(states(first).abs().max())
    assert control <= rounding
    assert distance(states(first), states(second)) <= max(2 * control, rounding)
    [other] = run(teacher, [DIFFERENT["text before the image"]])
    assert distance(states(first), states(other)) > 1000 * rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_teacher_saw_decides_who_shares(family: str, tiny_folder: TinyFolder) -> None:
    encoder = Teacher.load(str(tiny_folder(family)), device="cpu").encoder

    def seen(sample: Sample) -> str | None:
        return vision_digest(sample, encoder.encode(sample))

    assert seen(FIRST) is not None
    assert seen(FIRST) == seen(SECOND)
    for name, sample in DIFFERENT.items():
        assert seen(sample) != seen(FIRST), name
    assert seen(ask("what?", seeds=[])) is None
    two = [
        ask("<image> and\n<image>\nwhat?", seeds=[1, 2]),
        ask("<image> and\n<image>", "no", [1, 2]),
    ]
    assert seen(two[0]) == seen(two[1])
    assert seen(ask("<image> or\n<image>\nwhat?", seeds=[1, 2])) != seen(two[0])
    assert seen(ask("<image> and\n<image>\nwhat?", seeds=[2, 1])) != seen(two[0])


@pytest.mark.parametrize("records", TIERS)
def test_who_shares_has_the_owners_record_and_the_rest_is_its_own(
    llava: Teacher, records: RecordKind
) -> None:
    settings = RecordSettings(
        records=records, top_k=8, sketch_rank=8, hidden_dtype="float32", affinity_dtype="float32"
    )
    owners: VisionOwners = {}
    [owner] = run(llava, [FIRST], settings, owners)
    found = run(llava, [OTHERS[0], SECOND], settings, owners)
    assert [output.shared_from for output in (owner, *found)] == [None, None, FIRST.key]
    [_, alone] = run(llava, [OTHERS[0], SECOND], settings)
    theirs, ours = output_columns(owner), output_columns(found[1])
    for name, values in output_columns(alone).items():
        if name in VISION_COLUMNS:
            assert_same_bits(ours[name], theirs[name])
            torch.testing.assert_close(ours[name], values, atol=1e-4, rtol=1e-4)
        else:
            assert_same_bits(ours[name], values)


def test_without_owners_nobody_shares(llava: Teacher) -> None:
    assert [output.shared_from for output in run(llava, [FIRST, SECOND])] == [None, None]


def test_one_batch_may_hold_owner_and_guests(llava: Teacher) -> None:
    third = ask("<image>\nwhat is a square?")
    owners: VisionOwners = {}
    text = ask("what?", seeds=[])
    outputs = run(
        llava, [SECOND, text, FIRST, DIFFERENT["a system message"], third], HIDDEN, owners
    )
    shared = [output.shared_from for output in outputs]
    assert shared == [None, None, SECOND.key, None, SECOND.key]
    assert len(owners) == 2
    again = run(llava, [FIRST], HIDDEN, owners)
    assert again[0].shared_from == SECOND.key


def test_a_rejected_sample_owns_nothing(llava: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: VisionOwners = {}
    compute = Teacher.hidden_states

    def broken(self: Teacher, batch: object) -> Tensor:
        found = compute(self, batch)  # pyright: ignore[reportArgumentType]
        found[0, -8:] = torch.nan  # where the first sample, the longest, answers
        return found

    bad = ask("<image>\n" + "how many digits do you see? " * 9)
    monkeypatch.setattr(Teacher, "hidden_states", broken)
    rejected, first, second = llava.outputs([bad, FIRST, SECOND], HIDDEN, owners)
    assert not isinstance(rejected, TeacherOutput)
    assert isinstance(first, TeacherOutput)
    assert isinstance(second, TeacherOutput)
    assert (first.shared_from, second.shared_from) == (None, FIRST.key)
