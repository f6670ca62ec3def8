"""Storage: files are written whole or not at all, and read without running them.

files      JSON, text, tensors and pickles; the lock on a folder
formats    our own schedule and router
foreign    other people's tables
hub        folders on the Hugging Face Hub
"""
