"""The built-in plugins: one file each, found through the entry-point group `mfuser`."""
