"""Training: recipe, data, loss, step, the run of them all, and its reports."""
