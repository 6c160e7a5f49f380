"""Caches are built, killed, resumed, merged, cut, extended, exported and damaged in any order.

A dict from cache to rows is the truth. Whatever happened: what is sealed reads as the dict says, to
the bit; what is not is refused; a damaged cache is found out; and no cache is changed by what is
derived from it. Kills are exceptions that nothing catches, raised at a random step of the storage
layer (support/faults.py kills processes). Soak: EMKD_MACHINE_EXAMPLES=1000 pytest <this file>.
"""

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from teacher_cache.derive.derive import derive
from teacher_cache.derive.export import export_cache
from teacher_cache.derive.merge import OnDuplicate, adopt_shard, merge_caches
from teacher_cache.derive.sealed_cache import SealedCache
from teacher_cache.derive.subset import Selection, subset_cache
from teacher_cache.folder.reader import CacheReader
from teacher_cache.folder.verify import verify_cache
from teacher_cache.folder.writer import write_shard
from teacher_cache.records.assets import TeacherAssets
from teacher_cache.schema.errors import IncompleteCacheError
from teacher_cache.schema.manifest import Plan
from teacher_cache.schema.options import ShardFormatName
from teacher_cache.storage.open_store import open_store
from tests.support.builders import build
from tests.support.faults import Watch
from tests.support.paths import IN_MEMORY
from tests.support.strategies import assert_same, make_cached, make_spec
from tests.teacher_cache.folder.test_fault_matrix import FORMATS

NUM_EXAMPLES = int(os.environ.get("EMKD_MACHINE_EXAMPLES", "20"))
STEPS_OF_EXAMPLE = 15

SAMPLES = {number: make_cached(number) for number in range(12)}

Numbers = tuple[int, ...]
numbers = st.lists(st.sampled_from(sorted(SAMPLES)), min_size=1, max_size=5, unique=True).map(tuple)
forms = st.sampled_from(FORMATS)
kills = st.none() | st.tuples(st.integers(0, 60), st.sampled_from(["before", "half-way", "after"]))
draws = st.integers(0, 2**32)


class Killed(BaseException):
    """The end of a process; nothing but the machine catches it."""


def die() -> None:
    raise Killed


def cut(rows: Sequence[int]) -> list[Numbers]:
    """Shards of at most two rows."""
    return [tuple(rows[start : start + 2]) for start in range(0, len(rows), 2)]


class Caches(RuleBasedStateMachine):
    """`sealed` is the truth; `begun` are caches whose making was killed, and how to go on."""

    num_steps = 0
    num_kills = 0

    def __init__(self) -> None:
        super().__init__()
        in_memory = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=in_memory))
        self.names = (f"cache-{number}" for number in itertools.count())
        self.sealed: dict[str, Numbers] = {}
        self.begun: dict[str, tuple[Callable[[], object], Numbers]] = {}

    def teardown(self) -> None:
        """At the end, too, everything is as the dict says."""
        for name in self.sealed:
            self.require_whole(name)
        shutil.rmtree(self.folder)

    def make(self, name: str, work: Callable[[], object], rows: Numbers, kill: object) -> None:
        """Make a cache; where it is killed, it is begun, else sealed."""
        type(self).num_steps += 1
        try:
            with Watch(kill, die)():  # pyright: ignore[reportArgumentType]
                work()
        except Killed:
            type(self).num_kills += 1
            self.begun[name] = (work, rows)
        else:
            self.begun.pop(name, None)
            self.sealed[name] = rows

    def pick(self, draw: int, names: Sequence[str]) -> str:
        """One of the names."""
        return names[draw % len(names)]

    def require_whole(self, name: str) -> None:
        """A sealed cache holds its rows, in order, to the bit."""
        reader = CacheReader.open(self.folder / name)
        wanted = [SAMPLES[number] for number in self.sealed[name]]
        assert list(reader.keys) == [cached.sample.key for cached in wanted]
        for index, cached in enumerate(wanted):
            assert_same(reader.read(index, reader.parts), cached)

    @rule(rows=numbers, form=forms, kill=kills)
    def build(self, rows: Numbers, form: ShardFormatName, kill: object) -> None:
        """A new cache."""
        name = next(self.names)
        shards = [[SAMPLES[number] for number in shard] for shard in cut(rows)]
        self.make(name, lambda: build(self.folder / name, shards, form), rows, kill)

    @precondition(lambda self: self.begun)
    @rule(draw=draws, kill=kills)
    def go_on(self, draw: int, kill: object) -> None:
        """What was killed is run again, and perhaps killed again."""
        name = self.pick(draw, list(self.begun))
        work, rows = self.begun[name]
        self.make(name, work, rows, kill)

    @precondition(lambda self: self.begun)
    @rule(draw=draws)
    def open_begun(self, draw: int) -> None:
        """A reader is refused, unless the kill came after the seal."""
        type(self).num_steps += 1
        name = self.pick(draw, list(self.begun))
        try:
            CacheReader.open(self.folder / name)
        except IncompleteCacheError:
            return
        self.sealed[name] = self.begun.pop(name)[1]
        self.require_whole(name)

    @precondition(lambda self: self.sealed)
    @rule(first=draws, second=draws, on_duplicate=st.sampled_from(["refuse", "first"]), kill=kills)
    def merge(self, first: int, second: int, on_duplicate: OnDuplicate, kill: object) -> None:
        """Two caches as one; a sample that is in both is refused, or the first is taken."""
        names = [self.pick(draw, list(self.sealed)) for draw in (first, second)]
        sources = [self.folder / name for name in names]
        rows = tuple(dict.fromkeys(self.sealed[names[0]] + self.sealed[names[1]]))
        name = next(self.names)

        def work() -> object:
            return merge_caches(sources, self.folder / name, on_duplicate=on_duplicate)

        if on_duplicate == "refuse" and len(rows) < sum(len(self.sealed[name]) for name in names):
            type(self).num_steps += 1
            with pytest.raises(ValueError, match="are in several of the caches"):
                work()
            assert not (self.folder / name).exists()
        else:
            self.make(name, work, rows, kill)

    @precondition(lambda self: self.sealed)
    @rule(draw=draws, form=forms, kill=kills)
    def subset(self, draw: int, form: ShardFormatName, kill: object) -> None:
        """Some rows of a cache, by key."""
        source = self.pick(draw, list(self.sealed))
        whole = self.sealed[source]
        chosen = random.Random(draw).sample(whole, 1 + draw % len(whole))
        rows = tuple(number for number in whole if number in chosen)
        selection = Selection(keys=tuple(SAMPLES[number].sample.key for number in chosen))
        name = next(self.names)
        place = self.folder / source
        self.make(
            name,
            lambda: subset_cache(place, self.folder / name, selection, form=form),
            rows,
            kill,
        )

    @precondition(lambda self: self.sealed)
    @rule(draw=draws, form=forms, kill=kills)
    def export(self, draw: int, form: ShardFormatName, kill: object) -> None:
        """A cache in one of the formats."""
        source, name = self.pick(draw, list(self.sealed)), next(self.names)
        place = self.folder / source
        self.make(
            name, lambda: export_cache(place, self.folder / name, form), self.sealed[source], kill
        )

    @precondition(lambda self: self.sealed)
    @rule(draw=draws, rows=numbers, kill=kills)
    def extend(self, draw: int, rows: Numbers, kill: object) -> None:
        """A cache and rows that it does not have; its own shards are taken over."""
        source = self.pick(draw, list(self.sealed))
        new = cut([number for number in rows if number not in self.sealed[source]])
        base, name = SealedCache.open(self.folder / source), next(self.names)
        old = tuple(base.kept(commit) for commit in base.seal.shards)
        keys = tuple(tuple((SAMPLES[n].sample.key, n) for n in shard) for shard in new)
        plan = Plan(spec=make_spec(), format=base.seal.format, source="", shards=old + keys)
        store = open_store(self.folder / name)

        def make(index: int) -> None:
            if index < len(old):
                adopt_shard(store, plan, index, base, base.seal.shards[index])
            else:
                cached = [SAMPLES[number] for number in new[index - len(old)]]
                write_shard(store, plan, index, cached, [], 0.0)

        extended = self.sealed[source] + tuple(number for shard in new for number in shard)
        self.make(name, lambda: derive(store, plan, make, TeacherAssets()), extended, kill)

    @precondition(lambda self: self.sealed)
    @rule(draw=draws)
    def corrupt(self, draw: int) -> None:
        """A flipped bit anywhere in any file is found, and spoils no other cache."""
        type(self).num_steps += 1
        name = self.pick(draw, list(self.sealed))
        files = [file for file in sorted((self.folder / name).rglob("*.*")) if file.is_file()]
        public = [file for file in files if not file.name.startswith(".") and self.is_named(file)]
        file = public[draw % len(public)]
        intact = file.read_bytes()
        place = draw % len(intact)
        file.unlink()  # other caches may have the same file by another name
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 4]) + intact[place + 1 :])
        try:
            found = verify_cache(self.folder / name).problems
        except ValueError as error:
            found = (str(error),)
        assert found, f"{file}, byte {place}"
        file.write_bytes(intact)
        self.require_whole(name)

    def is_named(self, file: Path) -> bool:
        """Whether the seal knows of a file: a killed attempt's shard means nothing."""
        if file.parent.name != "shards":
            return True
        seal = CacheReader.open(file.parent.parent).seal
        return f"shards/{file.name}" in {f.file for commit in seal.shards for f in commit.files}

    @precondition(lambda self: self.sealed)
    @rule(draw=draws)
    def open(self, draw: int) -> None:
        """A sealed cache reads as the dict says."""
        type(self).num_steps += 1
        self.require_whole(self.pick(draw, list(self.sealed)))


def test_caches_hold_what_a_dict_says_they_hold(
    record_property: Callable[[str, object], None],
) -> None:
    run_state_machine_as_test(
        Caches,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=STEPS_OF_EXAMPLE,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    text = f"{Caches.num_steps} steps of the state machine, {Caches.num_kills} of them killed"
    record_property("tried", text)
    assert Caches.num_steps >= 200
