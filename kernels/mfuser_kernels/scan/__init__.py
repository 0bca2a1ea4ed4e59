"""The selective scan: one operator, one naive reference, one file or folder for each backend."""
