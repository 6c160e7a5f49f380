"""Computes VLAD of a micro-batch: the affinities of many samples in one product.

    student   A[b, x, j] = cos(u_x, h_j)          text and matched vision states of sample b
    teacher   T[b, x, j] = A_t[x, sigma(j)]       stored, or from the stored states

Samples of a group are padded with zeros that have no weight. Promise: the mean over a sample's
entries, then over the samples that have any, however they are grouped. No gradient reaches the
teacher. Refuses a record with neither affinities nor states. Dimensions as in teacher_output.py, B
samples.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from student_train.config.objective import ObjectiveConfig, VladText
from student_train.losses.batch_matching import Matched
from student_train.losses.reductions import vlad_means
from student_train.signals.teacher_signal import HiddenSignal
from teacher_cache.records.affinity import cosine_affinity

MOST_ENTRIES = 2**22
"""16 MiB in float32, times a few tensors; more than most micro-batches have."""


def batch_vlad(
    matched: Sequence[Matched], objective: ObjectiveConfig, count: int | None = None
) -> Float[Tensor, ""]:
    """VLAD of one or more samples with an image; 0, with a gradient, where none has text.

    `count` is the number of samples that the mean is over in the whole step (step_counts.py); by
    default those here that have text. ValueError for a sample that was
    read with neither part `affinity` nor `hidden`.
    """
    means, counts = zip(*(_group_means(each, objective) for each in _groups(matched)), strict=True)
    total = torch.cat(means).sum()
    if count is not None:
        return total / max(1, count)
    return total / (torch.cat(counts) > 0).sum().clamp(min=1)


def padded(pieces: Sequence[Shaped[Tensor, "_ ..."]]) -> Shaped[Tensor, "B _ ..."]:
    """Pads pieces of different lengths with zeros at their ends, in one operation."""
    present = _present(pieces)
    place = present.flatten().nonzero()[:, 0].to(pieces[0].device)
    rows = torch.cat(list(pieces))
    filled = rows.new_zeros(present.numel(), *rows.shape[1:]).index_copy(0, place, rows)
    return filled.unflatten(0, present.shape)


def _present(pieces: Sequence[Tensor]) -> Bool[Tensor, "B _"]:
    """Where `padded` has rows of the pieces, not padding; on the CPU."""
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _groups(matched: Sequence[Matched]) -> Iterator[list[Matched]]:
    """Runs of samples whose padded affinities stay within `MOST_ENTRIES`."""
    group: list[Matched] = []
    most_text = most_pairs = 0
    for sample in matched:
        num_text, num_pairs = len(sample.state.text), sample.pairs.num_pairs
        most_text, most_pairs = max(most_text, num_text), max(most_pairs, num_pairs)
        if group and (len(group) + 1) * most_text * most_pairs > MOST_ENTRIES:
            yield group
            group, most_text, most_pairs = [], num_text, num_pairs
        group.append(sample)
    yield group


def _group_means(
    group: Sequence[Matched], objective: ObjectiveConfig
) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
    """Each sample's mean, and its number of entries."""
    own_BXP = cosine_affinity(
        padded([sample.state.text for sample in group]), padded([sample.vision for sample in group])
    )
    is_pair_BP = _present([sample.pairs.teacher for sample in group]).to(own_BXP.device)
    counted_BXP = _text_rows(group, objective.vlad_text)[:, :, None] & is_pair_BP[:, None, :]
    if (sees_BXP := _text_sees(group)) is not None:
        counted_BXP &= sees_BXP.to(counted_BXP.device)
    theirs_BXP = _teacher_affinity(group, counted_BXP)
    means_B = vlad_means(own_BXP, theirs_BXP, counted_BXP, objective.smooth_l1_beta)
    return means_B, counted_BXP.sum(dim=(1, 2))


def _text_rows(group: Sequence[Matched], text: VladText) -> Bool[Tensor, "B X"]:
    """The text tokens after the image that are compared."""
    is_response = padded([sample.state.text_is_response for sample in group])
    if text == "response":
        return is_response
    is_text = _present([sample.state.text for sample in group]).to(is_response.device)
    return is_text & ~is_response if text == "instruction" else is_text


def _text_sees(group: Sequence[Matched]) -> Bool[Tensor, "B X P"] | None:
    """Which pairs' images each text token follows; None where all follow all, as with one image.

    With causal attention the text before an image has not seen it.
    """
    if all(sample.state.images_before_text is None for sample in group):
        return None
    seen, image = list[Tensor](), list[Tensor]()
    for sample in group:
        views, before = sample.state.views, sample.state.images_before_text
        of_token = torch.tensor([view.image for view in views for _ in range(view.num_tokens)])
        kept = of_token if sample.state.kept is None else of_token[sample.state.kept]
        image.append(kept[sample.pairs.student.cpu()])
        num_text = len(sample.state.text)
        seen.append(torch.full((num_text,), len(views)) if before is None else before)
    return padded(seen)[:, :, None] > padded(image)[:, None, :]


@torch.no_grad()
def _teacher_affinity(
    group: Sequence[Matched], counted: Bool[Tensor, "B X P"]
) -> Float[Tensor, "B X P"]:
    """From the stored states, or stored; entries that are not counted are any finite number."""
    device = counted.device
    text, vision, stored = list[Tensor](), list[Tensor](), list[Tensor]()
    for sample in group:
        if sample.output.hidden is not None and isinstance(sample.teacher, HiddenSignal):
            text.append(sample.output.hidden.text.to(device))
            vision.append(sample.teacher.hidden)
        elif sample.output.affinity is not None:
            stored.append(sample.output.affinity.cosine)
        else:
            raise ValueError("the cached sample was read without its part `affinity` (or `hidden`)")
    if not stored:
        return cosine_affinity(padded(text), padded(vision))
    if text:
        raise ValueError("some samples of the batch were read with affinities, others with states")
    # In all matrices, flattened and concatenated, entry (x, m) of the one that starts at s and has
    # M columns is at s + x M + m.
    sizes_B = torch.tensor([cosine.numel() for cosine in stored])
    columns_B = torch.tensor([cosine.shape[1] for cosine in stored])
    row_BX = (sizes_B.cumsum(0) - sizes_B)[:, None]
    row_BX = row_BX + torch.arange(counted.shape[1]) * columns_B[:, None]
    matched_BP = padded([sample.pairs.teacher for sample in group])
    place_BXP = row_BX.to(device)[:, :, None] + matched_BP[:, None, :]
    flat = torch.cat([cosine.flatten() for cosine in stored]).to(device)
    return flat[place_BXP.masked_fill_(~counted, 0)]
