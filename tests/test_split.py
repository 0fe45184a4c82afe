"""Layers of stages."""

import pytest

from megazero.pipeline.split import ends_as_layers


def test_ends_counted_as_layers() -> None:
    """Megatron's --account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split."""
    assert ends_as_layers(30, 4, 1, 1) == (7, 8, 8, 7)
    assert ends_as_layers(31, 4, 1, 0) == (7, 8, 8, 8) and ends_as_layers(31, 4, 0, 1) == (8, 8, 8, 7)
    assert ends_as_layers(4, 2, 0, 0) == (2, 2) and ends_as_layers(2, 4, 1, 1) == (0, 1, 1, 0) and ends_as_layers(5, 1, 1, 1) == (5,)
    with pytest.raises(ValueError, match="^32 layers and the embedding and the loss are 34 in all, which 4 stages cannot share evenly$"):
        ends_as_layers(32, 4, 1, 1)
    with pytest.raises(ValueError, match="^32 layers and the loss are 33 in all, "):
        ends_as_layers(32, 4, 0, 1)
