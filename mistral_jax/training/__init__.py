"""Training: the recipe, the data, the loss, the step, the run around it, and its reports."""
