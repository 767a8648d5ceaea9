"""Runs on several nodes, all of them this machine: the real command, real torchrun, a real Slurm."""
