"""Studies: a grid of runs, their seeds, and the table and picture that come of them.

definition (a study file, checked, as cells and jobs), runner (each job's stages in processes
of their own, shared by any number of runners), results (statistics, CSV and Markdown).
"""
