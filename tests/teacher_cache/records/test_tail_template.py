"""The template of the tails: what a plain loop finds, in whatever pieces states arrive."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teacher_cache.derive.merge import merge_caches
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.records import lm_head
from teacher_cache.records.lm_head import LmHead
from teacher_cache.records.tail_template import MeanTail, TailTemplate
from teacher_cache.schema.errors import CacheMismatchError, ShardCorruptError
from tests.support import references
from tests.support.builders import build
from tests.support.present import present
from tests.support.strategies import make_cached, make_spec

VOCAB, WIDTH = 12, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_tail(hidden: Tensor, head: LmHead, k: int, mass: float | None = None) -> MeanTail:
    found = MeanTail(head.vocab_size)
    found.update(hidden, head, k, mass)
    return found


@pytest.mark.parametrize(("k", "mass"), [(1, None), (4, None), (11, None), (6, 0.7)])
def test_shares_are_those_of_the_loops(k: int, mass: float | None) -> None:
    head, hidden = LmHead(weight=normal(1, VOCAB, WIDTH)), normal(2, 20, WIDTH)
    total = [0.0] * VOCAB
    for row in head.logits(hidden).tolist():
        p = references.probabilities(row)
        kept = references.top_ids(row, k)
        if mass is not None:
            reached = [sum(p[v] for v in kept[: n + 1]) >= mass for n in range(k)]
            kept = kept[: reached.index(True) + 1 if True in reached else k]
        tau = sum(p[v] for v in range(VOCAB) if v not in kept)
        smallest = min(p[v] for v in kept)
        for v in range(VOCAB):
            total[v] += min(p[v], smallest, tau) / tau
    found = present(mean_tail(hidden, head, k, mass).log_shares)
    expected = [math.log(share / sum(total)) for share in total]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_pieces_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = LmHead(weight=normal(3, VOCAB, WIDTH)), normal(4, 30, WIDTH)
    whole = mean_tail(hidden, head, 3)
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 4 * VOCAB)
    pieces = MeanTail(VOCAB)
    for part in (hidden[:1], hidden[1:1], hidden[1:23], hidden[23:]):
        pieces.update(part, head, 3)
    assert (whole.count, pieces.count) == (30, 30)
    torch.testing.assert_close(present(pieces.log_shares), present(whole.log_shares))


def test_entries_that_no_tail_has_held_keep_a_share_and_half_precision_will_do() -> None:
    weight = torch.zeros(VOCAB, WIDTH)
    weight[0] = 100.0  # always kept, all but certain
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        head = LmHead(weight=weight.to(dtype))
        found = present(mean_tail(torch.ones(3, WIDTH).to(dtype), head, 1).log_shares)
        assert bool(found.isfinite().all())
        assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_records_of_every_entry_have_no_tail() -> None:
    head = LmHead(weight=normal(5, VOCAB, WIDTH))
    assert mean_tail(normal(6, 4, WIDTH), head, VOCAB).log_shares is None
    assert MeanTail(VOCAB).log_shares is None


def test_the_template_comes_back_and_damage_is_found(tmp_path: Path) -> None:
    rows = [[make_cached(0)], [make_cached(1)]]
    template = TailTemplate(response=normal(7, 11).log_softmax(0))
    spec = make_spec("topk", template_digest=template.digest)
    build(tmp_path / "cache", rows, spec=spec, template=template)
    read = present(CacheReader.open(tmp_path / "cache").tail_template())
    assert read.digest == template.digest
    assert read.vision is None
    assert not verify_cache(tmp_path / "cache").problems
    file = tmp_path / "cache" / "template.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ShardCorruptError, match=r"template\.safetensors: content"):
        CacheReader.open(tmp_path / "cache").tail_template()
    assert any("template" in problem for problem in verify_cache(tmp_path / "cache").problems)


def test_caches_of_two_templates_are_not_merged(tmp_path: Path) -> None:
    for number in range(2):
        template = TailTemplate(vision=normal(number, 30).log_softmax(0))
        spec = make_spec("topk", template_digest=template.digest)
        build(tmp_path / str(number), [[make_cached(number)]], spec=spec, template=template)
    with pytest.raises(CacheMismatchError, match="template_digest"):
        merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "both")


def test_a_cache_without_a_template_says_nothing_of_it(tmp_path: Path) -> None:
    build(tmp_path, [[make_cached(0)]])
    assert CacheReader.open(tmp_path).tail_template() is None
    assert "template_digest" not in (tmp_path / "plan.json").read_text()
    with pytest.raises(CacheMismatchError, match="the spec says None"):
        build(tmp_path / "a", [[make_cached(0)]], template=TailTemplate(vision=torch.zeros(2)))
