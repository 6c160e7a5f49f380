"""Which samples may have one vision record: those that are the same up to their last vision token.

In a causal language model the states at vision tokens depend on the images, the processor and the
tokens before them, and on nothing behind them: two questions about one image have the same ones.
That is decided by what the teacher was given, to the byte, never by names; a template that puts
the question before the image, another system message or other neighbours in the prompt give
another digest, and so a record of their own. Models of other attention are not supported at all
(views.require_supported).
"""

import hashlib
import json

from teacher_cache.models.collate import EncodedSample
from teacher_cache.schema.samples import Sample
from teacher_cache.schema.teacher_output import CachedSample

VisionOwners = dict[str, CachedSample]
"""Samples with a vision record of their own, by what the teacher saw up to its end."""


def vision_digest(sample: Sample, encoded: EncodedSample) -> str | None:
    """Digest of all that a sample's vision record depends on; None without vision tokens.

    That is: the bytes of every image, the grids, the token ids up to the last vision token.
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
