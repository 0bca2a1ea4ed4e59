"""Registries and what they hold: pairings, recipes, datasets, studies, runs."""
