"""Loads a model's processor, with and without torchvision.

With torchvision, the processor is the library's own. Without it, a family whose processor has a
video processor gets the same class without it: the text, the chat template and the still images
(Pillow backend) are the library's, and a video is refused by the processor. Saved again, such a
processor keeps the settings of videos, so that the folder loads wherever torchvision is installed.
The backend is part of the image processor's class name, and so of a cache's spec (digests.py).
"""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_VIDEO = "video_processor"
_SETTINGS_OF_VIDEOS = ("video_preprocessor_config.json", "preprocessor_config.json")
_NAMES_OF_STILLS = frozenset({"image_processor_type", "feature_extractor_type", "processor_class"})


def load_processor(path: str) -> "ProcessorMixin | Any":
    """The processor of a folder or hub id.

    Not a `ProcessorMixin` where the checkpoint has only a part of one, such as a tokenizer.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor
    from transformers.utils.import_utils import is_torchvision_available

    known: Any = PROCESSOR_MAPPING
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = known.get(type(config), None)
    if kind is None or is_torchvision_available() or not _takes_videos(kind):
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    return _without_videos(path, kind)


def _takes_videos(kind: Any) -> bool:
    return _VIDEO in inspect.signature(kind.__init__).parameters


def _without_videos(path: str, kind: Any) -> Any:
    """The processor of class `kind` as its constructor makes it, without a video processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(path, trust_remote_code=False),
        "tokenizer": AutoTokenizer.from_pretrained(path, trust_remote_code=False),
        _VIDEO: None,
    }
    settings, _ = kind.get_processor_dict(path)
    videos = settings.get(_VIDEO) or _settings_of_videos(path)
    accepted = inspect.signature(kind.__init__).parameters.keys() - parts.keys()
    return _still_class(kind, videos)(
        **parts, **{name: settings[name] for name in accepted & settings.keys()}
    )


def _still_class(kind: Any, videos: dict[str, Any] | None) -> Any:
    """`kind` under its own name, with `videos` in what it saves and no video processor."""

    class Still(kind):
        video_processor = _NoVideos()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != _VIDEO]

        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | ({} if videos is None else {_VIDEO: videos})

    Still.__name__, Still.__qualname__ = kind.__name__, kind.__qualname__
    Still.__module__, Still.__doc__ = kind.__module__, kind.__doc__
    return Still


class _NoVideos:
    """Stands for a video processor where a processor reads its settings; refuses videos."""

    num_frames = fps = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError("videos need torchvision; install it, or leave the videos out")


def _settings_of_videos(path: str) -> dict[str, Any] | None:
    """Settings of the video processor from the first file that the library would take."""
    from transformers.utils.hub import cached_file

    for name in _SETTINGS_OF_VIDEOS:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            return {key: value for key, value in found.items() if key not in _NAMES_OF_STILLS}
    return None
