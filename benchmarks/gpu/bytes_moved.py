"""How many bytes a piece of torch moves, and how many a tiled kernel does: counted, not measured.

`bytes_moved` adds up, for every operator that a call runs, the bytes that it must read and write:
all of its inputs once (a dimension that is only expanded counts once) and all of its outputs.
Views move nothing, gathers and scatters what they pick, a fill what it writes. What a cache keeps
between two operators is not seen: tensors of a chunk of logits are larger than any cache, and for
those alone the count is meant. Runs on any device, also on meta tensors.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS = {
    *("view", "_unsafe_view", "expand", "slice", "select", "t", "transpose", "permute", "squeeze"),
    *("unsqueeze", "as_strided", "detach", "alias", "unbind", "split", "split_with_sizes"),
    *("empty", "empty_like", "new_empty", "empty_strided", "unfold", "view_as", "lift_fresh"),
}
_PICKS = {"gather", "index_select", "index", "embedding"}
_PLACES = {"scatter_", "scatter_add_", "index_put_", "index_add_"}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride] (its types are Any)
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name: str = func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        if name not in _VIEWS:
            self.bytes[name] += _moved(name, given, made)
        return found


def _moved(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    if name in _PICKS:
        return sum(map(_size, given[1:])) + 2 * sum(map(_size, made))
    if name in _PLACES:
        return 2 * sum(map(_size, given[1:]))
    if name in ("zero_", "fill_"):
        return sum(map(_size, given))
    different = {(t.data_ptr(), t.storage_offset(), t.shape, t.stride()): t for t in given}
    return sum(map(_size, different.values())) + sum(map(_size, made))


def _size(tensor: Tensor) -> int:
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else 1
    return numel * tensor.element_size()


def bytes_moved(work: Callable[[], object]) -> Counter[str]:
    """Bytes by operator of all that `work` runs, its backward passes included."""
    with _Counter() as counter:
        work()
    return counter.bytes


def l1_additions(num_left: int, num_right: int, num_columns: int) -> int:
    """Of all pairs: a difference and a sum for each column."""
    return 2 * num_left * num_right * num_columns


def l1_least_bytes(num_left: int, num_right: int, num_columns: int) -> int:
    """Both sides read once, and the distances written, in float32."""
    return 4 * ((num_left + num_right) * num_columns + num_left * num_right)


def l1_pair_bytes(num_left: int, num_right: int, num_columns: int) -> int:
    """What `torch.cdist(p=1)` asks of caches and memory: two values for each addition of a pair."""
    return 4 * num_left * num_right * (2 * num_columns + 1)


def l1_tile_bytes(
    num_left: int, num_right: int, num_columns: int, tile: tuple[int, int], span: int
) -> int:
    """What the kernel asks: a tile's rows once, and each span's distances written and added up."""
    tiles_left, tiles_right = -(-num_left // tile[0]), -(-num_right // tile[1])
    rows = tiles_right * num_left + tiles_left * num_right
    return 4 * (rows * num_columns + 2 * num_left * num_right * -(-num_columns // span))
