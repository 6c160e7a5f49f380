"""Draws a sample for `emkd inspect --picture`: images, view grids, and a heat map.

One row for each image: the image itself, then each of its views over the image in grey, with a cell
for every vision token. A cell's colour is the teacher's probability outside the kept entries (top-k
tiers) or its entropy in nats (hidden tier). A view covers the whole image evenly: the cache does
not hold where a tile lies or what a processor cropped. Equal records give equal pictures.
ValueError for a sample without images, and for a file name that is not PNG.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.inspection.sample import find_sample
from teacher_cache.codec.columns import Part
from teacher_cache.encoding.pictures import read_picture
from teacher_cache.folder.reader import CacheReader
from teacher_cache.records.lm_head import LmHead, row_chunks
from teacher_cache.schema.options import PictureRule
from teacher_cache.schema.teacher_output import CachedSample, TeacherOutput

MAX_VIEWS = 8
"""How many views of one image are drawn."""
PANEL_INCHES = 3.0
_PARTS: frozenset[Part] = frozenset({"vision", "hidden"})


def draw_sample(reader: CacheReader, key: str, out: Path) -> Path:
    """Draw the sample whose key begins with `key` as a PNG file; returns the file."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: pictures are written as PNG; give a name that ends in .png")
    parts = reader.parts & _PARTS
    cached = reader.read(find_sample(reader, key), parts)
    if not cached.sample.images:
        raise ValueError(f"sample {cached.sample.key} has no image to draw; choose another one")
    head = None if "vision" in parts else reader.head()
    what, values = token_values(cached.output, head)
    figure = _figure(cached, what, values.numpy(), reader.spec.pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out


def token_values(output: TeacherOutput, head: LmHead | None) -> tuple[str, Float[Tensor, " M"]]:
    """The name and value of what is drawn of each vision token: tail mass, else entropy."""
    if output.vision is not None:
        return "mass outside the top-k", output.vision.log_tail.float().exp()
    assert output.hidden is not None
    assert head is not None
    states = output.hidden.vision
    entropy = states.new_zeros(len(states), dtype=head.weight.dtype).float()
    for rows in row_chunks(len(states), head.vocab_size):
        log_probs = head.logits(states[rows]).float().log_softmax(dim=1)
        entropy[rows] = -(log_probs.exp() * log_probs).sum(dim=1)
    return "entropy in nats", entropy


def _figure(cached: CachedSample, what: str, values: Any, rule: PictureRule) -> Figure:
    sample, views = cached.sample, cached.output.views
    starts = np.cumsum([0, *(view.num_tokens for view in views)])
    grids = {
        number: [
            (view, values[starts[at] : starts[at + 1]].reshape(view.rows, view.cols))
            for at, view in enumerate(views)
            if view.image == number
        ][:MAX_VIEWS]
        for number in range(len(sample.images))
    }
    num_columns = 1 + max(len(drawn) for drawn in grids.values())
    low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-9)
    with mpl.rc_context({"font.size": 8}):
        size = (PANEL_INCHES * num_columns + 0.6, PANEL_INCHES * len(grids) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(grids), num_columns, squeeze=False)
        mapped: Any = None
        for panel in axes.flat:
            panel.set_axis_off()
        for number, drawn in grids.items():
            picture = np.asarray(read_picture(sample.images[number], rule))
            height, width = picture.shape[:2]
            extent = (0, width, height, 0)
            axes[number, 0].imshow(picture, extent=extent)
            axes[number, 0].set_title(f"image {number}: {width} x {height}")
            grey = picture.mean(axis=2)  # so that all colours are the tokens'
            for panel, (view, grid) in zip(axes[number, 1:], drawn, strict=False):
                panel.imshow(grey, extent=extent, vmin=0, vmax=255, cmap="gray")
                mapped = panel.imshow(
                    grid, extent=extent, vmin=low, vmax=high, cmap="magma", alpha=0.65
                )
                lines: Any = {"colors": "white", "linewidth": 0.4}
                panel.hlines(np.linspace(0, height, view.rows + 1), 0, width, **lines)
                panel.vlines(np.linspace(0, width, view.cols + 1), 0, height, **lines)
                panel.set_title(f"view {view.view}: {view.rows} x {view.cols} tokens")
        if mapped is not None:
            figure.colorbar(mapped, ax=axes, label=what, shrink=0.8)
        figure.suptitle(f"{sample.source_id} ({sample.key[:12]})")
    return figure
