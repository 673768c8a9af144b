"""A run as Slurm jobs: `fledge submit` renders and chains them, `fledge status` tells where they stand."""
