"""Checks that a cache can serve an objective, before any model is loaded.

Runs matching and divergences on one made-up token of the cache's tier. So a metric, a tail policy
or a temperature that needs logits which the cache does not hold is refused by the same error as
within a run. What depends on the student's width or vocabulary, or on a sample, is not checked.
"""

from dataclasses import replace

import torch

from student_train.config.objective import ObjectiveConfig
from student_train.divergence.divergence import reverse_kl
from student_train.matching.matching import match_tokens
from student_train.signals.from_cache import response_signal, vision_signal
from student_train.signals.teacher_signal import Signal
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.manifest import CacheSpec
from teacher_cache.schema.options import TierName
from teacher_cache.schema.samples import ViewGrid
from teacher_cache.schema.teacher_output import (
    HiddenRecord,
    SketchRecord,
    TeacherOutput,
    TopKRecord,
)


def require_served(
    objective: ObjectiveConfig, spec: CacheSpec, assets: TeacherAssets, tier: TierName
) -> None:
    """Raises ValueError, with the remedy, where the tier to learn from cannot serve the objective.

    `assets` are those of the cache that the objective needs.
    """
    output = _one_token(spec, tier)
    logits_1V = torch.zeros(1, spec.vocab_size)

    def compare(teacher: Signal) -> None:
        reverse_kl(logits_1V, teacher, objective.tail, objective.temperature, objective.blend)

    if objective.needs_vision:
        hidden_1D, views = torch.zeros(1, spec.hidden_size), output.views
        teacher = vision_signal(output, assets)
        match_tokens(hidden_1D, logits_1V, views, teacher, views, objective.matching)
    if objective.rld_weight > 0 or objective.kd_from_cache:
        compare(response_signal(output, assets))
    if objective.vsd_weight > 0:
        compare(vision_signal(output, assets))


def _one_token(spec: CacheSpec, tier: TierName) -> TeacherOutput:
    """The cache's record of one vision token and one response token, all zeros."""
    token_1 = torch.zeros(1, dtype=torch.int64)
    is_response_1 = torch.ones(1, dtype=torch.bool)
    output = TeacherOutput(
        views=(ViewGrid(image=0, view=0, rows=1, cols=1),),
        content_ids=token_1,
        is_response=is_response_1,
        after_image=~is_response_1,
    )
    if tier == "hidden":
        state_1D = torch.zeros(1, spec.hidden_size)
        hidden = HiddenRecord(vision=state_1D, text=state_1D[:0], predicting=state_1D)
        return replace(output, hidden=hidden)
    # With top-p, a position may keep only `min_k` entries.
    num_kept = spec.top_k if spec.min_k is None else spec.min_k
    num_kept = spec.vocab_size if num_kept is None else num_kept
    log_tail = -torch.inf if num_kept == spec.vocab_size else 0.0
    record = TopKRecord(
        ids=torch.arange(num_kept)[None],
        logits=torch.zeros(1, num_kept),
        logsumexp=torch.zeros(1),
        log_tail=torch.full((1,), log_tail),
        vocab_size=spec.vocab_size,
    )
    sketch = None
    if tier == "topk+sketch" and spec.sketch_rank is not None:
        codes = torch.zeros(1, spec.sketch_rank, dtype=torch.int8)
        sketch = SketchRecord(codes=codes, scale=torch.ones(1), tail_shift=torch.zeros(1))
    return replace(output, vision=record, response=record, sketch=sketch)
