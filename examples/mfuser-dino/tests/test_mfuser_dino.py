"""Tests of mfuser-dino."""

import pytest
import torch
from mfuser import WeightsError
from mfuser.testing import conforms

from mfuser_dino import DinoSpec


def test_conforms():
    conforms(DinoSpec)


def test_stepping_equals_another_implementation(tmp_path):
    """timm's ViT as the oracle: the same tensors under the same names, the same tokens."""
    timm = pytest.importorskip("timm")
    options = {"embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}
    oracle = timm.create_model("vit_small_patch16_224", **options).eval()
    torch.save(oracle.state_dict(), tmp_path / "weights.pth")
    size = {"width": 128, "depth": 3, "weights": str(tmp_path / "weights.pth")}
    backbone = DinoSpec(name="dino", **size).build((224, 224))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        stream = backbone.embed(images)
        tokens = stream.tokens
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens, stream.state)
        tokens = backbone.finish(tokens, stream.state)
        torch.testing.assert_close(tokens, oracle.forward_features(images), rtol=1e-4, atol=1e-5)


def test_weights_of_another_size_are_refused(tmp_path):
    tiny = DinoSpec(name="dino", **DinoSpec.tiny).build((32, 32))
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="weights.pth' does not fit"):
        DinoSpec(name="dino", weights=str(tmp_path / "weights.pth")).build((32, 32))
    with pytest.raises(WeightsError, match="absent.pth"):
        DinoSpec(name="dino", weights="absent.pth").build((32, 32))
