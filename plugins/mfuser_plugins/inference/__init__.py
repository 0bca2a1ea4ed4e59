"""How images of any size become class scores."""
