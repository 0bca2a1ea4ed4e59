"""Discovery of plugins, and the contracts their components are held to."""
