"""The selective scan: one operator, one naive reference, one module or package per backend."""
