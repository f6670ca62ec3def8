"""Training: `train_sdt`, and what carries a run through hours and over processes.

train         what a user calls
state         the settings of a run, and what changes while it runs
beta          the price of computing, chosen so that the table ends on target
checkpoint    the file that a run continues from
dry_run       what a run will take
"""
