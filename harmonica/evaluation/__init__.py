"""Evaluation: how good cached images are, and what they look like.

distances      between images, and between sets of them
judge          recognises the pictures of the bundled models
pictures       plots of tables, images and errors
"""
