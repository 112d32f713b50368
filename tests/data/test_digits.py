"""The bundled digits."""

import numpy as np

from hasten.data.digits import Digits


def test_holds_the_images_that_scikit_learn_documents():
    table = Digits().load()
    assert list(table.inputs) == ["input"]
    assert table.inputs["input"].shape == (1797, 1, 8, 8)
    assert table.inputs["input"].dtype == np.float32
    assert (table.inputs["input"].min(), table.inputs["input"].max()) == (0, 16)
    # Counts per digit of the UCI test set that the library ships.
    assert np.bincount(table.targets).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_has_one_fingerprint():
    assert Digits().fingerprint() == Digits().fingerprint()
    assert len(Digits().fingerprint()) == 64
