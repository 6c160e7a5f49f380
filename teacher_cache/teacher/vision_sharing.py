"""Finds samples that may share one vision record: equal input up to the last vision token.

In a causal language model the states at vision tokens depend on the images, the processor and the
tokens before them, not on what follows: two questions about one image have equal states. The
digest covers the teacher's input, byte by byte, never names. A question before the image, another
system message or another prompt gives another digest, and so a separate record. Models with other
attention are refused (encoding/view_geometry.py).
"""

import hashlib
import json

from teacher_cache.encoding.collate import EncodedSample
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample

VisionOwners = dict[str, CachedSample]
"""Samples with their own vision record, by `vision_digest`."""


def vision_digest(sample: Sample, encoded: EncodedSample) -> str | None:
    """Digest of everything a sample's vision record depends on; None without vision tokens.

    Covers the bytes of every image, the grids, and the token ids up to the last vision token.
    """
    spans = encoded.spans
    if not len(spans.vision):
        return None
    ids = encoded.inputs["input_ids"][: int(spans.vision.max()) + 1]
    seen = {
        "images": [hashlib.sha256(image).hexdigest() for image in sample.images],
        "views": [[view.image, view.view, view.rows, view.cols] for view in spans.views],
        "vision": spans.vision.tolist(),
        "ids": ids.tolist(),
    }
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
