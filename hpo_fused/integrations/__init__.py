"""Trainers: TRL and verl."""
