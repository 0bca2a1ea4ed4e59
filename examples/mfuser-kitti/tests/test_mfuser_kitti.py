"""Tests of mfuser-kitti."""

import numpy as np
import pytest
from mfuser import DataError
from mfuser.data.images import read_label
from mfuser.testing import conforms
from PIL import Image

from mfuser_kitti import IDS, KittiSpec


def test_conforms():
    conforms(KittiSpec)


@pytest.fixture
def root(tmp_path):
    KittiSpec.write_example(tmp_path)
    return tmp_path


def test_cityscapes_ids_become_train_ids(root):
    dataset = KittiSpec(name="kitti").build(root, "val")
    raw = read_label(root / "training" / "semantic" / "000000_10.png")
    label = dataset[0].label
    for train_id, value in enumerate(IDS):
        assert ((label == train_id) == (raw == value)).all()
    assert (label[~np.isin(raw, IDS)] == 255).all()


def test_what_is_wrong_is_named(root):
    semantic = root / "training" / "semantic"
    Image.fromarray(np.full((30, 99), 200, np.uint8)).save(semantic / "000001_10.png")
    with pytest.raises(DataError, match="000001_10.png is not a label"):
        KittiSpec(name="kitti").build(root, "train")[1]
    (semantic / "000000_10.png").unlink()
    with pytest.raises(DataError, match="000000_10.png has no label"):
        KittiSpec(name="kitti").build(root, "train")
