"""Search: beyond the paper, tables found on whole walks, and weights learned for them.

paths            which whole steps compute, by walks that fork from one another
baselines        other people's methods
target           a speedup that the user asks for
flip_effects     what flipping entries of a table does to the image
refine           flip entries as long as the error falls
refine_router    a trained router, put on target and refined
references       images of the same sampler with many more steps, and errors to them
learn            the weights of a schedule's gates, by gradients; table and weights in turn
"""
