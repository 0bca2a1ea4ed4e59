"""Text enhancers."""
