"""Many runs from one file: ``locsgd sweep``.

spec.py        what a sweep file says
expansion.py   the runs that it describes, each configuration parsed before anything starts
resolution.py  what a run takes from finished ones; how far a run directory has come; which ones are refused
launching.py   one run as a process, here or in a job (imports no torch: a job starts quickly)
execution.py   runs carried out on this machine as their needs are met
slurm.py       the same as job arrays on a cluster
manifest.py    sweep.json, for reports
command.py     the command line
"""
