"""Defines what dataclasses of tensors share: names, a content digest, a move to another device."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from teacher_cache.schema.fingerprint import digest_tensors

_T = TypeVar("_T")


class TensorRecord:
    """Base of dataclasses whose fields are tensors, or are such dataclasses; None where absent."""

    __slots__ = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        known: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in known.items() if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls: type[_T], tensors: Mapping[str, Tensor]) -> _T:
        """The inverse of `tensors`; KeyError where a tensor that every record has is missing."""
        names = [each.name for each in fields(cls) if each.default is not None]  # pyright: ignore[reportArgumentType]
        return cls(**({name: tensors[name] for name in names} | dict(tensors)))

    @property
    def digest(self) -> str:
        """Content digest of the tensors."""
        return digest_tensors(self.tensors().items())

    def to(self: _T, device: torch.device | str) -> _T:
        """The same record with all its tensors on a device."""
        return moved(self, device)


def moved(record: _T, device: torch.device | str) -> _T:
    """A copy of a dataclass with its tensors, and those of dataclasses in it, on a device."""
    whole: Any = record
    found = {each.name: getattr(record, each.name) for each in fields(whole)}
    tensors = {name: v.to(device) for name, v in found.items() if isinstance(v, Tensor)}
    nested = {name: moved(v, device) for name, v in found.items() if is_dataclass(v)}
    return replace(whole, **tensors, **nested)
