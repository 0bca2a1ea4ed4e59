"""Domain-generalized semantic segmentation with any pair of foundation models.

The public names are loaded when they are used, so that `import mfuser` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mfuser.version import __version__ as __version__

_HOME = {
    "hookimpl": "hookspecs",
    "MFuserError": "errors",
    "DataError": "errors",
    "WeightsError": "errors",
    "BackboneSpec": "specs",
    "VisionSpec": "specs",
    "VisionLanguageSpec": "specs",
    "FusionSpec": "specs",
    "TuningSpec": "specs",
    "EnhancerSpec": "specs",
    "DecoderSpec": "specs",
    "LossSpec": "specs",
    "Need": "specs",
    "InferenceSpec": "specs",
    "DatasetSpec": "specs",
    "TokenShape": "shapes",
    "Options": "specs",
    "component_of": "plugins.discovery",
    "Stream": "interfaces",
    "VisionBackbone": "interfaces",
    "VisionLanguageBackbone": "interfaces",
    "FusionAdapter": "interfaces",
    "ManyFusionAdapter": "interfaces",
    "TextEnhancer": "interfaces",
    "TokenRefiner": "interfaces",
    "Decoder": "interfaces",
    "JoiningDecoder": "interfaces",
    "LastBlocks": "interfaces",
    "DecoderOutput": "interfaces",
    "Loss": "losses",
    "LossInputs": "losses",
    "LossParts": "losses",
    "whole_batch": "losses",
    "Network": "inference",
    "Inference": "inference",
    "Dataset": "interfaces",
    "Sample": "interfaces",
    "IGNORE": "interfaces",
    "components": "plugins.discovery",
    "Registry": "config.registry",
    "PairingSpec": "config.pairing",
    "load_registry": "config.registry",
    "build_model": "model.assembly",
    "DGSSModel": "model.dgss",
    "train": "engine.run",
    "evaluate": "engine.run",
    "from_pretrained": "engine.pretrained",
    "save_pretrained": "engine.pretrained",
}

__all__ = sorted(["__version__", *_HOME])

if TYPE_CHECKING:
    from mfuser.config.pairing import PairingSpec as PairingSpec
    from mfuser.config.registry import Registry as Registry
    from mfuser.config.registry import load_registry as load_registry
    from mfuser.engine.pretrained import from_pretrained as from_pretrained
    from mfuser.engine.pretrained import save_pretrained as save_pretrained
    from mfuser.engine.run import evaluate as evaluate
    from mfuser.engine.run import train as train
    from mfuser.errors import DataError as DataError
    from mfuser.errors import MFuserError as MFuserError
    from mfuser.errors import WeightsError as WeightsError
    from mfuser.hookspecs import hookimpl as hookimpl
    from mfuser.inference import Inference as Inference
    from mfuser.inference import Network as Network
    from mfuser.interfaces import IGNORE as IGNORE
    from mfuser.interfaces import Dataset as Dataset
    from mfuser.interfaces import Decoder as Decoder
    from mfuser.interfaces import DecoderOutput as DecoderOutput
    from mfuser.interfaces import FusionAdapter as FusionAdapter
    from mfuser.interfaces import JoiningDecoder as JoiningDecoder
    from mfuser.interfaces import LastBlocks as LastBlocks
    from mfuser.interfaces import ManyFusionAdapter as ManyFusionAdapter
    from mfuser.interfaces import Sample as Sample
    from mfuser.interfaces import Stream as Stream
    from mfuser.interfaces import TextEnhancer as TextEnhancer
    from mfuser.interfaces import TokenRefiner as TokenRefiner
    from mfuser.interfaces import VisionBackbone as VisionBackbone
    from mfuser.interfaces import VisionLanguageBackbone as VisionLanguageBackbone
    from mfuser.losses import Loss as Loss
    from mfuser.losses import LossInputs as LossInputs
    from mfuser.losses import LossParts as LossParts
    from mfuser.losses import whole_batch as whole_batch
    from mfuser.model.assembly import build_model as build_model
    from mfuser.model.dgss import DGSSModel as DGSSModel
    from mfuser.plugins.discovery import components as components
    from mfuser.shapes import TokenShape as TokenShape
    from mfuser.specs import BackboneSpec as BackboneSpec
    from mfuser.specs import DatasetSpec as DatasetSpec
    from mfuser.specs import DecoderSpec as DecoderSpec
    from mfuser.specs import EnhancerSpec as EnhancerSpec
    from mfuser.specs import FusionSpec as FusionSpec
    from mfuser.specs import InferenceSpec as InferenceSpec
    from mfuser.specs import LossSpec as LossSpec
    from mfuser.specs import Need as Need
    from mfuser.specs import Options as Options
    from mfuser.specs import TuningSpec as TuningSpec
    from mfuser.specs import VisionLanguageSpec as VisionLanguageSpec
    from mfuser.specs import VisionSpec as VisionSpec
    from mfuser.specs import component_of as component_of


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mfuser' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mfuser.{_HOME[name]}"), name)
