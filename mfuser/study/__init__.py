"""Studies: a base pairing, the axes that are varied, and the table of results.

grid.py resolves the variants, runs.py works through them one by one, worker.py is the process of
one run; report.py, plot.py and results.py hold and write the results, paper.py the published
figures beside them; adapters.py is the study that needs no data. `mfuser.config.study` defines the
tables.
"""
