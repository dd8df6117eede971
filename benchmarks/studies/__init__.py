"""What the studies beside run.py share."""
