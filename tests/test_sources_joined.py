"""Several sources as one."""

import numpy as np
import pytest

from lowssl_core.errors import UserError
from lowssl_core.sources import ArraySource, JoinedSource, open_sources


def numbered(first: int, count: int, description: str) -> ArraySource:
    images = [np.full((4, 4, 3), number, np.uint8) for number in range(first, first + count)]
    return ArraySource(images, [f"{i}.png" for i in range(count)], description=description, labels=[0] * count)


def test_joined_sources_give_every_image_once_in_order_under_distinct_names() -> None:
    joined = JoinedSource([numbered(0, 3, "a"), numbered(3, 1, "b"), numbered(4, 2, "c")])
    assert [int(np.asarray(joined.read(i)).max()) for i in range(len(joined))] == list(range(6))
    assert len({joined.name(i) for i in range(6)}) == 6
    assert joined.classes is None
    assert joined.label(0) is None
    with pytest.raises(IndexError):
        joined.read(6)


def test_no_path_at_all_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="no data path"):
        open_sources([])
