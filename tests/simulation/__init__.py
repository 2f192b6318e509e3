"""Simulation: the real core and the real durable log, on virtual time and a seeded scheduler.

One schedule is one run of ``workload.main``: clients, providers, faults and the order of all
events are drawn from a seed. ``python -m tests.simulation --help`` runs any number of them.
"""
