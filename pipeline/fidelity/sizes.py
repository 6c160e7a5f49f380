"""Computes the size of each tier of a cache by arithmetic alone: `emkd plan` without a model.

`column_bytes` gives, column by column, exactly the bytes of a sample before compression; a pilot
measures zstd. Texts, frame headers and checksums are small and left out. Imports nothing heavy.
Units are decimal.
"""

from dataclasses import dataclass, replace

from pipeline.config.plan import PlanConfig
from pipeline.fidelity.tables import human_bytes, table
from teacher_cache.schema.options import AffinityDtype, HiddenDtype, LogitsCodec, RecordKind

PAPER_SAMPLES = 779_000
"""Samples of EM-KD's second phase."""

TOP_K = (16, 32, 64, 128, 256)
SKETCH_RANKS = (64, 128, 256, 512)
SKETCH_TOP_K = 64
"""K of the tiers with a sketch, beside which a larger K gains little (docs/method.md)."""

HIDDEN_GROUP = 64
"""Channels that share a scale in int8 states; the default of a build."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One way to store the teacher's outputs; fields that its records do not use are None."""

    records: RecordKind
    top_k: int | None = None
    sketch_rank: int | None = None
    hidden_dtype: HiddenDtype | None = None
    hidden_group: int | None = None

    @property
    def name(self) -> str:
        """Short name, as tables show it."""
        words = [f"k={self.top_k}"] if self.top_k else []
        words += [f"r={self.sketch_rank}"] if self.sketch_rank else []
        words += [self.hidden_dtype] if self.hidden_dtype else []
        return " ".join([self.records, *words])

    @property
    def flags(self) -> str:
        """Flags of `emkd build` that choose this tier."""
        chosen = {
            "--top-k": self.top_k,
            "--sketch-rank": self.sketch_rank,
            "--hidden-dtype": self.hidden_dtype,
            "--hidden-group": self.hidden_group,
        }
        given = [f"{flag} {value}" for flag, value in chosen.items() if value is not None]
        return " ".join([f"--records {self.records}", *given])


def tiers(vocab_size: int, hidden_size: int) -> tuple[Tier, ...]:
    """The tiers that a pilot compares; k is capped at the vocabulary, ranks at the width."""
    kept = sorted({min(k, vocab_size) for k in TOP_K})
    ranks = sorted({min(rank, hidden_size) for rank in SKETCH_RANKS})
    sketch_k = min(SKETCH_TOP_K, vocab_size)
    return (
        *(Tier(records="topk", top_k=k) for k in kept),
        *(Tier(records="topk+sketch", top_k=sketch_k, sketch_rank=rank) for rank in ranks),
        *(Tier(records="hidden", hidden_dtype=dtype) for dtype in ("bfloat16", "float32")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleShape:
    """The counts that fix the size of a sample's columns: views, M, T, X and R tokens.

    `logits_dtype` is the LM head's; top-k logits are stored in it. `kept_vision` and
    `kept_response` count the entries of all positions if positions keep different numbers.
    """

    num_views: int
    num_vision: int
    num_content: int
    num_text: int
    num_response: int
    hidden_size: int
    logits_dtype: str = "bfloat16"
    logits_codec: LogitsCodec = "exact"
    affinity_dtype: AffinityDtype = "float16"
    kept_vision: int | None = None
    kept_response: int | None = None
    num_ratios: int = 0
    """Ratios of the response grid, with `kept_grid` entries at each."""
    kept_grid: tuple[int, ...] | None = None
    least_logits: bool = True


def column_bytes(shape: SampleShape, tier: Tier) -> dict[str, int]:
    """Bytes of each column of one sample, before compression (names: codec/columns.py)."""
    columns = {
        "views": 4 * 4 * shape.num_views,
        "content_ids": 8 * shape.num_content,
        "content_flags": shape.num_content,
    }
    grid = [f"g{number}" for number in range(1, shape.num_ratios + 1)]
    if tier.hidden_dtype is not None:
        rows = {"h_vision": shape.num_vision, "h_text": shape.num_text}
        rows |= {f"{prefix}_predicting": shape.num_response for prefix in ("h", *grid)}
        for name, count in rows.items():
            columns[name] = shape.hidden_size * _ITEM_BYTES[tier.hidden_dtype] * count
            if tier.hidden_dtype == "int8":
                group = tier.hidden_group or shape.hidden_size
                columns[f"{name}_scale"] = 2 * -(-shape.hidden_size // group) * count
    if tier.top_k is not None:
        columns |= _top_k_bytes(shape, "v", shape.num_vision, tier.top_k, shape.kept_vision)
        columns |= _top_k_bytes(shape, "r", shape.num_response, tier.top_k, shape.kept_response)
        for prefix, kept in zip(grid, shape.kept_grid or [None] * len(grid), strict=True):
            columns |= _top_k_bytes(shape, prefix, shape.num_response, tier.top_k, kept)
        num_cosines = shape.num_text * shape.num_vision
        if shape.affinity_dtype == "int8":
            ends = dict.fromkeys(("a_low", "a_high"), 4 * shape.num_text)
            columns |= {"a_codes": num_cosines, **ends}
        else:
            columns["a_cosine"] = _ITEM_BYTES[shape.affinity_dtype] * num_cosines
    if tier.sketch_rank is not None:
        columns["s_codes"] = tier.sketch_rank * shape.num_vision
        columns["s_scale"] = 4 * shape.num_vision
        columns["s_shift"] = 4 * shape.num_vision
    return columns


def _top_k_bytes(
    shape: SampleShape, prefix: str, rows: int, top_k: int, kept: int | None
) -> dict[str, int]:
    entries = top_k * rows if kept is None else kept
    width = _ITEM_BYTES[shape.logits_dtype]
    sizes = {"ids": 4 * entries, "lse": 4 * rows, "tail": 4 * rows}
    if kept is not None:
        sizes["counts"] = 4 * rows
    if shape.least_logits:
        sizes["least"] = 2 * rows
    if shape.logits_codec == "affine8":
        sizes |= {"codes": entries, "low": width * rows, "high": width * rows}
    else:
        sizes["logits"] = width * entries
    return {f"{prefix}_{name}": size for name, size in sizes.items()}


def is_vision_column(name: str) -> bool:
    """Whether a column has one row for each vision token."""
    return name.startswith(("v_", "s_", "h_vision"))


def asset_bytes(tier: Tier, vocab_size: int, hidden_size: int, logits_dtype: str) -> int:
    """Bytes that a cache holds once: LM head, sketch basis, template."""
    head = vocab_size * hidden_size * _ITEM_BYTES[logits_dtype] if tier.hidden_dtype else 0
    once = head + (2 * 4 * vocab_size if tier.top_k else 0)
    if tier.sketch_rank is None:
        return once
    per_row = 4 + 2 * tier.sketch_rank
    return once + 4 * hidden_size * (1 + tier.sketch_rank) + per_row * vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSize:
    """The size of one tier in bytes; `in_all` includes what is stored once."""

    tier: Tier
    per_vision_token: float
    per_sample: float
    once: int
    in_all: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The teacher's time; None where the settings do not give it.

    The cache pays off from `break_even_runs` student runs on: the smallest number of runs whose
    live teachers together take longer than the build.
    """

    num_samples: int
    build_seconds: float | None
    online_seconds_per_run: float | None
    break_even_runs: int | None


def tier_sizes(config: PlanConfig) -> tuple[TierSize, ...]:
    """Sizes of every tier for samples of the counts that the settings name."""
    per_image = config.vision_tokens * config.views
    shape = SampleShape(
        num_views=round(config.images_per_sample * config.views),
        num_vision=round(config.images_per_sample * per_image),
        num_content=config.text_tokens,
        num_text=config.text_tokens if config.images_per_sample else 0,
        num_response=config.response_tokens,
        hidden_size=config.hidden_size,
        logits_dtype=config.dtype or "bfloat16",
        logits_codec=config.logits_codec,
        affinity_dtype=config.affinity_dtype,
        num_ratios=len(config.ratios),
    )
    int8 = Tier(
        records="hidden", hidden_dtype="int8", hidden_group=min(HIDDEN_GROUP, config.hidden_size)
    )
    sizes: list[TierSize] = []
    for tier in (*tiers(config.vocab_size, config.hidden_size), int8):
        columns = column_bytes(_with_mean_kept(shape, tier, config.mean_kept), tier)
        of_vision = sum(size for name, size in columns.items() if is_vision_column(name))
        shared = of_vision + columns["views"] + config.images_per_sample * config.image_bytes
        alone = sum(columns.values()) - of_vision - columns["views"]
        per_sample = alone + shared / (config.samples_per_image or 1.0)
        once = asset_bytes(tier, config.vocab_size, config.hidden_size, shape.logits_dtype)
        sizes.append(
            TierSize(
                tier=tier,
                per_vision_token=of_vision / max(1, shape.num_vision),
                per_sample=per_sample,
                once=once,
                in_all=once + per_sample * (config.samples or PAPER_SAMPLES),
            )
        )
    return tuple(sizes)


def _with_mean_kept(shape: SampleShape, tier: Tier, mean: float | None) -> SampleShape:
    """The shape if positions keep `mean` entries on average, at most the tier's K."""
    if mean is None or tier.top_k is None:
        return shape
    kept = min(mean, tier.top_k)
    return replace(
        shape,
        kept_vision=round(kept * shape.num_vision),
        kept_response=round(kept * shape.num_response),
        kept_grid=(round(kept * shape.num_response),) * shape.num_ratios,
    )


def cost(config: PlanConfig, num_samples: int, seconds_per_sample: float | None) -> Cost:
    """The build's time against live teachers: the cache pays off when runs x online > build."""
    build = None if seconds_per_sample is None else num_samples * seconds_per_sample
    per_step, steps = config.online_teacher_seconds_per_step, config.steps_per_run
    online = None if per_step is None or steps is None else per_step * steps
    runs = int(build // online) + 1 if build is not None and online else None
    return Cost(
        num_samples=num_samples,
        build_seconds=build,
        online_seconds_per_run=online,
        break_even_runs=runs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The result of arithmetic alone."""

    tiers: tuple[TierSize, ...]
    cost: Cost


def plan(config: PlanConfig) -> PlanReport:
    """The size of every tier and, if the settings give it, the teacher's time."""
    num_samples, seconds = config.samples or PAPER_SAMPLES, config.teacher_seconds_per_sample
    return PlanReport(tiers=tier_sizes(config), cost=cost(config, num_samples, seconds))


def render_plan(report: PlanReport) -> str:
    """The plan as text for a terminal."""
    spent = report.cost
    header = ("records", "B / vision token", "per sample", "once", f"{spent.num_samples:,} samples")
    rows = [
        (
            size.tier.name,
            f"{size.per_vision_token:,.0f}",
            *map(human_bytes, (size.per_sample, size.once, size.in_all)),
        )
        for size in report.tiers
    ]
    note = "Bytes before zstd, images included; --pilot N measures the rest on your teacher."
    return "\n".join([table(header, rows), note, *cost_lines(spent)])


def cost_lines(spent: Cost) -> list[str]:
    """One sentence for each known time of the teacher."""
    lines: list[str] = []
    if spent.build_seconds is not None:
        lines.append(f"Build: {_duration(spent.build_seconds)} of teacher time.")
    if spent.online_seconds_per_run is not None:
        online = _duration(spent.online_seconds_per_run)
        lines.append(f"A live teacher: {online} in each student run.")
    if spent.break_even_runs is not None:
        lines.append(f"The cache pays off from student run {spent.break_even_runs} on.")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:.3g} seconds"
