"""`distft doctor`: whether a run would work on these machines, before it is started there.

A check has two halves: `look` runs in every process and brings back facts, `judge` runs on rank 0 over everybody's.
"""
