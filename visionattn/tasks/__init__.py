"""What each task adds to the loop: its loss, its targets and its metrics."""
