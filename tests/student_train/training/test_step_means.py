"""A step means the same however it is cut: into micro-batches, over workers, sharded or not."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from student_train.config.objective import MatchingConfig, ObjectiveConfig, VladText, preset
from student_train.losses.objective_loss import LossTerms, distillation_loss
from student_train.losses.step_counts import StepCounts
from student_train.training.trainable import set_trainable
from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.folder.reader import CacheReader
from teacher_cache.schema.samples import TokenSpans, ViewGrid
from tests.support.batches import SHAPES, RandomBatch, random_batch
from tests.support.caches import student_loader
from tests.support.runs import (
    SETTINGS,
    assert_nearly_same_run,
    lines,
    on_ranks,
    stream_of,
    tiny_cache,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOGGED = ("loss", "grad_norm", "term/supervised", "term/rld", "term/vsd", "term/vlad")
STEP = replace(SETTINGS, max_steps=3, batch_size=8, micro_batch_size=8, log_steps=1)


@pytest.fixture(scope="module")
def mixed(vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    """Samples with no image, one and two."""
    return tiny_cache(tmp_path_factory.mktemp("mixed") / "cache", vanilla, num_samples=16)


@pytest.fixture(scope="module")
def whole(mixed: CacheReader, vanilla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps are one micro-batch each."""
    run = tmp_path_factory.mktemp("step") / "run"
    train(run, mixed, vanilla, STEP)
    return run


def term_shares(
    batch: RandomBatch, chosen: list[int], counts: StepCounts | None, text: VladText
) -> LossTerms:
    objective = ObjectiveConfig(matching=MatchingConfig(num_shared_ids=None), vlad_text=text)
    return distillation_loss(
        [batch.states[i] for i in chosen],
        [batch.hidden_outputs[i] for i in chosen],
        batch.student_head,
        objective,
        batch.assets("hidden"),
        counts=counts,
    )


@given(seed=st.integers(0, 10_000), text=st.sampled_from(("all", "instruction", "response")))
@settings(deadline=None, max_examples=25)
def test_shares_of_any_cut_add_up_to_the_loss_of_the_whole_step(seed: int, text: VladText) -> None:
    draw = random.Random(seed)
    batch = random_batch(seed, draw.choices(SHAPES, k=draw.randint(2, 7)))
    everything = list(range(len(batch.states)))
    draw.shuffle(everything)
    counts = StepCounts.of_states(batch.states, text)
    whole = term_shares(batch, everything, None, text)
    expected = batch.gradients(whole.total)
    borders = sorted(draw.sample(range(1, len(everything)), draw.randint(0, len(everything) - 1)))
    cuts = zip([0, *borders], [*borders, len(everything)], strict=True)
    parts = [term_shares(batch, everything[a:b], counts, text) for a, b in cuts]
    for name, term in whole.terms.items():
        share = sum(part.terms[name].item() for part in parts)
        assert share == pytest.approx(term.item(), rel=1e-9, abs=1e-12), name
    found = [sum(each) for each in zip(*(batch.gradients(p.total) for p in parts), strict=True)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_change_neither_weights_nor_logged_terms(
    mixed: CacheReader, vanilla: Path, whole: Path, tmp_path: Path, micro: int
) -> None:
    train(tmp_path / "run", mixed, vanilla, replace(STEP, micro_batch_size=micro))
    assert_nearly_same_run(tmp_path / "run", whole, *LOGGED, rel=1e-4)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_workers_compute_the_step_of_one(
    mixed: CacheReader, vanilla: Path, whole: Path, tmp_path: Path, shard: Any
) -> None:
    cut = replace(STEP, micro_batch_size=2, shard=shard)
    on_ranks(2, train, tmp_path / "run", mixed, vanilla, cut)
    assert_nearly_same_run(tmp_path / "run", whole, *LOGGED, rel=1e-4, key_bias=3e-4)


def test_a_term_with_nothing_to_average_adds_no_count_to_its_logged_mean(
    vanilla: Path, tmp_path: Path
) -> None:
    """One sample a step, some without an image; two steps a logged line."""
    reader = tiny_cache(tmp_path / "cache", vanilla)
    one = replace(SETTINGS, max_steps=8, batch_size=1, micro_batch_size=1)
    train(tmp_path / "each", reader, vanilla, replace(one, log_steps=1))
    train(tmp_path / "pairs", reader, vanilla, replace(one, log_steps=2))
    each, pairs = lines(tmp_path / "each"), lines(tmp_path / "pairs")
    shown = ["term/vsd" in line for line in each]
    assert not all(shown)
    assert [True, False] in [shown[i : i + 2] for i in range(0, 8, 2)]
    for number, line in enumerate(pairs):
        known = [e["term/vsd"] for e in each[2 * number : 2 * number + 2] if "term/vsd" in e]
        if known:
            assert line["term/vsd"] == pytest.approx(sum(known) / len(known), rel=1e-6)
        else:
            assert "term/vsd" not in line


def test_text_is_compared_with_the_images_before_it_only() -> None:
    spans = TokenSpans(
        views=(
            ViewGrid(image=0, view=0, rows=1, cols=2),
            ViewGrid(image=1, view=0, rows=1, cols=1),
            ViewGrid(image=1, view=1, rows=1, cols=1),
        ),
        vision=torch.tensor([2, 3, 6, 8]),
        content=torch.tensor([0, 4, 5, 9, 10]),
        content_ids=torch.arange(5),
        is_response=torch.tensor([False, False, True, False, True]),
        after_image=torch.tensor([False, True, True, True, True]),
    )
    assert spans.images_before_text.tolist() == [1, 1, 2, 2]
    batch = random_batch(3, [replace(SHAPES[3], instruction=2, response=2)])
    seen = torch.tensor([1, 1, 2, 2])
    batch.states[0] = replace(batch.states[0], images_before_text=seen)
    whole = term_shares(batch, [0], None, "all")
    gradient = torch.autograd.grad(whole.terms["vlad"], batch.states[0].text, retain_graph=True)[0]
    record, pairs, state = batch.hidden_outputs[0].hidden, whole.assignments[0], batch.states[0]
    assert record is not None
    assert pairs is not None
    second = sum(v.num_tokens for v in state.views if v.image == 0)
    entries: list[float] = []
    for x, before in enumerate(seen.tolist()):
        for j, i in zip(pairs.student.tolist(), pairs.teacher.tolist(), strict=True):
            if j >= second and before < 2:
                continue
            own = nn.functional.cosine_similarity(state.text[x], state.vision[j], dim=0)
            theirs = nn.functional.cosine_similarity(record.text[x], record.vision[i], dim=0)
            entries.append(nn.functional.smooth_l1_loss(own, theirs).item())
    assert len(entries) < len(seen) * pairs.num_pairs
    assert whole.terms["vlad"].item() == pytest.approx(sum(entries) / len(entries), rel=1e-9)
    assert bool(gradient.abs().sum(dim=1).min() > 0)


def test_a_supervised_run_takes_the_steps_of_transformers_own_trainer(
    mixed: CacheReader, vanilla: Path, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    from student_train.models.forward import output_head

    ours = replace(STEP, micro_batch_size=2, objective=preset("supervised"), grad_norm_steps=0)
    train(tmp_path / "ours", mixed, vanilla, ours)

    model, processor = student_loader(vanilla)()
    set_trainable(model, ours.train_parts)
    assert output_head(model).get_parameter("weight").requires_grad
    stream = stream_of(
        mixed,
        SampleEncoder(processor, model.config).encode,
        objective=preset("supervised"),
        micro_batch_size=2,
        batch_size=8,
    )

    class Batches(Dataset[dict[str, Tensor]]):
        """Micro-batches of two, in the run's order, with labels."""

        def __init__(self) -> None:
            self.rows: list[dict[str, Tensor]] = []
            for batch in islice(stream, 3 * 4):
                labels = torch.full_like(batch.model.inputs["input_ids"], -100)
                for row, sample in enumerate(batch.model.samples):
                    where = sample.spans.response
                    labels[row, where] = batch.model.inputs["input_ids"][row, where]
                self.rows.append({**batch.model.inputs, "labels": labels})

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return self.rows[index]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Iterator[int] | None:  # pyright: ignore
            return None

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=ours.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": ours.min_lr_ratio},
        warmup_steps=round(ours.warmup_ratio * 3),
        weight_decay=ours.weight_decay,
        adam_beta2=ours.adam_beta2,
        max_grad_norm=ours.max_grad_norm,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Batches(),
        data_collator=lambda rows: rows[0],  # one row is one micro-batch
    )
    trainer.train()
    theirs = model.state_dict()
    for name, weight in weights(tmp_path / "ours" / "final").items():
        atol = 1e-5 if name.endswith("k_proj.bias") else 1e-6
        torch.testing.assert_close(weight, theirs[name], atol=atol, rtol=1e-5, msg=name)
