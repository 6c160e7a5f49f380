"""What a row's columns stand for, where a cache stores fewer entries or eight bits; numpy alone.

    metadata, rows = read_shard.read_shard("cache/mine/shards/00000-0123456789abcdef.arrow")
    logits = read_numbers.numbers(rows[0])["v_logits"]

Stands alone on purpose, as read_shard.py does. Every reader gets these very bits.
"""

import numpy as np


def pad(entries, counts):
    """[N, K] of entries stored rank by rank, longest rows first; nothing of sense behind them."""
    inside = np.arange(counts.max(initial=1))[:, None] < -np.sort(-counts)
    by_rank = np.zeros(inside.shape, entries.dtype)
    by_rank[inside] = entries
    rows = np.empty_like(by_rank.T)
    rows[np.argsort(-counts, kind="stable")] = by_rank.T
    return rows


def on_scale(codes, low, high):
    """Eight bits between the ends of each row, in float32."""
    part = codes.astype("f4") / np.float32(255)
    return (1 - part) * low.astype("f4")[:, None] + part * high.astype("f4")[:, None]


def in_groups(codes, scale):
    """Eight bits times the scale of each group of channels, in float32."""
    size = -(-codes.shape[1] // scale.shape[1])
    return codes * np.repeat(scale, size, axis=1)[:, : codes.shape[1]]


def numbers(row):
    """The row with v_ids, v_logits (and r_...) as [N, K], a_cosine and h_... as floats."""
    found = dict(row)
    for name in row:
        prefix, _, kind = name.partition("_")
        if f"{prefix}_counts" in row and kind in ("ids", "logits", "codes"):
            found[name] = pad(row[name], row[f"{prefix}_counts"])
        if kind == "codes" and f"{prefix}_low" in row:
            values = on_scale(found[name], row[f"{prefix}_low"], row[f"{prefix}_high"])
            found["a_cosine" if prefix == "a" else f"{prefix}_logits"] = values
        if f"{name}_scale" in row:
            found[name] = in_groups(row[name], row[f"{name}_scale"])
    return found
