"""A run under a batch scheduler: start its processes, pass on the wish to stop, judge its end, start it again.

`cluster/train.sbatch` becomes `python -m distft.cluster.batch`, which lives as long as the job. Nothing here imports
torch: it starts at once, and its signal handlers are ready before the first process of the run is.
"""
