"""The renderer behind the dataset `streets`.

A scene is drawn once, as a map of part numbers with a table of parts (`geometry`, `layout` and
the modules of what stands in a street); a style then colors it (`styles`, `render`).
"""
