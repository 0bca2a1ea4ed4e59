"""Tuning of the encoders' own layers."""
