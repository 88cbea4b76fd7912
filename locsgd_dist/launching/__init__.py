"""Starting runs on one machine, under Slurm and under Kubernetes: ``locsgd launch`` and the files that it fills in.

job.py       what is to be started, and where its files go
slurm.py     launch/slurm.sbatch filled in, handed to sbatch
kubeflow.py  launch/kubeflow/trainjob.yaml filled in, handed to kubectl
command.py   the command line
"""
