"""What every recipe shares: the training loop, losses over flat lists, arms x seeds, plots and the command line."""
