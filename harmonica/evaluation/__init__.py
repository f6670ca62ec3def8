"""Evaluation: distances between images, pictures of tables and walks."""
