"""Simulated federations: the server's rounds and the devices' learners in one process, for experiments."""
