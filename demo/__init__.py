"""Both recipes, or a cluster, on this machine: `python -m demo`, `python -m demo --cluster`."""
