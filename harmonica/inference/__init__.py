"""Inference: what a frozen schedule knows before the walk, and the walks that use it."""
