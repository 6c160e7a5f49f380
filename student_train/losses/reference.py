"""EM-KD and EPIC on one page: the definition that the fast code must equal.

    EM-KD   L = a L_sup + (1 - a) L_rld + b L_vsd + c L_vlad     a = 0.5, b = 0.25, c = 25
    EPIC    L = (1 - l) L_sup + l L_kd                           l = 0.7

Both models have read the same samples. `s` is the student and `t` the teacher, Z are logits, H the
final hidden states of vision tokens and U those of text tokens. Each function is one equation, with
every logit at hand, and autograd does the rest. `distillation_loss` (objective_loss.py) computes
the same from a cache, a chunk of logits at a time. Tests hold it to this page, and this page to
plain loops. Letters: N student and M teacher vision tokens of a view, P pairs, X text tokens after
the image, R response tokens, W >= V vocabulary rows of the student and of the teacher, D widths.

Sources: EM-KD, arXiv 2511.21106; EPIC, arXiv 2510.00515. Where they are silent (reductions,
temperature 1, states after the final norm), docs/method.md says what was chosen and why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, smooth_l1_loss

ALPHA, BETA, GAMMA = 0.5, 0.25, 25.0
LAMBDA = 0.7


@dataclass(frozen=True, kw_only=True)
class ModelOutputs:
    """What one model computes for one sample. Lists have an entry for each view of an image."""

    response_logits: Float[Tensor, "R W"]
    """Row i predicts response token i."""
    vision_logits: Sequence[Float[Tensor, "_ W"]]
    vision_states: Sequence[Float[Tensor, "_ D"]]
    text_states: Float[Tensor, "X D"]


def kl(Z_a: Float[Tensor, "n V"], Z_b: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(a || b) = sum_v a_v (log a_v - log b_v), with a = softmax(Z_a), b = softmax(Z_b)."""
    log_a, log_b = Z_a.log_softmax(dim=1), Z_b.log_softmax(dim=1)
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def match(student: ModelOutputs, teacher: ModelOutputs) -> list[tuple[Tensor, Tensor]]:
    """Pairs student token j of each view with its own teacher token sigma(j) (EM-KD: VTM).

    C_ji = sum_v |Z_s[j, v] - Z_t[i, v]|; sigma is injective and has the least total cost.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for Z_s, Z_t in zip(student.vision_logits, teacher.vision_logits, strict=True):
        C_NM = torch.cdist(Z_s.detach()[:, : Z_t.shape[1]], Z_t, p=1)
        j, sigma_j = linear_sum_assignment(C_NM.cpu().numpy())
        pairs.append((torch.as_tensor(j), torch.as_tensor(sigma_j)))
    return pairs


def supervised(Z_s: Float[Tensor, "R W"], labels: Int[Tensor, " R"]) -> Float[Tensor, ""]:
    """L_sup: next-token cross-entropy, mean over response tokens."""
    return cross_entropy(Z_s, labels)


def rld(Z_s: Float[Tensor, "R W"], Z_t: Float[Tensor, "R V"]) -> Float[Tensor, ""]:
    """L_rld = KL(s || t), mean over response tokens (EM-KD: response logit distillation)."""
    return kl(Z_s[:, : Z_t.shape[1]], Z_t).mean()


def kd(Z_s: Float[Tensor, "R W"], Z_t: Float[Tensor, "R W"]) -> Float[Tensor, ""]:
    """L_kd = KL(t || s), mean over response tokens (EPIC).

    t are the student's own weights, without gradient, in a pass that keeps more vision tokens.
    """
    return kl(Z_t.detach(), Z_s).mean()


def vsd(Z_s: Float[Tensor, "P W"], Z_t: Float[Tensor, "P V"]) -> Float[Tensor, ""]:
    """L_vsd = KL(s || t), mean over a sample's pairs (EM-KD: vision semantic distillation)."""
    return kl(Z_s[:, : Z_t.shape[1]], Z_t).mean()


def vlad(
    U_s: Float[Tensor, "X D_s"],
    H_s: Float[Tensor, "P D_s"],
    U_t: Float[Tensor, "X D_t"],
    H_t: Float[Tensor, "P D_t"],
) -> Float[Tensor, ""]:
    """L_vlad = smooth L1 of A_s - A_t, mean over X P entries (EM-KD: affinity distillation).

    A_xj = cos(U_x, H_j) within each model, so that widths may differ.
    """
    A_s, A_t = (cosine_similarity(U[:, None], H, dim=2) for U, H in ((U_s, H_s), (U_t, H_t)))
    return smooth_l1_loss(A_s, A_t)


def emkd(
    students: Sequence[ModelOutputs],
    teachers: Sequence[ModelOutputs],
    labels: Sequence[Int[Tensor, " _"]],
) -> dict[str, Float[Tensor, ""]]:
    """The four terms of a step, unweighted, and their `total`.

    Response terms are means over all response tokens, vision terms over samples that have both
    sides of the comparison: images for VSD, images and text after them for VLAD.
    """
    vsds: list[Tensor] = []
    vlads: list[Tensor] = []
    for s, t in zip(students, teachers, strict=True):
        if not s.vision_logits:
            continue
        rows_s, rows_t = zip(*match(s, t), strict=True)
        vsds.append(vsd(paired(s.vision_logits, rows_s), paired(t.vision_logits, rows_t)))
        H_s, H_t = paired(s.vision_states, rows_s), paired(t.vision_states, rows_t)
        if len(s.text_states):
            vlads.append(vlad(s.text_states, H_s, t.text_states, H_t))
    Z_s, Z_t = (torch.cat([each.response_logits for each in side]) for side in (students, teachers))
    terms = {"supervised": supervised(Z_s, torch.cat(list(labels))), "rld": rld(Z_s, Z_t)}
    terms |= {"vsd": mean(vsds), "vlad": mean(vlads)}
    weights = {"supervised": ALPHA, "rld": 1 - ALPHA, "vsd": BETA, "vlad": GAMMA}
    return terms | {"total": torch.stack([weights[name] * terms[name] for name in terms]).sum()}


def epic(
    Z_s: Float[Tensor, "R W"], Z_t: Float[Tensor, "R W"], labels: Int[Tensor, " R"]
) -> dict[str, Float[Tensor, ""]]:
    """Both terms of a step's response tokens, unweighted, and their `total`."""
    terms = {"supervised": supervised(Z_s, labels), "kd": kd(Z_s, Z_t)}
    return terms | {"total": (1 - LAMBDA) * terms["supervised"] + LAMBDA * terms["kd"]}


def paired(views: Sequence[Tensor], rows: Sequence[Tensor]) -> Float[Tensor, "P _"]:
    """The matched rows of all views of a sample, pair by pair."""
    return torch.cat([view[chosen] for view, chosen in zip(views, rows, strict=True)])


def mean(values: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Mean over samples; 0 where there is none to compare."""
    return torch.stack(list(values)).mean() if values else torch.zeros(())
