"""Search: beyond the paper, tables found on whole walks instead of by gradients."""
