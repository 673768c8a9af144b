"""Slurm job templates and the submitter. Empty until `fledge submit` lands; `srun python -m fledge.train` works."""
