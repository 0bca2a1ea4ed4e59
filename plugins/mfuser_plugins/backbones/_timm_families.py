"""Which stepper a timm model has, by its class."""

from __future__ import annotations

from torch import nn

from mfuser import MFuserError
from mfuser_plugins.backbones import _timm_plain as plain
from mfuser_plugins.backbones import _timm_staged as staged
from mfuser_plugins.backbones._timm import BeitStepper, EvaStepper, TimmStepper, ViTStepper

STEPPERS: dict[str, type[TimmStepper]] = {
    "vision_transformer.VisionTransformer": ViTStepper,
    "deit.VisionTransformerDistilled": ViTStepper,
    "eva.Eva": EvaStepper,
    "beit.Beit": BeitStepper,
    "vision_transformer_relpos.VisionTransformerRelPos": plain.RelPosStepper,
    "vision_transformer_sam.VisionTransformerSAM": plain.SamStepper,
    "naflexvit.NaFlexVit": plain.NaFlexStepper,
    "cait.Cait": plain.CaitStepper,
    "xcit.Xcit": plain.XcitStepper,
    "qwen3_vit.Qwen3VitEncoder": plain.QwenStepper,
    "qwen3_vit.Qwen3VitClassifier": plain.QwenStepper,
    "deepseek_vit.DeepseekVitEncoder": plain.DeepseekStepper,
    "deepseek_vit.DeepseekVitClassifier": plain.DeepseekStepper,
    "gemma4_vit.Gemma4VitEncoder": plain.GemmaStepper,
    "gemma4_vit.Gemma4VitClassifier": plain.GemmaStepper,
    "swin_transformer.SwinTransformer": staged.SwinStepper,
    "swin_transformer_v2.SwinTransformerV2": staged.SwinStepper,
    "swin_transformer_v2_cr.SwinTransformerV2Cr": staged.SwinCrStepper,
    "convnext.ConvNeXt": staged.ConvNeXtStepper,
    "hiera.Hiera": staged.HieraStepper,
}
"""By module and class: older versions of timm lack some."""

FAMILIES = (
    "vit_*, deit*, eva*, beit*, cait_*, xcit_*, samvit_*, naflexvit_*, swin*, convnext*, hiera_*"
)


def stepper_class(model: nn.Module, name: str) -> type[TimmStepper]:
    """The stepper of a model's class. Raises MFuserError for families that have none."""
    kind = type(model)
    found = STEPPERS.get(f"{kind.__module__.removeprefix('timm.models.')}.{kind.__name__}")
    if found is None:
        raise MFuserError(
            f"timm model '{name}' is of class {kind.__name__}, which cannot be stepped "
            "block by block with tokens of one width and one grid here; models that can: "
            f"{FAMILIES}"
        )
    return found
