"""Registries and what they hold: pairings, recipes, studies, runs."""
