"""Studies: a base pairing, what is varied, and the table that comes of it.

spec.py what a study is; grid.py its variants, resolved; runs.py training them one by one;
report.py and plot.py the results; paper.py the published figures beside them; adapters.py the
study that needs no data.
"""
