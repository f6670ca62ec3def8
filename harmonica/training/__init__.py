"""Training: the router's whole training run, and what carries it through hours and over
processes.
"""
