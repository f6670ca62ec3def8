"""Training: `train_sdt`, and what carries a run through hours and over processes.

train         what a user calls
checkpoint    the settings of a run, what changes while it runs, and the file that it continues from
beta          the price of computing, chosen so that the table ends on target
dry_run       what a run will take
"""
