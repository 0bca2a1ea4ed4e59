"""Weight files that others wrote: read without running anything, unwrapped, and named for what
they hold."""
