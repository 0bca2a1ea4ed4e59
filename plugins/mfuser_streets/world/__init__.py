"""The miniature world: a space of styles and cities, its domains, captions and exact geometry.

`space` says which styles and cities there are, `scenes` draws them from (seed, index), `captions`
describes them. The towers in `mfuser_streets.towers` were pretrained on nothing else.
"""
