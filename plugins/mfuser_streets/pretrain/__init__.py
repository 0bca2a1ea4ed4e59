"""Pretraining of the towers in miniature: `mfuser world pretrain vfm|vlm`."""
