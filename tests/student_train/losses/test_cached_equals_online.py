"""The cache changes nothing: losses and gradients from it are those of a teacher that runs along.

The online side knows no record and no codec: it runs the teacher on the same micro-batch, takes
every logit and the affinities from its live states, and puts the terms together by hand.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from student_train.config.objective import ObjectiveConfig
from student_train.data.batch_plan import BatchPlan
from student_train.data.sample_states import SampleStates, gather_states
from student_train.data.stream import StudentBatch, TrainingStream
from student_train.data.token_layout import layout_of
from student_train.divergence.divergence import reverse_kl
from student_train.losses.objective_loss import distillation_loss
from student_train.losses.reductions import supervised_rows, token_mean, vlad_means, vsd_loss
from student_train.losses.vlad import padded
from student_train.matching.matching import match_tokens
from student_train.models.forward import final_hidden, output_head
from student_train.signals.teacher_signal import DenseSignal
from teacher_cache.encoding.collate import ModelBatch, collate
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.affinity import cosine_affinity
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.options import RecordSettings, ShardFormatName, TierName
from teacher_cache.teacher.teacher import Teacher
from tests.support.caches import build_cache, student_loader
from tests.support.lazy import PreTrainedModel
from tests.support.tiny import tiny_llava, tiny_llava_next, tiny_samples

OBJECTIVE = ObjectiveConfig()
SAMPLES = tiny_samples(5)  # one of each kind: several turns, text alone, two images, ...


class Pair(NamedTuple):
    teacher: Teacher
    student: PreTrainedModel
    encoder: SampleEncoder


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A teacher, and a student of other weights, so that no term is zero."""
    tiny = {"llava": tiny_llava, "llava_next": tiny_llava_next}[request.param]
    teacher_folder = tiny(tmp_path_factory.mktemp("teacher"), seed=0)
    teacher = Teacher.load(str(teacher_folder), device="cpu", dtype="float32")
    student, processor = student_loader(tiny(tmp_path_factory.mktemp("student"), seed=1))()
    return Pair(teacher, student, SampleEncoder(processor, student.config))


def cached_batch(pair: Pair, reader: CacheReader, tier: TierName) -> StudentBatch:
    """All samples as one micro-batch of the stream."""
    plan = BatchPlan(batch_size=len(SAMPLES), micro_batch_size=len(SAMPLES))
    stream = TrainingStream(
        reader,
        pair.encoder.encode,
        objective=OBJECTIVE,
        tier=tier,
        pad_token_id=0,
        seed=0,
        plan=plan,
    )
    return next(iter(stream))


def student_states(pair: Pair, batch: ModelBatch) -> list[SampleStates]:
    hidden = final_hidden(pair.student, batch.inputs)
    return gather_states(hidden, [sample.spans for sample in batch.samples], layout_of(batch))


def gradients(pair: Pair, total: Tensor) -> dict[str, Tensor]:
    pair.student.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in pair.student.named_parameters() if p.grad is not None}


def online_terms(pair: Pair, batch: ModelBatch, joined: bool) -> dict[str, Tensor]:
    """EM-KD's terms with the teacher running along, from its live states and dense logits.

    Matrix products of another shape may round otherwise. So the teacher's batch is that of the
    cache; and its logits and affinities come from one product per sample, as when records are
    made, or, `joined`, from one over what was matched, as when states are stored. The student's
    affinities are one product in either case.
    """
    states = student_states(pair, batch)
    live_batch = [pair.teacher.encoder.encode(sample) for sample in SAMPLES]
    live_states = pair.teacher.hidden_states(collate(live_batch, 0, "right")).clone()
    row = {sample.key: index for index, sample in enumerate(SAMPLES)}
    encoded = [live_batch[row[sample.key]] for sample in batch.samples]
    hidden = [live_states[row[sample.key]] for sample in batch.samples]
    head, student_head = pair.teacher.head, output_head(pair.student)

    response = student_head(torch.cat([state.predicting for state in states]))
    labels = torch.cat([state.response_ids for state in states])

    def live(states: list[Tensor]) -> DenseSignal:
        if joined:
            return DenseSignal(logits=head.logits(torch.cat(states)))
        return DenseSignal(logits=torch.cat([head.logits(rows) for rows in states]))

    predicting = [h[e.spans.predicting] for e, h in zip(encoded, hidden, strict=True)]
    rld = token_mean(reverse_kl(response, live(predicting), "exact").value)

    with_image = [item for item in zip(states, encoded, hidden, strict=True) if item[0].views]
    vision = student_head(torch.cat([state.vision for state, _, _ in with_image]))
    rows = vision.detach().split([len(state.vision) for state, _, _ in with_image])
    signals = [DenseSignal(logits=head.logits(h[e.spans.vision])) for _, e, h in with_image]
    pairs = [
        match_tokens(s.vision, own, s.views, theirs, e.spans.views, OBJECTIVE.matching)
        for (s, e, _), own, theirs in zip(with_image, rows, signals, strict=True)
    ]
    for found in pairs:  # every student token is matched, in order: rows need no selection
        assert torch.equal(found.student, torch.arange(len(found.student)))
    if joined:
        vision_states = [h[e.spans.vision] for _, e, h in with_image]
        matched = live([v[found.teacher] for v, found in zip(vision_states, pairs, strict=True)])
    else:
        per_sample = [theirs.rows(f.teacher) for theirs, f in zip(signals, pairs, strict=True)]
        matched = DenseSignal(logits=torch.cat([signal.logits for signal in per_sample]))
    divergence = reverse_kl(vision, matched, "exact")
    vsd = vsd_loss(divergence.value, [found.num_pairs for found in pairs], vision.sum())

    texts = [h[e.spans.vlad_text] for _, e, h in with_image]
    visions = [h[e.spans.vision] for _, e, h in with_image]
    chosen = [vision[found.teacher] for vision, found in zip(visions, pairs, strict=True)]
    own_affinity = cosine_affinity(
        padded([s.text for s, _, _ in with_image]),
        padded(
            [s.vision[found.student] for (s, _, _), found in zip(with_image, pairs, strict=True)]
        ),
    )
    affinity = cosine_affinity(padded(texts), padded(chosen))
    counted = torch.zeros(affinity.shape, dtype=torch.bool)
    for index, (text, vision, found) in enumerate(zip(texts, visions, pairs, strict=True)):
        spans = with_image[index][1].spans
        for x, at in enumerate(spans.vlad_text.tolist()):
            for pair_number, row in enumerate(found.teacher.tolist()):  # only what stands before
                counted[index, x, pair_number] = int(spans.vision[row]) < at
        if not joined:
            block = index, slice(len(text)), slice(found.num_pairs)
            affinity[block] = cosine_affinity(text, vision)[:, found.teacher]
    vlad = vlad_means(own_affinity, affinity, counted)
    return {
        "supervised": token_mean(supervised_rows(response, labels)),
        "rld": rld,
        "vsd": vsd,
        "vlad": vlad.sum() / len(vlad),
    }


def weighted(terms: dict[str, Tensor]) -> Tensor:
    weights = {"supervised": 0.5, "rld": 0.5, "vsd": 0.25, "vlad": 25.0}
    return torch.stack([weights[name] * terms[name] for name in weights]).sum()


@pytest.mark.parametrize("form", ["arrow", "webdataset"])
@pytest.mark.parametrize("records", ["topk", "hidden"])
def test_losses_and_gradients_from_the_cache_are_bit_equal_to_those_of_the_live_teacher(
    pair: Pair, tmp_path: Path, records: TierName, form: ShardFormatName
) -> None:
    settings = RecordSettings(
        records=records,
        top_k=pair.teacher.head.vocab_size,  # K = V
        hidden_dtype="float32",
        affinity_dtype="float32",
    )
    reader = build_cache(
        tmp_path / "cache",
        pair.teacher,
        SAMPLES,
        settings,
        form=form,
        samples_per_shard=len(SAMPLES),
    )
    assets = TeacherAssets(head=reader.head() if records == "hidden" else None)
    batch = cached_batch(pair, reader, records)
    states = student_states(pair, batch.model)
    head = output_head(pair.student)
    cached = distillation_loss(states, batch.outputs, head, OBJECTIVE, assets)
    cached_gradients = gradients(pair, cached.total)

    online = online_terms(pair, batch.model, joined=records == "hidden")
    assert cached.terms.keys() == online.keys()
    for name, term in online.items():
        assert float(term.detach()) > 0
        assert torch.equal(cached.terms[name], term), name
    online_gradients = gradients(pair, weighted(online))
    assert cached_gradients.keys() == online_gradients.keys()
    for name, gradient in online_gradients.items():
        assert torch.equal(cached_gradients[name], gradient), name


@pytest.fixture(scope="module")
def hidden_cache(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    settings = RecordSettings(records="hidden", hidden_dtype="float32")
    return build_cache(tmp_path_factory.mktemp("online") / "cache", pair.teacher, SAMPLES, settings)


def test_left_and_right_padding_and_one_by_one_give_equal_losses(
    pair: Pair, hidden_cache: CacheReader
) -> None:
    batch = cached_batch(pair, hidden_cache, "hidden")
    samples, head = batch.model.samples, output_head(pair.student)
    left = collate(samples, 0, "left")
    assert any(left.offsets)
    alone = [student_states(pair, collate([sample], 0, "right"))[0] for sample in samples]
    assets = TeacherAssets(head=hidden_cache.head())
    ways = {
        "right": student_states(pair, batch.model),
        "left": student_states(pair, left),
        "alone": alone,
    }
    found = {
        way: distillation_loss(states, batch.outputs, head, OBJECTIVE, assets)
        for way, states in ways.items()
    }
    for way in ("left", "alone"):
        torch.testing.assert_close(found[way].terms, found["right"].terms, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[way].total, found["right"].total, atol=1e-5, rtol=1e-5)
