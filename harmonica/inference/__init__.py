"""Inference: what a frozen schedule knows before the walk, and the walks that use it.

lifetimes    for how long each feature is needed
walk         the fast walk
graph        the whole walk as one CUDA graph
timing       how long a walk takes
"""
