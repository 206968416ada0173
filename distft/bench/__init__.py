"""What methods, engines and batch sizes of a recipe really cost: measured, each alone, beside the plan of it.

`command` reads the options, `cases` makes the list, `runner` starts `case` in fresh processes for each and keeps one
record a case, `judge` compares losses and sets the plan beside them, `table` and `plots` show it. `traffic` and
`syncs` count what a piece of work sends between processes and where the host waits.
"""
