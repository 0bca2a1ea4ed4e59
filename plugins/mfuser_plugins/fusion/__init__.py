"""Fusion adapters."""
