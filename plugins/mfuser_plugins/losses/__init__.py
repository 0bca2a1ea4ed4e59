"""Losses beside the decoder's own."""
