"""Evaluation: how good cached images are, and what they look like.

pictures       plots of tables, images and errors
"""
