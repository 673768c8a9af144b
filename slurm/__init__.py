"""Slurm job templates and the submitter. Empty until `fledge submit` lands; `srun torchrun -m fledge.train` works."""
