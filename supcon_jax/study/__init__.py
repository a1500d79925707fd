"""Studies: a grid of runs, their seeds, and the table and picture that come of them.

grid (what a study is, and its cells), definition (a study file, checked), costs, runner (each
job's stages in processes of their own, shared by any number of runners), results (statistics,
CSV and Markdown), picture.
"""
