"""The rehearsal refuses an objective exactly where the losses of real samples would."""

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest

from student_train.config.objective import (
    MatchingConfig,
    MatchMetric,
    ObjectiveConfig,
    TailPolicy,
    preset,
)
from student_train.losses.objective_loss import distillation_loss
from student_train.losses.require_served import require_served
from tests.support.batches import ONE_IMAGE, TWO_IMAGES, RecordForm, random_batch
from tests.support.strategies import VOCAB_SIZE, WIDTH, make_spec

BATCH = random_batch(0, [ONE_IMAGE, TWO_IMAGES], student_width=WIDTH, vocab_size=VOCAB_SIZE)
METRICS: tuple[MatchMetric, ...] = get_args(MatchMetric)
TAILS: tuple[TailPolicy, ...] = ("exact", "blend", "bucket", "renormalise")
OBJECTIVES = [
    preset("supervised"),
    *(
        ObjectiveConfig(
            rld_weight=rld,
            vsd_weight=vsd,
            tail=tail,
            temperature=temperature,
            matching=MatchingConfig(metric=metric),
        )
        for rld, vsd, tail, temperature, metric in itertools.product(
            (0.0, 1.0), (0.0, 1.0), TAILS, (1.0, 2.0), METRICS
        )
    ),
]


def _refusal(ask: Callable[[], object]) -> str | None:
    try:
        ask()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("k", [4, VOCAB_SIZE])
@pytest.mark.parametrize("records", ["topk", "topk+sketch", "hidden"])
def test_it_refuses_what_the_losses_refuse_in_the_same_words(records: RecordForm, k: int) -> None:
    spec = make_spec(records, **({} if records == "hidden" else {"top_k": k}))
    outputs, assets = BATCH.outputs(records, k), BATCH.assets(records)
    refused = 0
    for objective in OBJECTIVES:
        losses = partial(
            distillation_loss, BATCH.states, outputs, BATCH.student_head, objective, assets
        )
        expected = _refusal(losses)
        assert _refusal(partial(require_served, objective, spec, assets, records)) == expected
        refused += expected is not None
    assert (refused == 0) == (records == "hidden")


@pytest.mark.parametrize("mass", [0.01, 0.95])
@pytest.mark.parametrize("records", ["topk", "topk+sketch"])
def test_it_counts_on_no_more_entries_than_a_position_may_keep(
    records: RecordForm, mass: float
) -> None:
    spec = make_spec(records, top_k=VOCAB_SIZE, top_p=mass, min_k=2)
    outputs, assets = BATCH.outputs(records, VOCAB_SIZE, mass, floor=2), BATCH.assets(records)
    for objective in OBJECTIVES:
        losses = partial(
            distillation_loss, BATCH.states, outputs, BATCH.student_head, objective, assets
        )
        found = [
            _refusal(losses),
            _refusal(partial(require_served, objective, spec, assets, records)),
        ]
        words = {text and re.sub(r"the (top )?[0-9]+", "the number", text) for text in found}
        assert len(words) == 1, found


def test_the_remedy_of_a_temperature_works() -> None:
    warm = ObjectiveConfig(temperature=2.0)
    sketched = make_spec("topk+sketch")
    with pytest.raises(ValueError, match="use temperature 1, tail=renormalise, or records"):
        require_served(warm, sketched, BATCH.assets("topk+sketch"), "topk+sketch")
    require_served(warm, make_spec("hidden"), BATCH.assets("hidden"), "hidden")
