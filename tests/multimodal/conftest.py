"""A small network in place of the mini size, for the tests that train."""

import pytest

from tests.multimodal import small


@pytest.fixture(scope="module")
def small_network():
    patch = pytest.MonkeyPatch()
    patch.setitem(small.model.SIZES, "mini", small.WIDTHS)
    patch.setitem(small.objectives.DECODERS, "mini", small.DECODER)
    yield
    patch.undo()
